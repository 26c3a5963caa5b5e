"""The tiny transformer and made-up samples for it."""

from collections.abc import Callable

import pytest
import torch

from diffsynth.conditioning.text import PromptContext
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.pipelines.assemble import open_models
from diffsynth.pipelines.ltx2_audio_video import ModelConfig
from diffsynth.training.samples import Sample
from tests.pipelines.tiny import DEV


@pytest.fixture
def network() -> LTX2Transformer:
    """The transformer of the tiny set, float32, of its own for every test."""
    opened = open_models([ModelConfig(path=DEV)]).only(["dit"])
    dit = opened.load(torch.device("cpu"), torch.float32).parts.dit
    assert dit is not None
    return dit


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A sample of 2 x 2 x 3 video tokens and 5 audio tokens from a seed."""

    def make(seed: int, *, rows: int = 2, fps: float = 24.0, reference: bool = False) -> Sample:
        source = torch.Generator().manual_seed(seed)
        return Sample(
            video=torch.randn(1, 128, 2, rows, rows if reference else 3, generator=source),
            audio=torch.randn(1, 8, 5, 16, generator=source),
            context=PromptContext(
                torch.randn(1, 7, 16, generator=source), torch.randn(1, 7, 16, generator=source)
            ),
            fps=fps,
            reference=torch.randn(1, 128, 2, 1, 1, generator=source) if reference else None,
        )

    return make
