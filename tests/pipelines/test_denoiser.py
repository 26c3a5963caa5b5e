"""Which streams and contexts every guidance pass of a step is shown."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth.conditioning.items import Frozen
from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.text import PromptContext
from diffsynth.models.ltx2.streams import Pass
from diffsynth.pipelines.denoiser import Denoiser
from diffsynth.pipelines.stages import positive_only
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.sampling.conventions import DIFFSYNTH, OFFICIAL, OFFICIAL_1_0, Conventions

VIDEO = ModalityState.video((1, 4, 1, 2, 2), 24.0)
AUDIO = ModalityState.audio((1, 2, 3, 2))


class Shown:
    """Remembers the passes it is asked for; every velocity is 0."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []

    def forward_passes(self, passes: Sequence[Pass], **how: Any) -> list[tuple[Tensor, Tensor]]:
        self.passes = list(passes)
        return [(torch.zeros_like(VIDEO.latent), torch.zeros_like(AUDIO.latent)) for _ in passes]


def denoiser(
    video: GuidanceParams, audio: GuidanceParams, conventions: Conventions = OFFICIAL, **more: Any
) -> tuple[Denoiser, Shown]:
    """Contexts are 1 where they are positive and -1 where they are negative."""
    shown = Shown()
    ones = torch.ones(1, 1, 1)
    made = Denoiser(
        transformer=shown,  # type: ignore[arg-type]
        positive=PromptContext(ones, ones),
        negative=PromptContext(-ones, -ones),
        video_guidance=video,
        audio_guidance=audio,
        conventions=conventions,
        dtype=torch.float32,
        **more,
    )
    return made, shown


def enabled_audio(conventions: Conventions) -> list[bool]:
    """Per pass of a step that the audio sits out: conditional, unconditional, perturbed, isolated."""
    guidance = GuidanceParams(cfg_scale=3.0, stg_scale=1.0, stg_blocks=(0,), modality_scale=3.0)
    ask, shown = denoiser(guidance, GuidanceParams(skip_step=1), conventions)
    ask(VIDEO, AUDIO, 1.0, 0)
    ask(VIDEO, AUDIO, 0.5, 1)
    return [p.audio is not None and p.audio.enabled for p in shown.passes]


def test_a_stream_that_sits_a_step_out_is_hidden_in_every_pass() -> None:
    assert enabled_audio(OFFICIAL) == [False, False, False, False]


def test_official_1_0_shows_it_in_the_unconditional_pass() -> None:
    assert enabled_audio(OFFICIAL_1_0) == [False, True, False, False]


def uncond_contexts(video: ModalityState, audio: ModalityState, **more: Any) -> tuple[float, float]:
    ask, shown = denoiser(GuidanceParams(cfg_scale=3.0), GuidanceParams(), **more)
    ask(video, audio, 1.0, 0)
    last = shown.passes[-1]
    assert last.video is not None
    assert last.audio is not None
    return last.video.context.item(), last.audio.context.item()


def test_given_sound_of_audio_to_video_has_no_negative_context() -> None:
    frozen = Frozen().apply(AUDIO)
    assert uncond_contexts(VIDEO, frozen, positive_only=frozenset({"audio"})) == (-1, 1)
    assert uncond_contexts(VIDEO, AUDIO, positive_only=frozenset({"audio"})) == (-1, -1)


def test_what_a_retake_keeps_has_the_negative_context() -> None:
    assert positive_only(GenerateRequest(retake_audio="sound"), OFFICIAL) == {"audio"}
    assert not positive_only(GenerateRequest(retake_audio="sound"), DIFFSYNTH)
    assert not positive_only(GenerateRequest(retake_audio="sound", retake_video="clip"), OFFICIAL)
    assert uncond_contexts(VIDEO, Frozen().apply(AUDIO)) == (-1, -1)
