"""Prompts and captions encoded before any training, and kept: the text model comes once and goes."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from diffsynth.device import out_of_memory_told
from diffsynth.errors import OutputError
from diffsynth.pipelines.assemble import OpenedModels
from diffsynth.pipelines.progress import OnProgress, Progress, ignore
from diffsynth.pipelines.prompt_cache import PromptCache
from diffsynth.pipelines.units import encode_with
from diffsynth.request import GenerateRequest
from diffsynth.training.config import TrainConfig
from diffsynth.training.networks import TEXT, computing, files_of, formats_of, prepare

CAPTIONS = "captions"
"""Folder of the encoded captions beside the samples: other sizes need no text model."""

AT_ONCE = 16
"""Texts that one trip of the text model's weights over the bus is for."""

T = TypeVar("T")


def text_cache(config: TrainConfig, opened: OpenedModels) -> PromptCache:
    """Where the encoded texts of a data set lie."""
    files = files_of(opened.only(TEXT))
    return PromptCache(config.data.folder / CAPTIONS, files=files, settings=formats_of(config, opened))


@torch.inference_mode()
def encode_texts(
    config: TrainConfig,
    opened: OpenedModels,
    cache: PromptCache,
    texts: Sequence[str],
    on_progress: OnProgress = ignore,
) -> None:
    """Put into the cache what is missing there; with nothing missing no weight is read.

    Raises:
        CheckpointError: a network is missing or cannot be read.
        OutputError: an encoding could not be kept.
        MemoryBudgetError: it does not fit, or the device ran out of memory.
    """
    missing = [text for text in dict.fromkeys(texts) if cache.get(text) is None]
    if not missing:
        return
    at_once = AT_ONCE if config.memory.managed else 1
    groups = [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
    with (
        out_of_memory_told("vram_limit in [memory], or a lower one", "the text model"),
        computing(config, opened, TEXT) as parts,
    ):
        parts.prompt_cache = cache
        for group in told("encode captions", groups, on_progress, sizes=list(map(len, groups))):
            prepare(parts, GenerateRequest(), group)
            parts.memory.convert(TEXT, on_progress)
            encode_with(parts, group)
            for text in group:
                if not cache.path(text).exists():
                    raise OutputError(
                        f"{cache.path(text)} could not be kept", hint=f"free space in {config.data.folder}"
                    )


def told(
    phase: str, items: Sequence[T], on_progress: OnProgress, sizes: Sequence[int] | None = None
) -> Iterator[T]:
    """The items one by one, each announced before it is worked on; ``sizes``: how many each counts for."""
    sizes = [1] * len(items) if sizes is None else sizes
    done, total = 0, sum(sizes)
    for item, size in zip(items, sizes, strict=True):
        on_progress(Progress(phase=phase, done=done, total=total))
        yield item
        done += size
    on_progress(Progress(phase=phase, done=done, total=total))
