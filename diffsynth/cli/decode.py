"""``diffsynth decode``: the latents of a run that was stopped at its end -> mp4 or sound."""

import logging
from collections.abc import Sequence
from pathlib import Path

from diffsynth.cli.generate import LESS_MEMORY, check_output, dtype_named, phases, write
from diffsynth.cli.machine import MachineOptions
from diffsynth.cli.stats import show_stats
from diffsynth.device import out_of_memory_told
from diffsynth.pipelines.assemble import DECODERS
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.rescue import FinalLatents

logger = logging.getLogger(__name__)


def run(
    file: Path,
    *,
    checkpoint: Sequence[str],
    machine: MachineOptions,
    output: Path,
    quiet: bool,
    stats: bool,
) -> None:
    """Load the decoders alone, decode and write; ``file`` stays where it is.

    Raises:
        DiffSynthError: of the kind that says what was wrong.
    """
    latents = FinalLatents.load(file)
    check_output(output, latents.request)
    pipe = LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=dtype_named(machine.dtype),
        device=machine.device,
        model_configs=[ModelConfig.named(name) for name in checkpoint],
        vram_limit=machine.vram_limit,
        host_limit=machine.host_limit,
        storage=machine.storage,
        cache=machine.cache,
        networks=DECODERS,
    )
    with out_of_memory_told(LESS_MEMORY), phases(quiet) as on_progress:
        result = pipe.decode(latents, on_progress=on_progress)
    write(result, output, pipe.decoder_files)
    if stats:
        show_stats(pipe.memory_report())
