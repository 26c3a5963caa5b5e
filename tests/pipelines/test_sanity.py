"""Values that overflowed end a run with a reason; a video without pictures is said."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffsynth.errors import NumericalError
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.sanity import check_finite_values
from tests.pipelines.tiny import call, load

Spoil = Callable[[LTX2AudioVideoPipeline], torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are kept there when decoding fails."""
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "what", "kept"),
    [
        (lambda pipe: pipe.dit.proj_out.weight, "denoise stage 1", 0),
        (lambda pipe: pipe.dit.audio_proj_out.weight, "denoise stage 1", 0),
        (lambda pipe: pipe.video_vae_decoder.conv_out.conv.bias, "decode video", 1),
        (lambda pipe: next(pipe.audio_vocoder.parameters()), "decode audio", 1),
    ],
)
def test_overflow_is_told_where_it_happens(spoil: Spoil, what: str, kept: int, tmp_path: Path) -> None:
    pipe = load()
    with torch.inference_mode():
        spoil(pipe).fill_(float("nan"))
    with pytest.raises(NumericalError, match=f"{what} gave values that are not finite") as caught:
        call(pipe)
    assert "--storage" in caught.value.hint
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == kept


def test_half_precision_is_the_first_suspect() -> None:
    values = torch.tensor([65504.0, float("inf")], dtype=torch.float16)
    with pytest.raises(NumericalError) as caught:
        check_finite_values("denoise stage 1", values, torch.float16)
    assert "--dtype bfloat16" in caught.value.hint
    check_finite_values("denoise stage 1", values[:1].expand(100), torch.float16)


def test_a_video_of_one_colour_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pipe = load()
    with caplog.at_level(logging.WARNING):
        call(pipe)
        assert "one colour" not in caplog.text
        with torch.inference_mode():
            for parameter in pipe.video_vae_decoder.conv_out.parameters():
                parameter.zero_()
        call(pipe)
    assert "every frame is of one colour" in caplog.text
