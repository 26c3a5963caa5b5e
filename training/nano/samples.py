"""Clips of held-out captions by the package's own sampler, and how many of them are right.

B clips, F frames, C latent channels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.text import PromptContext, PromptTokenizer, encode_prompts
from diffsynth.conditioning.tokens import audio_latent_frames, video_latent_shape
from diffsynth.loader import NetworkKind
from diffsynth.models.ltx2.audio_vae import AudioDecoder
from diffsynth.models.ltx2.video_vae import VideoDecoder, to_uint8
from diffsynth.models.ltx2.vocoder import decode_audio
from diffsynth.nano.judge import Summary, Verdict, judge
from diffsynth.nano.world import Description, held_out_descriptions
from diffsynth.pipelines.denoiser import Denoiser
from diffsynth.request import GuidanceParams
from diffsynth.sampling.conventions import OFFICIAL
from diffsynth.sampling.loops import euler
from diffsynth.sampling.schedules import DISTILLED_STAGE_1, ltx2_schedule
from training.nano.dit import GEMMA, NanoTransformer
from training.nano.latents import FPS, FRAMES
from training.nano.parts import files_by_kind, load_part, working_dtype

_DECODERS = (NetworkKind.VIDEO_DECODER, NetworkKind.AUDIO_DECODER, NetworkKind.VOCODER)
_DECODED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How clips are made."""

    side: int = 256
    steps: int = 20
    scale: float = 3.0
    """Of the guidance of both streams."""
    distilled: bool = False
    """The eight fixed steps, without guidance."""
    seed: int = 7

    @property
    def sigmas(self) -> Tensor:
        """Noise levels."""
        return torch.tensor(DISTILLED_STAGE_1) if self.distilled else ltx2_schedule(self.steps)

    @property
    def guidance(self) -> GuidanceParams:
        """Of both streams."""
        return GuidanceParams(cfg_scale=1.0 if self.distilled else self.scale)


def contexts(network: NanoTransformer, tokenizer: PromptTokenizer, prompts: Sequence[str]) -> PromptContext:
    """Encode prompts one by one, as the pipeline does; one row of the result for each."""
    encoded = encode_prompts(network.text.gemma, network.text.connectors, tokenizer, prompts)
    return PromptContext(torch.cat([c.video for c in encoded]), torch.cat([c.audio for c in encoded]))


@torch.inference_mode()
def sample(
    network: NanoTransformer,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    course: Course,
    latent_bins: int,
) -> tuple[Tensor, Tensor]:
    """Normalised latents of some prompts: (B, C, F', H', W') and (B, z, L, bins), float32."""
    transformer = network.transformer
    weight, count = transformer.patchify_proj.weight, len(prompts)
    grid = video_latent_shape(FRAMES, course.side, course.side)
    video_shape = (count, transformer.config.in_channels, *grid)
    channels = transformer.config.audio_in_channels // latent_bins
    audio_shape = (count, channels, audio_latent_frames(FRAMES, FPS), latent_bins)
    video = ModalityState.video(video_shape, FPS, device=weight.device)
    audio = ModalityState.audio(audio_shape, device=weight.device)
    # Every clip has noise of its own, whatever the company.
    sources = [torch.Generator().manual_seed(course.seed + row) for row in range(count)]
    video, audio = (
        state.with_latent(
            torch.cat([torch.randn(1, *state.latent.shape[1:], generator=source) for source in sources]).to(
                weight.device
            )
        )
        for state in (video, audio)
    )
    denoise = Denoiser(
        transformer=transformer,
        positive=contexts(network, tokenizer, prompts),
        negative=contexts(network, tokenizer, [""] * count),
        video_guidance=course.guidance,
        audio_guidance=course.guidance,
        conventions=OFFICIAL,
        dtype=weight.dtype,
    )
    seen, heard = euler(denoise, video, audio, course.sigmas)
    assert seen is not None, "both streams go in and come out"
    assert heard is not None, "both streams go in and come out"
    return seen.unpatchified(), heard.unpatchified()


def judged(
    network: NanoTransformer,
    folder: Path,
    device: torch.device | str,
    *,
    count: int = 64,
    courses: Sequence[Course] = (Course(),),
) -> dict[str, dict[str, float]]:
    """Percentages of right attributes over held-out captions, printed and returned, for every course.

    Nothing where the folder lacks a decoder.
    """
    if not set(_DECODERS) <= files_by_kind(folder).keys():
        print("samples: no decoders, nothing is judged", flush=True)
        return {}
    descriptions, found = held_out_descriptions(count), {}
    tokenizer = PromptTokenizer(folder / GEMMA)
    decoders = Decoders.load(folder, device)
    for course in courses:
        begun = time.monotonic()
        prompts = [d.caption(i) for i, d in enumerate(descriptions)]
        latents = sample(network, tokenizer, prompts, course, decoders.audio.config.latent_bins)
        summary = Summary.of(decoders.verdicts(descriptions, *latents))
        name = f"{course.side} px, {'distilled' if course.distilled else f'{course.steps} steps'}"
        print(f"samples: {name}: {summary} ({time.monotonic() - begun:.1f} s)", flush=True)
        found[name] = summary.percent
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decoders:
    """From latents to what is seen and heard."""

    video: VideoDecoder
    audio: AudioDecoder
    vocoder: Any

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Self:
        """Those of a folder.  Raises CheckpointError when one is missing."""
        dtype = working_dtype(device)
        video, audio, vocoder = (load_part(folder, kind, device, dtype) for kind in _DECODERS)
        return cls(video=video, audio=audio, vocoder=vocoder)

    @torch.inference_mode()
    def verdicts(self, descriptions: Sequence[Description], video: Tensor, audio: Tensor) -> list[Verdict]:
        """Decode latents of :func:`sample` and judge every clip."""
        found, dtype = [], next(self.video.parameters()).dtype
        for start in range(0, len(descriptions), _DECODED_AT_ONCE):
            rows = slice(start, start + _DECODED_AT_ONCE)
            pictures = to_uint8(self.video(video[rows].to(dtype))).permute(0, 2, 3, 4, 1).cpu()
            sounds = [
                decode_audio(self.audio, self.vocoder, latent[None].to(dtype)).float().cpu()
                for latent in audio[rows]
            ]
            for description, picture, sound in zip(descriptions[rows], pictures, sounds, strict=True):
                rate = self.vocoder.output_sampling_rate
                found.append(judge(picture, sound, rate, description))
        return found
