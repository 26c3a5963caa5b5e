"""The one description of a generation, shared by Python, command line, prompt files and the mp4's metadata.

A request is frozen, holds plain values only and imports no torch; it checks itself before any weight is
touched.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, get_args, get_origin

from diffsynth.errors import RequestError

SPATIAL_STEP_PX = 32
"""One latent cell covers 32 x 32 pixels."""
TEMPORAL_STEP = 8
"""One latent frame covers 8 pixel frames; the first one covers a single frame."""
MAX_FRAME_RATE = 1000
"""The largest that an mp4 is written with."""
STAGE_1_DIVISOR = 2
"""Two-stage generation runs its first stage at half height and half width."""

Region = tuple[float, float]
"""Start and end in seconds."""


def _option(default: Any, text: str) -> Any:
    """A field with the sentence that the command line, the docs and a web page show for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceParams:
    """Guidance of one modality.  The defaults are neutral: nothing but the conditional pass runs.

    ``pred = cond + (cfg - 1)(cond - uncond) + stg (cond - perturbed) + (modality - 1)(cond - isolated)``,
    then rescaled towards the standard deviation of ``cond`` by ``rescale_scale`` in [0, 1].
    """

    cfg_scale: float = 1.0
    stg_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    rescale_scale: float = 0.0
    modality_scale: float = 1.0
    skip_step: int = 0

    def validate(self, name: str) -> None:
        """Raise RequestError when a value cannot work; ``name`` is the argument that holds this object."""
        _check_types(self, f"{name}.")
        for key in ("cfg_scale", "stg_scale", "rescale_scale", "modality_scale"):
            _finite(f"{name}.{key}", getattr(self, key))
        if not 0 <= self.rescale_scale <= 1:
            raise RequestError(
                f"{name}.rescale_scale={self.rescale_scale} is outside 0..1", hint="0.7, or 0 for none"
            )
        if self.skip_step < 0 or any(block < 0 for block in self.stg_blocks):
            raise RequestError(
                f"{name}: skip_step and stg_blocks count from 0", hint="0 or a positive number"
            )
        if self.stg_scale != 0 and not self.stg_blocks:
            raise RequestError(
                f"{name}.stg_scale={self.stg_scale} needs stg_blocks",
                hint="stg_blocks=(29,) for LTX-2, (28,) for LTX-2.3",
            )


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
    seed: int | None = _option(None, "seed of the noise; without it one is drawn and recorded")
    rand_device: str = _option("cpu", "device that draws the noise; cpu gives the same video everywhere")
    num_inference_steps: int | None = _option(
        None, "denoising steps; default 40 for LTX-2, 30 for LTX-2.3; distilled models have their own list"
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
    in_context_videos: tuple[str, ...] = _option((), "reference clips for an IC-LoRA")
    in_context_downsample_factor: int = _option(2, "size of the first stage over size of the reference clips")
    retake_video: str | None = _option(None, "clip of which parts are made anew, num_frames or longer")
    retake_video_regions: tuple[Region, ...] = _option(
        (), "regions of the clip to generate anew, START:END in seconds; none keeps all of it"
    )
    retake_audio: str | None = _option(None, "sound that is kept, or of which parts are generated anew")
    audio_sample_rate: int = _option(48000, "sampling rate in Hz of a sound that is given as a tensor")
    retake_audio_regions: tuple[Region, ...] = _option(
        (), "regions of the sound to generate anew, START:END in seconds; none keeps all of it"
    )
    audio_only: bool = _option(False, "generate sound alone")
    stage2_spatial_upsample_factor: float = _option(2, "size of the second stage over the first: 2")
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

        Raises:
            RequestError: it names the argument and what to pass instead.
        """
        _check_types(self)
        self._check_numbers()
        self._check_size()
        self._check_images()
        self._check_regions()
        self._check_guidance()
        return self

    def image_strengths(self) -> tuple[float, ...]:
        """One strength per image."""
        if isinstance(self.input_images_strength, Sequence):
            return tuple(self.input_images_strength)
        return (self.input_images_strength,) * len(self.input_images)

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
        _check_known(cls, values, "request")
        frozen = {k: _freeze(v) for k, v in values.items()}
        for name in ("video_guidance", "audio_guidance"):
            if isinstance(frozen.get(name), Mapping):
                _check_known(GuidanceParams, frozen[name], name)
                frozen[name] = GuidanceParams(**{k: _freeze(v) for k, v in frozen[name].items()})
        return cls(**frozen)

    def _check_numbers(self) -> None:
        for name in ("height", "width", "num_frames", "num_inference_steps", "in_context_downsample_factor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name}={value!r} is not a positive whole number", hint=_EXAMPLES[name])
        _finite("frame_rate", self.frame_rate)
        if not 0 < self.frame_rate <= MAX_FRAME_RATE:
            raise RequestError(
                f"frame_rate={self.frame_rate} is outside (0, {MAX_FRAME_RATE}]", hint="24, 25 or 30"
            )
        if self.audio_sample_rate < 1:
            raise RequestError(f"audio_sample_rate={self.audio_sample_rate} is not positive", hint="48000")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed={self.seed} does not fit 64 bits", hint="a number such as 43")
        _finite("denoising_strength", self.denoising_strength)
        if not 0 < self.denoising_strength <= 1:
            raise RequestError(f"denoising_strength={self.denoising_strength} is outside (0, 1]", hint="1.0")
        if self.denoising_strength < 1 and self.retake_video is None:
            raise RequestError(
                f"denoising_strength={self.denoising_strength} needs a video to start from",
                hint="denoising_strength=1.0, or pass retake_video",
            )
        if self.stage2_spatial_upsample_factor != 2:
            raise RequestError(
                f"stage2_spatial_upsample_factor={self.stage2_spatial_upsample_factor} is not supported: "
                "the second stage doubles height and width",
                hint="stage2_spatial_upsample_factor=2",
            )

    def _check_size(self) -> None:
        if self.audio_only and self.use_two_stage_pipeline:
            raise RequestError(
                "audio_only has no picture that the second stage could enlarge",
                hint="use_two_stage_pipeline=False",
            )
        step = SPATIAL_STEP_PX * (STAGE_1_DIVISOR if self.use_two_stage_pipeline else 1)
        reason = "two stages need" if self.use_two_stage_pipeline else "one stage needs"
        for name in ("height", "width"):
            value = getattr(self, name)
            if value % step:
                lower, upper = value // step * step, (value // step + 1) * step
                options = f"{lower} or {upper}" if lower else f"{upper}"
                raise RequestError(
                    f"{name}={value} is not a multiple of {step}, as {reason} it", hint=options
                )
        if (self.num_frames - 1) % TEMPORAL_STEP:
            lower = (self.num_frames - 1) // TEMPORAL_STEP * TEMPORAL_STEP + 1
            raise RequestError(
                f"num_frames={self.num_frames} is not 8k+1", hint=f"{lower} or {lower + TEMPORAL_STEP}"
            )
        if self.tiled and self.tile_overlap_in_pixels >= self.tile_size_in_pixels:
            raise RequestError(
                f"tile_overlap_in_pixels={self.tile_overlap_in_pixels} is not smaller than "
                f"tile_size_in_pixels={self.tile_size_in_pixels}",
                hint="tile_size_in_pixels=512, tile_overlap_in_pixels=128",
            )

    def _check_images(self) -> None:
        count = len(self.input_images)
        if not count:
            return
        if len(self.input_images_indexes) != count:
            raise RequestError(
                f"input_images_indexes has {len(self.input_images_indexes)} entries for {count} input_images",
                hint="one frame index per image, such as input_images_indexes=[0, -1]",
            )
        for given, frame in zip(self.input_images_indexes, self.image_frames(), strict=True):
            if not 0 <= frame < self.num_frames:
                raise RequestError(
                    f"input_images_indexes holds {given}, outside the {self.num_frames} frames",
                    hint=f"0 to {self.num_frames - 1}, or -1 for the last frame",
                )
        if len(set(self.image_frames())) != count:
            raise RequestError(
                f"input_images_indexes={list(self.input_images_indexes)} names a frame twice",
                hint="one image per frame",
            )
        if len(self.image_strengths()) != count:
            raise RequestError(
                f"input_images_strength has {len(self.image_strengths())} entries for {count} input_images",
                hint="one number for all, or one per image",
            )
        for strength in self.image_strengths():
            _finite("input_images_strength", strength)
            if not 0 <= strength <= 1:
                raise RequestError(f"input_images_strength={strength} is outside 0..1", hint="1.0")
        if self.input_images_crf is not None and not 0 <= self.input_images_crf <= 51:
            raise RequestError(
                f"input_images_crf={self.input_images_crf} is outside 0..51",
                hint="33, or 0 for no compression",
            )

    def _check_regions(self) -> None:
        for name, source in (
            ("retake_video_regions", "retake_video"),
            ("retake_audio_regions", "retake_audio"),
        ):
            regions: tuple[Region, ...] = getattr(self, name)
            if regions and getattr(self, source) is None:
                raise RequestError(f"{name} is given without {source}", hint=f"pass {source} too")
            for start, end in regions:
                _finite(name, start)
                _finite(name, end)
                if not 0 <= start < end:
                    raise RequestError(
                        f"{name}: start {start} s must lie before end {end} s", hint="such as [(1.0, 3.0)]"
                    )

    def _check_guidance(self) -> None:
        if self.cfg_scale is not None:
            _finite("cfg_scale", self.cfg_scale)
        if self.use_distilled_pipeline:
            asked = [n for n in ("video_guidance", "audio_guidance") if getattr(self, n) is not None]
            if self.cfg_scale not in (None, 1, 1.0):
                asked.append(f"cfg_scale={self.cfg_scale}")
            if asked:
                raise RequestError(
                    f"a distilled model has its guidance built in; {', '.join(asked)} cannot apply",
                    hint="leave cfg_scale out, or use_distilled_pipeline=False with a dev checkpoint",
                )
        for name in ("video_guidance", "audio_guidance"):
            guidance: GuidanceParams | None = getattr(self, name)
            if guidance is None:
                continue
            if self.cfg_scale is not None:
                raise RequestError(f"cfg_scale and {name} are both given", hint=f"set {name}.cfg_scale only")
            guidance.validate(name)


_EXAMPLES: Mapping[str, str] = {
    "height": "512",
    "width": "768",
    "num_frames": "121",
    "num_inference_steps": "40",
    "in_context_downsample_factor": "2",
}


def _check_types(values: "GenerateRequest | GuidanceParams", prefix: str = "") -> None:
    for f in fields(values):
        value = getattr(values, f.name)
        if not _is_a(value, f.type):
            raise RequestError(f"{prefix}{f.name}={value!r} is of the wrong type", hint=_type_name(f.type))


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value is of the type of a field; a whole number passes as float, a bool not as a number."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_is_a, value, arguments))
        return all(_is_a(item, arguments[0]) for item in value)
    if arguments:
        return any(_is_a(value, argument) for argument in arguments)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def _check_known(cls: "type[GenerateRequest | GuidanceParams]", values: Mapping[str, Any], what: str) -> None:
    unknown = sorted(values.keys() - {f.name for f in fields(cls)})
    if unknown:
        raise RequestError(f"unknown {what} fields {unknown}", hint="see `diffsynth generate --help`")


def _finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name}={value!r} is not a number", hint="a finite number")


def _freeze(value: Any) -> Any:
    """JSON lists become the tuples that the request holds."""
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
