"""Units that turn given pictures, clips and sounds into initial latents and conditionings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from diffsynth.conditioning.items import (
    AttentionWeighted,
    ConditioningItem,
    Frozen,
    Keyframe,
    LatentAtIndex,
    ReferenceClip,
    TemporalRegion,
    token_weights,
)
from diffsynth.conditioning.tokens import Grid, reference_frames
from diffsynth.device import capabilities
from diffsynth.errors import RequestError
from diffsynth.models.ltx2.audio_vae import AudioEncoder
from diffsynth.models.ltx2.mel import log_mel, prepare_waveform
from diffsynth.models.ltx2.tiling import TileConfig
from diffsynth.models.ltx2.video_tiling import encode_tiled
from diffsynth.pipelines.checks import tile_config
from diffsynth.pipelines.inputs import ClipFrames
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.stages import Stage, keeps_audio, keeps_video
from diffsynth.pipelines.state import GenerationState
from diffsynth.request import GenerateRequest, Region
from diffsynth.sampling.conventions import ImageFit
from diffsynth.utils.audio import Waveform
from diffsynth.utils.images import FitMode, compress_round_trip, fit_frames, fit_image, fit_mask

DEFAULT_CRF = 33
"""H.264 quality of the round trip of stills up to LTX-2.3: the models were trained on frames of videos."""


@dataclass(frozen=True, slots=True)
class EncodeVideoInputs:
    """Pictures, reference clips and the retaken clip -> conditioning items at the size of a stage."""

    stage: Stage
    needs: tuple[str, ...] = ("video_vae_encoder",)

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Fill ``video_items``, and ``video_latent`` of the first stage when a clip is retaken."""
        jobs = list(self._jobs(parts, state))
        state.video_items = self._items(parts, state, jobs) if jobs else []
        if keeps_video(state.request):
            state.video_items.append(Frozen())

    def _items(
        self,
        parts: Parts,
        state: GenerationState,
        jobs: Sequence[Callable[[TileConfig], list[ConditioningItem]]],
    ) -> list[ConditioningItem]:
        phase = f"encode inputs of stage {self.stage.number}"
        items: list[ConditioningItem] = []
        with parts.memory.phase(f"encode inputs {self.stage.number}") as run:
            for done, job in enumerate(jobs):
                state.report(phase, done, len(jobs))
                items += job(tile_config(state.request, run.settings))
        state.report(phase, len(jobs), len(jobs))
        return items

    def _jobs(
        self, parts: Parts, state: GenerationState
    ) -> Iterator[Callable[[TileConfig], list[ConditioningItem]]]:
        """One per picture or clip to encode; it returns the items that come of it."""
        request, inputs, stage = state.request, state.inputs, self.stage
        if inputs.retake_video is not None:
            yield partial(self._retake, parts, state, inputs.retake_video)
        for image, frame, strength in zip(
            inputs.images, request.image_frames(), request.image_strengths(), strict=True
        ):
            yield partial(self._picture, parts, state, image, frame, strength)
        if stage.number == 1:
            for clip, strength in zip(inputs.in_context_videos, request.reference_strengths(), strict=True):
                yield partial(self._reference, parts, state, clip, strength)

    def _retake(
        self, parts: Parts, state: GenerationState, clip: ClipFrames, tiling: TileConfig
    ) -> list[ConditioningItem]:
        stage, regions = self.stage, state.request.retake_video_regions
        latent = self._encode_clip(parts, state, clip, (stage.height, stage.width), tiling)
        items: list[ConditioningItem] = []
        if stage.number == 1:
            state.video_latent = latent
        else:  # what is kept comes from the clip at this size, not from the upsampler
            items.append(LatentAtIndex(latent=latent))
        if regions:
            items.append(TemporalRegion(regions=regions))
        return items

    def _picture(
        self,
        parts: Parts,
        state: GenerationState,
        image: Image.Image,
        frame: int,
        strength: float,
        tiling: TileConfig,
    ) -> list[ConditioningItem]:
        request, stage = state.request, self.stage
        crf = DEFAULT_CRF if request.input_images_crf is None else request.input_images_crf
        pixels = _pixels(image, stage.height, stage.width, crf, state.conventions.image_fit)
        latent = self._encode(parts, state, pixels, tiling)
        if frame == 0 and not request.input_images_as_keyframes:
            return [LatentAtIndex(latent=latent, strength=strength)]
        return [Keyframe(latent=latent, frame_index=frame, strength=strength)]

    def _reference(
        self,
        parts: Parts,
        state: GenerationState,
        clip: ClipFrames,
        strength: float,
        tiling: TileConfig,
    ) -> list[ConditioningItem]:
        stage, factor = self.stage, state.request.reference_factor
        size = (stage.height // factor, stage.width // factor)
        latent = self._encode_clip(parts, state, _sparse(clip, state.request), size, tiling)
        item = ReferenceClip(
            latent=latent,
            downscale_factor=factor,
            temporal_scale_factor=state.request.temporal_factor,
            strength=strength,
        )
        if not state.request.weighs_references:
            return [item]
        frames, rows, columns = latent.shape[2:]
        return [AttentionWeighted(item=item, weight=self._weight(state, (frames, rows, columns)))]

    def _weight(self, state: GenerationState, grid: Grid) -> float | Tensor:
        """How much the video attends to a reference: one number, or one per token where a mask is given."""
        mask, strength = state.inputs.in_context_attention_mask, state.request.in_context_attention_strength
        if mask is None:
            return strength
        pixels = fit_mask(_sparse(mask, state.request), self.stage.height, self.stage.width)
        return token_weights(pixels, grid, strength)

    def _encode_clip(
        self,
        parts: Parts,
        state: GenerationState,
        clip: ClipFrames,
        size: tuple[int, int],
        tiling: TileConfig,
    ) -> Tensor:
        """A clip at a size (height, width) in pixels, without compression."""
        mode: FitMode = "stretch" if state.conventions.image_fit is ImageFit.STRETCH else "crop"
        return self._encode(parts, state, fit_frames(clip, *size, mode), tiling)

    def _encode(self, parts: Parts, state: GenerationState, pixels: Tensor, tiling: TileConfig) -> Tensor:
        """Pixels (1, 3, F, H, W) -> float32 latent (1, C, F', H', W')."""
        assert parts.video_vae_encoder is not None
        if state.request.tiled:
            encoder = parts.video_vae_encoder
            latent = encode_tiled(encoder, pixels, tiling, device=parts.device, dtype=parts.dtype)
        else:
            latent = parts.video_vae_encoder(pixels.to(device=parts.device, dtype=parts.dtype))
        return latent.float()


@dataclass(frozen=True, slots=True)
class EncodeAudioInput:
    """A given sound -> the initial audio latent and what of it is kept."""

    needs: tuple[str, ...] = ("audio_vae_encoder",)

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Fill ``audio_latent`` and ``audio_items``."""
        assert parts.audio_vae_encoder is not None
        assert state.audio_shape is not None
        encoder, sound = parts.audio_vae_encoder, given_sound(state)
        state.report("encode audio", 0, 1)
        with parts.memory.phase("encode audio"):
            state.audio_latent = encode_sound(encoder, sound, state.audio_shape[2], parts.device, parts.dtype)
        state.audio_items = audio_items(state.request.retake_audio_regions)
        state.report("encode audio", 1, 1)


def encode_sound(
    encoder: AudioEncoder, sound: Waveform, frames: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A sound -> normalised latent (1, C, frames, M), float32 on the device; see :func:`fit_audio_latent`."""
    config = encoder.config.mel
    waveform = prepare_waveform(sound.samples, sound.sampling_rate, config)
    mel = log_mel(waveform, config, complex_ok=capabilities(waveform.device).complex64)
    return fit_audio_latent(encoder(mel.to(device=device, dtype=dtype)).float(), frames)


def given_sound(state: GenerationState) -> Waveform:
    """The given sound in stereo at the length of the video, continued with silence where it is shorter."""
    sound, request = state.inputs.retake_audio, state.request
    assert sound is not None
    num_samples = round(request.num_frames / request.frame_rate * sound.sampling_rate)
    return sound.to_stereo().fit(num_samples)


def kept_sound(state: GenerationState) -> Waveform | None:
    """The given sound at the length of the video, when none of it is to change."""
    return given_sound(state) if keeps_audio(state.request) else None


def audio_items(regions: Sequence[Region]) -> list[ConditioningItem]:
    """What is kept of a given sound: all of it, or what lies outside the regions."""
    return [TemporalRegion(regions=tuple(regions))] if regions else [Frozen()]


def fit_audio_latent(latent: Tensor, frames: int) -> Tensor:
    """Cut (B, C, T, M) to ``frames``, or append zeros: encoded sound is a little longer than the video.

    Raises:
        RequestError: there is no sound at all.
    """
    if latent.shape[2] == 0:
        raise RequestError("retake_audio is empty", hint="a sound of the length of the video")
    missing = frames - latent.shape[2]
    if missing > 0:
        return torch.nn.functional.pad(latent, (0, 0, 0, missing))
    return latent[:, :, :frames].contiguous()  # a view would keep all of it


def _pixels(image: Image.Image, height: int, width: int, crf: int, fit: ImageFit) -> Tensor:
    """(1, 3, 1, H, W) float32; the compression comes before cropping, but after stretching."""
    if fit is ImageFit.STRETCH:
        return fit_image(compress_round_trip(image.resize((width, height)), crf), height, width, "stretch")
    return fit_image(compress_round_trip(image, crf), height, width, "crop")


def _sparse(clip: ClipFrames, request: GenerateRequest) -> ClipFrames:
    """The frames of a reference clip that are encoded."""
    kept = reference_frames(len(clip), request.temporal_factor)
    return clip[kept] if isinstance(clip, Tensor) else tuple(clip[frame] for frame in kept)
