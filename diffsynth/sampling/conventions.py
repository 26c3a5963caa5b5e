"""Every point where the public implementations of LTX-2 differ, as one frozen object with named presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.streams import CrossTimestep


class KeyframeSpan(StrEnum):
    """Length in time of a keyframe made from one image."""

    ONE_FRAME = "one-frame"
    """[index, index + 1) / fps: the authors' correction of April 2026, for every checkpoint."""
    LATENT = "latent"
    """The eight frames of a latent: [index, index + 8) / fps."""


class NoiserRule(StrEnum):
    """How noise n enters tokens of initial latent x, clean latent c and mask m; s is the noise scale."""

    TWO_LERPS = "two-lerps"
    """lerp(c, lerp(x, n, s), m).  Conditionings write the clean latent only."""
    ONE_LERP = "one-lerp"
    """lerp(x, n, m * s).  Conditionings write the initial latent too."""
    UNMASKED = "unmasked"
    """lerp(x, n, s) for every token: goes with :attr:`MaskedStep.VELOCITY`."""


class NoiseRule(StrEnum):
    """Where noise comes from."""

    SHARED = "shared"
    """One generator per run, token layout, in this order: video, audio, and in stage 2 again video, audio."""
    FRESH = "fresh"
    """A new generator of the same seed for every tensor, float32, in the unpatchified layout."""


class MaskedStep(StrEnum):
    """What a mask strictly between 0 and 1 does in a step; for masks of 0 and 1 the results agree."""

    X0_BLEND = "x0-blend"
    """The guided x0 is blended with the clean latent: ``x0 * m + c * (1 - m)``."""
    VELOCITY = "velocity"
    """The model sees ``x * m + c * (1 - m)``; its velocity has weight m beside ``(x - c) / sigma``."""


class FrozenSigma(StrEnum):
    """The sigma that a frozen modality (given audio, or given video) shows to the network."""

    ZERO = "zero"
    CURRENT = "current"


class RegionEdges(StrEnum):
    """Whether a retake region includes a latent that it only touches."""

    OPEN = "open"
    CLOSED = "closed"


class ImageFit(StrEnum):
    """How a picture of another shape meets the video's size."""

    CROP = "crop"
    """Compress as H.264, fill with bilinear interpolation, crop the centre."""
    STRETCH = "stretch"
    """Squeeze with PIL's bicubic filter, then compress: the aspect ratio is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conventions:
    """The rules of one reference.  The defaults are those of the official code 1.2.0.

    Make a mixture with ``dataclasses.replace(OFFICIAL, name="...", noise_source=NoiseRule.FRESH)``.
    """

    name: str = "custom"
    cross_timestep: CrossTimestep = CrossTimestep.TOKENWISE
    keyframe_span: KeyframeSpan = KeyframeSpan.ONE_FRAME
    noiser: NoiserRule = NoiserRule.TWO_LERPS
    noise_source: NoiseRule = NoiseRule.SHARED
    masked_step: MaskedStep = MaskedStep.X0_BLEND
    frozen_sigma: FrozenSigma = FrozenSigma.ZERO
    region_edges: RegionEdges = RegionEdges.OPEN
    image_fit: ImageFit = ImageFit.CROP
    keyframe_strength: bool = True
    """False: keyframes are kept exactly, whatever their strength."""
    skipped_in_uncond: bool = False
    """True: a stream that sits a step out is shown to the other one in the unconditional pass."""
    given_sound_has_negative: bool = False
    """True: the sound of audio-to-video has the negative context in the unconditional pass, as the video."""


OFFICIAL = Conventions(name="official")
"""Official ltx-core and ltx-pipelines 1.2.0."""

OFFICIAL_1_0 = Conventions(
    name="official-1.0",
    cross_timestep=CrossTimestep.CROSS,
    keyframe_span=KeyframeSpan.LATENT,
    noiser=NoiserRule.ONE_LERP,
    frozen_sigma=FrozenSigma.CURRENT,
    skipped_in_uncond=True,
)
"""Official ltx-core and ltx-pipelines 1.0.0, with positions kept in float32."""

DIFFSYNTH = Conventions(
    name="diffsynth",
    cross_timestep=CrossTimestep.CROSS,
    keyframe_span=KeyframeSpan.LATENT,
    noiser=NoiserRule.UNMASKED,
    noise_source=NoiseRule.FRESH,
    masked_step=MaskedStep.VELOCITY,
    frozen_sigma=FrozenSigma.CURRENT,
    region_edges=RegionEdges.CLOSED,
    image_fit=ImageFit.STRETCH,
    keyframe_strength=False,
    given_sound_has_negative=True,
)
"""DiffSynth-Studio 2.1.12 without its rounding of timesteps and positions to bfloat16."""

PRESETS: Mapping[str, Conventions] = MappingProxyType(
    {c.name: c for c in (OFFICIAL, OFFICIAL_1_0, DIFFSYNTH)}
)


def get_conventions(value: str | Conventions) -> Conventions:
    """A preset by its name, or the object itself.

    Raises:
        RequestError: an unknown name.
    """
    if isinstance(value, Conventions):
        return value
    if value not in PRESETS:
        raise RequestError(f"conventions={value!r} is not known", hint=", ".join(sorted(PRESETS)))
    return PRESETS[value]
