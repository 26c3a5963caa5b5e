"""What is given of a modality that is generated: regions whose tokens are clean, at sigma 0, without loss.

F latent frames, H/W latent rows and columns, T audio latents, C channels, M mel bins.
Source: the flexible strategy of the official LTX-2 trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from diffsynth.conditioning.tokens import VIDEO_SCALE
from diffsynth.errors import RequestError

VIDEO, AUDIO = "video", "audio"


class ConditionType(StrEnum):
    """Shapes of regions."""

    FIRST_FRAME = "first_frame"
    """Latent frame 0 of the video: what an image to start from gives."""
    PREFIX = "prefix"
    """The first latent frames or audio latents: a clip is continued."""
    SUFFIX = "suffix"
    """The last ones."""
    SPATIAL_CROP = "spatial_crop"
    """A rectangle in every frame of the video: a clip is painted on around it."""
    MASK = "mask"
    """What the mask of each sample says: a clip or a sound is mended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A region that is given in some of the samples.

    Attributes:
        type: one of :class:`ConditionType`.
        modality: "video" or "audio".
        probability: of being given, drawn for every sample.
        count: latent frames or audio latents of a prefix or suffix.
        crop: (top, left, bottom, right) of a rectangle in pixels, multiples of 32; the last two exclusive.
    """

    type: str
    modality: str = VIDEO
    probability: float = 1.0
    count: int = 1
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)

    def check(self) -> None:
        """Make sure that the values can work whatever the clips are.

        Raises:
            RequestError: one of them cannot.
        """
        if self.type not in list(ConditionType):
            raise RequestError(f"condition type={self.type!r} is not known", hint=", ".join(ConditionType))
        if self.modality not in {VIDEO, AUDIO}:
            raise RequestError(f"condition modality={self.modality!r}", hint=f"{VIDEO} or {AUDIO}")
        in_time = {ConditionType.PREFIX, ConditionType.SUFFIX}
        if self.modality == AUDIO and self.type not in {*in_time, ConditionType.MASK}:
            raise RequestError(f"condition {self.type} is one of the video", hint="prefix, suffix or mask")
        if not 0 <= self.probability <= 1:
            raise RequestError(f"condition probability={self.probability}", hint="a number from 0 to 1")
        if self.type in in_time and self.count < 1:
            raise RequestError(f"condition count={self.count}", hint="1 or more latents")
        top, left, bottom, right = self.crop
        if self.type == ConditionType.SPATIAL_CROP and (
            any(value % VIDEO_SCALE[1] for value in self.crop)
            or not (0 <= top < bottom and 0 <= left < right)
        ):
            raise RequestError(
                f"condition crop={list(self.crop)} is no rectangle of latent cells",
                hint="[top, left, bottom, right] in multiples of 32 pixels, [0, 0, 64, 96] for instance",
            )


def given_tokens(condition: Condition, shape: Sequence[int]) -> Tensor:
    """The tokens inside a region that is the same in all samples, (tokens,) bool.

    Args:
        condition: of any type but ``mask``.
        shape: of the latent: (C, F, H, W) for video, (C, T, M) for audio.

    Raises:
        RequestError: the region leaves nothing to generate, or lies outside the clip.
    """
    cells = torch.zeros(tuple(shape[1:]) if len(shape) == 4 else (shape[1],), dtype=torch.bool)
    match condition.type:
        case ConditionType.FIRST_FRAME:
            cells[:1] = True
        case ConditionType.PREFIX:
            cells[: condition.count] = True
        case ConditionType.SUFFIX:
            cells[-condition.count :] = True
        case _:
            top, left, bottom, right = (pixels // VIDEO_SCALE[1] for pixels in condition.crop)
            if bottom > shape[2] or right > shape[3]:
                raise RequestError(
                    f"crop={list(condition.crop)} lies outside {shape[3] * 32}x{shape[2] * 32} pixels",
                    hint="a rectangle inside every bucket",
                )
            cells[:, top:bottom, left:right] = True
    given = cells.flatten()
    if bool(given.all()):
        raise RequestError(
            f"condition {condition.type} gives the whole {condition.modality} of a clip",
            hint="longer clips, or a smaller region",
        )
    return given


def draw_mask(
    conditions: Sequence[Condition],
    shape: Sequence[int],
    batch: int,
    generator: torch.Generator,
    masks: Tensor | None = None,
) -> Tensor:
    """Draw for every sample which conditions hold.

    Args:
        conditions: those of one modality; each draws ``batch`` uniforms, in order.
        shape: as in :func:`given_tokens`.
        generator: on the CPU.
        masks: (B, tokens) bool, True where a sample is given: the region of conditions of the type ``mask``.

    Returns:
        (B, tokens, 1) float32, 1 = generate, 0 = given; expanded from one value where nothing is given.

    Raises:
        RequestError: as :func:`given_tokens`; or regions that together leave nothing of a sample.
    """
    num_tokens = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[1]
    given = torch.zeros(batch, num_tokens, dtype=torch.bool)
    for condition in conditions:
        holds = torch.rand(batch, generator=generator) < condition.probability
        region = masks if condition.type == ConditionType.MASK else given_tokens(condition, shape)
        assert region is not None, "a condition of the type mask comes with masks"
        given |= holds[:, None] & region
    if not bool(given.any()):
        return torch.ones(1, 1, 1).expand(batch, num_tokens, 1)
    if bool(given.all(dim=1).any()):
        raise RequestError("the conditions together give the whole clip", hint="smaller regions")
    return (~given).float().unsqueeze(-1)
