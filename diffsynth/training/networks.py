"""The networks that make samples and contexts: opened once, each computing for as long as it is needed."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil
from pathlib import Path

from diffsynth.conditioning.tokens import AUDIO_LATENTS_PER_S
from diffsynth.device import backend_for, resolve_device
from diffsynth.loader import ModelConfig
from diffsynth.pipelines.assemble import PART_OF, OpenedModels, open_models
from diffsynth.pipelines.manage import manage
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.stages import Stage
from diffsynth.request import TEMPORAL_STEP, GenerateRequest
from diffsynth.training.config import Bucket, TrainConfig

TEXT = ("text_encoder", "text_encoder_post_modules")
"""The networks that encode captions."""
_GIVEN = "clip"
"""Stands in a request for a file that is read elsewhere."""


def open_all(config: TrainConfig) -> OpenedModels:
    """The files of the checkpoint and of the text model; no weight is read.

    Raises:
        RequestError, CheckpointError, DownloadError: see :func:`~diffsynth.pipelines.assemble.open_models`.
    """
    files = [*config.model.checkpoint, config.model.gemma]
    return open_models(
        [ModelConfig.named(name) for name in files], ModelConfig.tokenizer_of(config.model.gemma)
    )


def files_of(opened: OpenedModels) -> list[Path]:
    """Everything that decides what these networks give, beside :func:`formats_of`."""
    files = {path for weights in opened.networks.values() for path in weights.files.paths}
    of_text = opened.tokenizer is not None and "text_encoder" in map(PART_OF.get, opened.networks)
    return sorted(files) + (opened.tokenizer.files if opened.tokenizer is not None and of_text else [])


def formats_of(config: TrainConfig, opened: OpenedModels) -> str:
    """How the text networks compute, and how they are stored where a memory manager brings them."""
    if not config.memory.managed:
        return config.model.dtype
    storage = config.memory.limits.storage_policy(opened.configs, opened.networks)
    weights = {PART_OF[kind]: network for kind, network in opened.only(TEXT).networks.items()}
    stored = [storage.policy_of(part, found, config.model.torch_dtype) for part, found in weights.items()]
    return "; ".join([config.model.dtype, *stored])


@contextmanager
def computing(config: TrainConfig, opened: OpenedModels, names: Sequence[str]) -> Iterator[Parts]:
    """Networks for the length of the ``with`` block; others are not touched.

    Without ``[memory]`` they lie on the device.  With it they wait on the host, and ``parts.memory`` brings
    them for each phase, as :func:`prepare` planned it.

    Raises:
        CheckpointError: one is missing or cannot be read.
    """
    device, dtype = resolve_device(config.model.device), config.model.torch_dtype
    opened = opened.only(names)
    if config.memory.managed:
        parts = manage(opened, config.memory.limits, device, dtype).parts
    else:
        parts = opened.load(device, dtype).parts
    try:
        parts.require(names)
        yield parts
    finally:
        parts.memory.close()
        for name in parts.loaded():
            setattr(parts, name, None)
        gc.collect()
        backend_for(device).empty_cache()


def prepare(parts: Parts, request: GenerateRequest, prompts: Sequence[str] = ()) -> None:
    """Plan the phases in which the networks of :func:`computing` encode prompts, and what a request is given.

    Raises:
        MemoryBudgetError: it does not fit; the hint says what would.
    """
    parts.memory.prepare(request, loras=_no_loras, prompts=prompts)


def request_of(bucket: Bucket | None, fps: float, duration_s: float) -> GenerateRequest:
    """A request that asks the encoders for what a clip does: pictures of the bucket, and sound.

    A reference is no larger than its clip and comes after it, so that it needs nothing more.
    """
    if bucket is None:
        steps = ceil(duration_s * AUDIO_LATENTS_PER_S / TEMPORAL_STEP)
        return GenerateRequest(
            prompt="",
            num_frames=steps * TEMPORAL_STEP + 1,
            frame_rate=AUDIO_LATENTS_PER_S,
            audio_only=True,
            retake_audio=_GIVEN,
        )
    return GenerateRequest(
        prompt="",
        height=bucket.height,
        width=bucket.width,
        num_frames=bucket.frames,
        frame_rate=fps,
        retake_video=_GIVEN,
        retake_audio=_GIVEN,
    )


def _no_loras(stage: Stage) -> nullcontext[None]:
    return nullcontext()
