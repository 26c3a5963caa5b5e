"""Prompts and captions encoded before any training, and kept: the text model comes once and goes."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from diffsynth.device import backend_for, out_of_memory_told, resolve_device
from diffsynth.errors import OutputError
from diffsynth.loader import ModelConfig
from diffsynth.pipelines.assemble import PART_OF, OpenedModels, open_models
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.progress import OnProgress, Progress, ignore
from diffsynth.pipelines.prompt_cache import PromptCache
from diffsynth.pipelines.units import encode_with
from diffsynth.training.config import TrainConfig

CAPTIONS = "captions"
"""Folder of the encoded captions beside the samples: other sizes need no text model."""

TEXT = ("text_encoder", "text_encoder_post_modules")
"""The networks that encode them."""

T = TypeVar("T")


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
    """Everything that decides what these networks give."""
    files = {path for weights in opened.networks.values() for path in weights.files.paths}
    of_text = opened.tokenizer is not None and "text_encoder" in map(PART_OF.get, opened.networks)
    return sorted(files) + (opened.tokenizer.files if opened.tokenizer is not None and of_text else [])


def text_cache(config: TrainConfig, opened: OpenedModels) -> PromptCache:
    """Where the encoded texts of a data set lie."""
    files = files_of(opened.only(TEXT))
    return PromptCache(config.data.folder / CAPTIONS, files=files, settings=config.model.dtype)


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
        OutputError: an encoding could not be kept.
        MemoryBudgetError: the device ran out of memory.
    """
    missing = [text for text in dict.fromkeys(texts) if cache.get(text) is None]
    if not missing:
        return
    with (
        out_of_memory_told('device = "cpu" for `diffsynth preprocess`', "the text model"),
        loaded(config, opened.only(TEXT), TEXT) as parts,
    ):
        parts.prompt_cache = cache
        for text in told("encode captions", missing, on_progress):
            encode_with(parts, [text])
            if not cache.path(text).exists():
                raise OutputError(
                    f"{cache.path(text)} could not be kept", hint=f"free space in {config.data.folder}"
                )


@contextmanager
def loaded(config: TrainConfig, opened: OpenedModels, names: Sequence[str]) -> Iterator[Parts]:
    """Networks on the device for as long as the ``with`` block lasts."""
    device = resolve_device(config.model.device)
    parts = opened.load(device, config.model.torch_dtype).parts
    parts.require(names)
    try:
        yield parts
    finally:
        for name in names:
            setattr(parts, name, None)
        gc.collect()
        backend_for(device).empty_cache()


def told(phase: str, items: Sequence[T], on_progress: OnProgress) -> Iterator[T]:
    """The items one by one, each announced before it is worked on."""
    for done, item in enumerate(items):
        on_progress(Progress(phase=phase, done=done, total=len(items)))
        yield item
    on_progress(Progress(phase=phase, done=len(items), total=len(items)))
