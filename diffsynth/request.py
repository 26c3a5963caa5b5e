"""The one description of a generation, shared by Python, command line, prompt files and the mp4's metadata.

A request is frozen, holds plain values only and imports no torch; it checks itself before any weight is
touched.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from diffsynth.guidance_params import GuidanceParams
from diffsynth.request_checks import (
    SPATIAL_STEP_PX,
    STAGE_1_DIVISOR,
    TEMPORAL_STEP,
    check_request,
    size_step,
)
from diffsynth.validation import check_known, check_types, freeze, per_item

__all__ = [
    "DEFAULT_DOWNSAMPLE_FACTOR",
    "SPATIAL_STEP_PX",
    "STAGE_1_DIVISOR",
    "TEMPORAL_STEP",
    "GenerateRequest",
    "GuidanceParams",
    "Region",
]

logger = logging.getLogger(__name__)

DEFAULT_DOWNSAMPLE_FACTOR = 2
"""Of reference clips whose LoRA does not say."""

Region = tuple[float, float]
"""Start and end in seconds."""


def _option(default: Any, text: str) -> Any:
    """A field with the sentence that the command line, the docs and a web page show for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """Everything that decides a result besides the weights.

    Sizes are pixels of the final video, times are seconds, strengths lie in [0, 1].  ``None`` stands for
    "the mode's own default": ``cfg_scale`` 3.0 (1.0 when distilled), ``num_inference_steps`` 40 for LTX-2
    and 30 for LTX-2.3, ``input_images_crf`` 33.  Images, clips and sounds are named by path here; objects
    handed over in Python are named by a short description.
    """

    prompt: str = _option("", "what the video shows and how it sounds")
    negative_prompt: str = _option("", "what it must not show; used by guided modes")
    enhance_prompt: bool = _option(
        False, "let the text model rewrite the prompt in detail first; with a first frame it looks at that"
    )
    use_two_stage_pipeline: bool = _option(
        False, "half size first, then a x2 latent upsampler and a second stage of 3 steps"
    )
    use_distilled_pipeline: bool = _option(
        False, "the checkpoint is distilled: its fixed list of 8 steps, no guidance"
    )
    height: int = _option(512, "height in pixels: a multiple of 32, of 64 with two stages")
    width: int = _option(768, "width in pixels: a multiple of 32, of 64 with two stages")
    num_frames: int = _option(121, "number of frames: 8k+1")
    frame_rate: float = _option(24.0, "frames per second; the model sees it and the file gets it")
    fit: bool = _option(
        False, "cut an illegal size, or more frames than a given clip has, to the nearest legal one below"
    )
    seed: int | None = _option(None, "seed of the noise; without it one is drawn and recorded")
    rand_device: str = _option("cpu", "device that draws the noise; cpu gives the same video everywhere")
    num_inference_steps: int | None = _option(
        None, "denoising steps; default 40 for LTX-2, 30 for LTX-2.3; distilled models have their own list"
    )
    sampler: str = _option(
        "euler", "euler, res_2s (second order, two evaluations per step), gradient_estimation or ancestral"
    )
    ancestral_eta: float = _option(
        1.0, "share of the noise that the ancestral sampler renews, 0..1; 0 is euler"
    )
    dynamic_shift: bool = _option(
        False, "shift the schedule by the number of tokens of the first stage, not by 4096"
    )
    cfg_scale: float | None = _option(
        None, "classifier-free guidance scale of video and audio; default 3.0, none when distilled"
    )
    video_guidance: GuidanceParams | None = _option(
        None,
        "full guidance of the video instead of cfg_scale, as JSON: cfg_scale, stg_scale, stg_blocks, ...",
    )
    audio_guidance: GuidanceParams | None = _option(
        None, "full guidance of the audio instead of cfg_scale, as JSON"
    )
    denoising_strength: float = _option(
        1.0, "below 1 the run starts from retake_video with part of the noise; 1 starts from pure noise"
    )
    input_images: tuple[str, ...] = _option((), "pictures that the video must show; repeat for more than one")
    input_images_indexes: tuple[int, ...] = _option(
        (0,), "frame index of each picture; 0 is the first frame, -1 the last"
    )
    input_images_strength: float | tuple[float, ...] = _option(
        1.0, "how strictly a picture is kept, 0..1: one number for all or one per picture"
    )
    input_images_crf: int | None = _option(
        None,
        "H.264 quality of the round trip that makes a still look like a video frame; default 33, 0 = none",
    )
    input_images_as_keyframes: bool = _option(
        False, "every picture guides as a keyframe, the one at frame 0 too, and replaces no frame"
    )
    in_context_videos: tuple[str, ...] = _option((), "reference clips for an IC-LoRA")
    in_context_downsample_factor: int | None = _option(
        None, "size of the first stage over size of the reference clips; default: as the LoRA says, else 2"
    )
    in_context_temporal_factor: int | None = _option(
        None, "frames of the video per frame of the reference clips; default: as the LoRA says, else 1"
    )
    in_context_strength: float | tuple[float, ...] = _option(
        1.0, "how strictly a reference clip is kept, 0..1: one number for all or one per clip"
    )
    in_context_attention_strength: float = _option(
        1.0, "how much the video attends to the reference clips, 0..1"
    )
    in_context_attention_mask: str | None = _option(
        None, "grey clip, white where the video attends to the reference clips, as long as these"
    )
    retake_video: str | None = _option(None, "clip of which parts are made anew, num_frames or longer")
    retake_video_regions: tuple[Region, ...] = _option(
        (), "regions of the clip to generate anew, START:END in seconds; none keeps all of it"
    )
    retake_audio: str | None = _option(None, "sound that is kept, or of which parts are generated anew")
    audio_sample_rate: int = _option(48000, "sampling rate in Hz of a sound that is given as a tensor")
    retake_audio_regions: tuple[Region, ...] = _option(
        (), "regions of the sound to generate anew, START:END in seconds; none keeps all of it"
    )
    audio_start_time: float = _option(0.0, "where in the given sound the video begins, in seconds")
    audio_max_duration: float | None = _option(
        None, "seconds of the given sound to use, silence after them; default: the length of the video"
    )
    audio_only: bool = _option(False, "generate sound alone")
    stage2_spatial_upsample_factor: float = _option(2, "size of the second stage over the first: 2")
    stage1_lora_strength: float = _option(0.0, "strength of the distilled LoRA in the first stage")
    stage2_lora_strength: float | None = _option(
        None, "strength of the distilled LoRA in the second stage; default: the one it was loaded with"
    )
    clear_lora_before_state_two: bool = _option(False, "take the user's LoRAs away before the second stage")
    tiled: bool = _option(True, "encode and decode the video in tiles, which bounds memory")
    tile_size_in_pixels: int = _option(512, "tile size in pixels, a multiple of 32")
    tile_overlap_in_pixels: int = _option(128, "overlap of tiles in pixels, a multiple of 32")
    tile_size_in_frames: int = _option(128, "tile length in frames, a multiple of 8")
    tile_overlap_in_frames: int = _option(24, "overlap of tiles in frames, a multiple of 8")
    conventions: str = _option(
        "official", "whose sampling rules hold: official (1.2.0), official-1.0 or diffsynth"
    )

    def validate(self) -> Self:
        """Check every argument by itself and against the others.

        Returns: the request itself; with ``fit``, one of legal size and length.

        Raises:
            RequestError: it names the argument and what to pass instead.
        """
        check_types(self)
        fitted = self._fitted()
        check_request(fitted)
        return fitted

    def _fitted(self) -> Self:
        """With ``fit`` the largest legal size and length within what was asked for, where there is one."""
        if not self.fit:
            return self
        step = size_step(self) * (self.reference_factor if self.in_context_videos else 1)
        time = TEMPORAL_STEP * (self.temporal_factor if self.in_context_videos else 1)
        cut = {
            "height": self.height // step * step,
            "width": self.width // step * step,
            "num_frames": (self.num_frames - 1) // time * time + 1,
        }
        changed: dict[str, Any] = {
            name: value for name, value in cut.items() if 0 < value != getattr(self, name)
        }
        for name, value in changed.items():
            logger.warning("%s=%s is cut to %s to fit", name, getattr(self, name), value)
        return replace(self, **changed) if changed else self

    def image_strengths(self) -> tuple[float, ...]:
        """One strength per image."""
        return per_item(self.input_images_strength, len(self.input_images))

    def reference_strengths(self) -> tuple[float, ...]:
        """One strength per reference clip."""
        return per_item(self.in_context_strength, len(self.in_context_videos))

    @property
    def reference_factor(self) -> int:
        """Size of the first stage over the size of the reference clips."""
        return self.in_context_downsample_factor or DEFAULT_DOWNSAMPLE_FACTOR

    @property
    def temporal_factor(self) -> int:
        """Frames of the video per frame of the reference clips that is encoded, the first ones left out."""
        return self.in_context_temporal_factor or 1

    @property
    def weighs_references(self) -> bool:
        """Whether the video attends to reference clips with a weight, which takes a mask of token pairs."""
        weighted = self.in_context_attention_strength != 1 or self.in_context_attention_mask is not None
        return bool(self.in_context_videos) and weighted

    def keyframes(self) -> tuple[int, ...]:
        """Frames of the pictures that guide as keyframes; the others take the place of the first frame."""
        return tuple(frame for frame in self.image_frames() if frame != 0 or self.input_images_as_keyframes)

    def image_frames(self) -> tuple[int, ...]:
        """One frame index per image, negative ones resolved: -1 is the last frame."""
        if not self.input_images:
            return ()
        return tuple(i + self.num_frames if i < 0 else i for i in self.input_images_indexes)

    @property
    def stage_1_size(self) -> tuple[int, int]:
        """Height and width in pixels at which the first stage runs."""
        if not self.use_two_stage_pipeline:
            return self.height, self.width
        return self.height // STAGE_1_DIVISOR, self.width // STAGE_1_DIVISOR

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON; :meth:`from_dict` of it gives an equal request."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            RequestError: a key that is no field of a request or of its guidance.
        """
        check_known(cls, values, "request")
        frozen = {k: freeze(v) for k, v in values.items()}
        for name in ("video_guidance", "audio_guidance"):
            if isinstance(frozen.get(name), Mapping):
                check_known(GuidanceParams, frozen[name], name)
                frozen[name] = GuidanceParams(**{k: freeze(v) for k, v in frozen[name].items()})
        return cls(**frozen)
