"""``diffsynth generate``: options -> pipeline -> mp4."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffsynth.cli.machine import MachineOptions
from diffsynth.cli.stats import show_stats
from diffsynth.device import out_of_memory_told, resolve_device
from diffsynth.errors import RequestError
from diffsynth.loader import NetworkKind, find_network, model_version
from diffsynth.pipelines.inputs import fit_request, inputs_by_path
from diffsynth.pipelines.limits import AUTO
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.progress import OnProgress, Progress, ignore
from diffsynth.pipelines.rescue import FinalLatents, keep, way_out
from diffsynth.pipelines.result import Result
from diffsynth.request import GenerateRequest
from diffsynth.utils.audio_file import check_audio_path, write_audio
from diffsynth.utils.media_io_ltx2 import check_output_path, write_video_audio_ltx2

logger = logging.getLogger(__name__)

DISTILLED_LORA_STRENGTH = 0.8
"""Of the public API; the official commands have 1."""

LESS_MEMORY = "--vram-limit auto, a smaller --vram-limit, or fewer --frames"
"""What to try where a device has too little memory."""

_IN_BYTES: Mapping[str, Any] = {"unit": "B", "unit_scale": True}
_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """The options that say which models run, and where."""

    checkpoint: tuple[str, ...]
    gemma: str
    upsampler: str | None
    distilled_lora: tuple[str, float] | None
    """File and strength, as of all LoRAs."""
    loras: tuple[tuple[str, float], ...]
    machine: MachineOptions


def run(
    *, request: GenerateRequest, models: ModelOptions, output: Path, quiet: bool, stats: bool = False
) -> None:
    """Generate and write; nothing is left at ``output`` unless it is complete.

    Raises:
        DiffSynthError: of the kind that says what was wrong.
    """
    check_output(output, request)
    request = fit_request(request)
    inputs = inputs_by_path(request)
    pipe = load_pipeline(models, request)
    with out_of_memory_told(LESS_MEMORY), phases(quiet) as on_progress:
        result = pipe.generate(request, inputs, on_progress)
    write(result, output, pipe.decoder_files)
    if stats:
        show_stats(pipe.memory_report())


def check_output(output: Path, request: GenerateRequest) -> None:
    """Make sure, before any work, that the result can be written: an mp4, or sound alone.

    Raises:
        RequestError, OutputError: another suffix, no such folder, or one that cannot be written to.
    """
    check = check_audio_path if request.audio_only else check_output_path
    check(output)


def write(result: Result, output: Path, decoders: Sequence[Path]) -> None:
    """Write the mp4, or the sound if it is all there is; if that fails, the latents are kept.

    Args:
        result: of a pipeline.
        output: a name that :func:`check_output` let pass.
        decoders: the files of that pipeline which decode latents.

    Raises:
        OutputError: the folder is not writable or the disk is full.
    """
    try:
        if result.frames is not None:
            write_video_audio_ltx2(result.frames, result.waveform, output)
        elif result.waveform is not None:
            write_audio(result.waveform, output, request=result.record)
    except BaseException:
        path = keep(FinalLatents.of(result))
        if path is not None:
            logger.error("%s", way_out(path, result.record, decoders))
        raise
    logger.info("%s (seed %s)", output, result.request.seed)


def dtype_named(name: str) -> torch.dtype:
    """A floating dtype.

    Raises:
        RequestError: no such name.
    """
    if name not in _DTYPES:
        raise RequestError(f"--dtype={name} is not known", hint=", ".join(_DTYPES))
    return _DTYPES[name]


def load_pipeline(models: ModelOptions, request: GenerateRequest) -> LTX2AudioVideoPipeline:
    """Load what the options name, after making sure that it can serve the request.

    Raises:
        RequestError: no checkpoint, an unknown dtype, files that do not fit the request.
        CheckpointError, DownloadError: see :meth:`LTX2AudioVideoPipeline.from_pretrained`.
    """
    if not models.checkpoint:
        raise RequestError(
            "--checkpoint is missing",
            hint="--checkpoint FILE, or --checkpoint Lightricks/LTX-2:ltx-2-19b-dev.safetensors",
        )
    machine = models.machine
    dtype = dtype_named(machine.dtype)
    files = [*models.checkpoint, models.gemma, *([models.upsampler] if models.upsampler else [])]
    lora, strength = models.distilled_lora or (None, DISTILLED_LORA_STRENGTH)
    vram_limit = machine.vram_limit
    if vram_limit is None and machine.prefetch_count and resolve_device(machine.device).type != "cpu":
        vram_limit = AUTO
    return LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=dtype,
        device=machine.device,
        model_configs=[ModelConfig.named(name) for name in files],
        tokenizer_config=ModelConfig.tokenizer_of(models.gemma),
        stage2_lora_config=ModelConfig.named(lora) if lora else None,
        stage2_lora_strength=strength,
        vram_limit=vram_limit,
        host_limit=machine.host_limit,
        storage=machine.storage,
        cache=machine.cache,
        prefetch_count=machine.prefetch_count,
        loras=[(ModelConfig.named(file), alpha) for file, alpha in models.loras],
        request=request,
    )


def checkpoint_facts(name: str) -> tuple[str, int]:
    """From the header of a checkpoint: its model, "2.0" or "2.3", and the blocks of its transformer.

    Raises:
        CheckpointError, DownloadError: it cannot be read, or holds no transformer.
    """
    files = ModelConfig.named(name).open()
    config = find_network(NetworkKind.TRANSFORMER, files).config
    return model_version(files) or "2.0", int(config.num_layers)


@contextmanager
def phases(quiet: bool) -> Iterator[OnProgress]:
    """One bar per phase, with the time left; the last one ends its line whatever happens."""
    bar: tqdm[Any] | None = None

    def show(progress: Progress) -> None:
        nonlocal bar
        if bar is None or progress.done == 0:
            if bar is not None:
                bar.close()
            how: Mapping[str, Any] = {"unit": "step"} if progress.unit == "step" else _IN_BYTES
            bar = tqdm(total=progress.total, desc=progress.phase, file=sys.stderr, **how)
        bar.update(progress.done - bar.n)
        if progress.done == progress.total:
            bar.close()

    try:
        with logging_redirect_tqdm():  # a line of the log would end up in the middle of a bar
            yield ignore if quiet else show
    finally:
        if bar is not None:
            bar.close()


def with_strength(name: str, default: float = 1.0) -> tuple[str, float]:
    """``FILE`` or ``FILE=STRENGTH``.

    Raises:
        RequestError: the strength is no number.
    """
    file, equals, strength = name.rpartition("=")
    if not equals or Path(name).exists():
        return name, default
    try:
        return file, float(strength)
    except ValueError as error:
        if not Path(file).exists():
            return name, default
        raise RequestError(f"{name}: the strength {strength!r} is no number", hint=f"{file}=1.0") from error
