"""Conditionings: what a user gives besides the prompt, as clean tokens, masks, positions and attention.

Every item maps a state to a new one; items are applied in the order given, before noise is added.  Strengths
lie in [0, 1]: 1 keeps the given tokens exactly, 0 ignores them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from einops import reduce
from torch import Tensor

from diffsynth.conditioning.state import ModalityState, uniform_mask
from diffsynth.conditioning.tokens import (
    VIDEO_SCALE,
    Grid,
    audio_positions,
    keyframe_positions,
    patchify,
    reference_audio_positions,
    reference_positions,
)
from diffsynth.errors import RequestError
from diffsynth.sampling.conventions import OFFICIAL, Conventions, KeyframeSpan, NoiserRule, RegionEdges


class ConditioningItem(Protocol):
    """One conditioning of one modality."""

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """The state with this item in it."""


def apply_items(
    state: ModalityState, items: Iterable[ConditioningItem], conventions: Conventions = OFFICIAL
) -> ModalityState:
    """All items in order."""
    for item in items:
        state = item.apply(state, conventions)
    return state


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LatentAtIndex:
    """Latent frames that take the place of target tokens; a first-frame image has ``latent_index`` 0.

    Attributes:
        latent: (B, C, f, H, W) of the target's size.
        latent_index: first latent frame to replace.
    """

    latent: Tensor
    strength: float = 1.0
    latent_index: int = 0

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Write the clean tokens; the mask there becomes ``1 - strength``.

        Raises:
            RequestError: the sizes differ, or the frames do not fit into the target.
        """
        _check_frames("the image or clip latent", self.latent, state)
        _check_strength(self.strength)
        frames, total = self.latent.shape[2], state.target_shape[2]
        if not 0 <= self.latent_index <= total - frames:
            raise RequestError(
                f"{frames} latent frames at latent frame {self.latent_index} do not fit into {total}",
                hint=f"latent frame 0 to {max(total - frames, 0)}",
            )
        tokens = patchify(self.latent).to(state.clean)
        first = self.latent_index * state.target_shape[3] * state.target_shape[4]
        part = slice(first, first + tokens.shape[1])
        clean, mask, latent = state.clean.clone(), state.mask.clone(), state.latent
        clean[:, part] = tokens
        mask[:, part] = 1 - self.strength
        if conventions.noiser is NoiserRule.ONE_LERP:
            latent = latent.clone()
            latent[:, part] = tokens.to(latent)
        return replace(state, latent=latent, clean=clean, mask=mask)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Keyframe:
    """An image or short clip appended as tokens at a pixel frame; it guides, it replaces nothing.

    Attributes:
        latent: (B, C, f, H, W) of the target's size.
        frame_index: pixel frame >= 0 (``tokens.resolve_frame_index`` resolves -1 and the like).
        num_pixel_frames: 1 for a still, which covers one frame in time; a clip covers eight per latent frame.
    """

    latent: Tensor
    frame_index: int
    strength: float = 1.0
    num_pixel_frames: int = 1

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Append the tokens with mask ``1 - strength``.

        Raises:
            RequestError: the sizes differ, or the index is negative.
        """
        _check_frames("the keyframe latent", self.latent, state)
        _check_strength(self.strength)
        if self.frame_index < 0:
            raise RequestError(
                f"keyframe at frame {self.frame_index}", hint="resolve_frame_index(index, num_frames) first"
            )
        still = self.num_pixel_frames == 1 and conventions.keyframe_span is KeyframeSpan.ONE_FRAME
        batch, fps = state.latent.shape[0], _fps(state)
        positions = keyframe_positions(
            _grid(self.latent), fps, self.frame_index, one_frame=still, batch=batch
        )
        strength = self.strength if conventions.keyframe_strength else 1.0
        return _append(state, self.latent, positions, strength, conventions)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceClip:
    """A whole clip appended as reference, as in-context LoRAs use it.

    Attributes:
        latent: (B, C, f, h, w); h and w are the target's divided by ``downscale_factor``.
        downscale_factor: target size / reference size; the reference spans the same area.
        temporal_scale_factor: target frames / reference frames.
    """

    latent: Tensor
    downscale_factor: int = 1
    temporal_scale_factor: int = 1
    strength: float = 1.0

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Append the tokens with mask ``1 - strength``.

        Raises:
            RequestError: the clip does not span the target's area.
        """
        _check_video("the reference latent", self.latent, state)
        _check_strength(self.strength)
        spanned = tuple(n * self.downscale_factor for n in self.latent.shape[3:])
        if spanned != state.target_shape[3:] or self.latent.shape[:2] != state.target_shape[:2]:
            raise RequestError(
                f"the reference latent has shape {tuple(self.latent.shape)}, at downscale factor "
                f"{self.downscale_factor} that does not span the target {state.target_shape}",
                hint="encode it at the stage-1 size divided by the factor",
            )
        positions = reference_positions(
            _grid(self.latent),
            _fps(state),
            downscale_factor=self.downscale_factor,
            temporal_scale_factor=self.temporal_scale_factor,
            batch=state.latent.shape[0],
        )
        return _append(state, self.latent, positions, self.strength, conventions)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionWeighted:
    """A keyframe or reference that target tokens attend to with a weight, and it to them.

    Attributes:
        item: an item that appends tokens.
        weight: in [0, 1], one value or (B, N) for the N appended tokens (:func:`token_weights`).
    """

    item: "Keyframe | ReferenceClip"
    weight: float | Tensor

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Append the tokens and extend the attention mask.

        Raises:
            RequestError: one weight per token is given, but not as many as tokens.
        """
        free = self.item.apply(replace(state, attention=None), conventions)
        count = free.num_tokens - state.num_tokens
        if isinstance(self.weight, Tensor) and self.weight.ndim and self.weight.shape[-1] != count:
            raise RequestError(
                f"attention weights of shape {tuple(self.weight.shape)} for {count} tokens",
                hint="make the mask clip as long and as large as the reference",
            )
        return replace(free, attention=state.extended_attention(count, self.weight))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TemporalRegion:
    """Regenerate what lies in the regions, keep the rest of the given latent.

    Attributes:
        regions: (start, end) in seconds; several are united, none keeps everything.
    """

    regions: tuple[tuple[float, float], ...]

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Overwrite the mask of all target tokens."""
        count = state.target_tokens
        starts, ends = state.positions[:, 0, :count].unbind(dim=-1)
        inside = torch.zeros_like(starts, dtype=torch.bool)
        for start, end in self.regions:
            if conventions.region_edges is RegionEdges.CLOSED:
                inside |= (ends >= start) & (starts <= end)
            else:
                inside |= (ends > start) & (starts < end)
        mask = torch.cat([inside[..., None].to(state.mask), state.mask[:, count:]], dim=1)
        return replace(state, mask=mask)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FreeMask:
    """Keep any part of a given latent: inpainting and outpainting.

    Attributes:
        latent: (B, C, F, H, W) of the target.
        keep: (B, F, H, W) in [0, 1], 1 = keep.
    """

    latent: Tensor
    keep: Tensor
    strength: float = 1.0

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Mix clean tokens and mask by ``keep``.

        Raises:
            RequestError: latent or mask differ in size from the target.
        """
        _check_strength(self.strength)
        _check_shape("the inpainting latent", self.latent, state.target_shape)
        _check_shape("the inpainting mask", self.keep, (state.target_shape[0], *state.target_shape[2:]))
        count = state.target_tokens
        keep = patchify(self.keep[:, None]).to(state.mask)
        given = patchify(self.latent).to(state.clean)
        clean = (state.clean[:, :count] * (1 - keep) + given * keep).to(state.clean)
        mask = state.mask[:, :count] * (1 - keep) + (1 - self.strength) * keep
        return replace(
            state,
            clean=torch.cat([clean, state.clean[:, count:]], dim=1),
            mask=torch.cat([mask, state.mask[:, count:]], dim=1),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceAudio:
    """A voice appended before time 0, as dubbing LoRAs use it.

    Attributes:
        latent: (B, C, t, M), channels and mel bins of the target.
        aligned: at the times of the target, from 0, as the official trainer makes audio-to-audio LoRAs.
    """

    latent: Tensor
    strength: float = 1.0
    aligned: bool = False

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Append the tokens with mask ``1 - strength``.

        Raises:
            RequestError: not an audio latent like the target.
        """
        _check_strength(self.strength)
        shape, target = tuple(self.latent.shape), state.target_shape
        if state.is_video or len(shape) != 4 or (shape[:2], shape[3]) != (target[:2], target[3]):
            raise _shape_error("the reference audio latent", shape, target)
        place = audio_positions if self.aligned else reference_audio_positions
        positions = place(shape[2], batch=state.latent.shape[0])
        return _append(state, self.latent, positions, self.strength, conventions)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frozen:
    """The initial latent of the stream is given and stays: audio for a video, or a video for audio.

    The stream starts clean and runs at timestep 0; noise is drawn for it all the same, so that a shared
    generator gives the other stream the numbers that it would get without.
    """

    def apply(self, state: ModalityState, conventions: Conventions = OFFICIAL) -> ModalityState:
        """Set the mask to 0 everywhere."""
        return replace(state, mask=uniform_mask(0.0, state.latent), frozen=True)


def token_weights(pixel_mask: Tensor, grid: Grid, strength: float = 1.0) -> Tensor:
    """Attention weights per reference token from a mask clip, for :class:`AttentionWeighted`.

    Args:
        pixel_mask: (B, 1, Fpx, H, W) in [0, 1] at stage-1 size, Fpx = 8k + 1.
        grid: (F, H, W) of the reference latent.
        strength: multiplied onto every weight.

    Returns:
        (B, F*H*W) float32: area averages per frame, the first frame alone, the others in equal groups.

    Raises:
        RequestError: the frames cannot be divided among the latent frames.
    """
    pixel_frames, (frames, rows, columns) = pixel_mask.shape[2], grid
    later, later_pixels = frames - 1, pixel_frames - 1
    if later_pixels % max(later, 1) or (later == 0) != (later_pixels == 0):
        raise RequestError(
            f"a mask clip of {pixel_frames} frames does not divide into {frames} latent frames",
            hint=f"{later * VIDEO_SCALE[0] + 1} frames",
        )
    small = F.interpolate(pixel_mask[:, 0].float(), size=(rows, columns), mode="area")
    if later:
        rest = reduce(small[:, 1:], "b (f g) h w -> b f h w", "mean", f=later)
        small = torch.cat([small[:, :1], rest], dim=1)
    return small.flatten(1) * strength


def _append(
    state: ModalityState, given: Tensor, positions: Tensor, strength: float, conventions: Conventions
) -> ModalityState:
    tokens = patchify(given)
    initial = tokens if conventions.noiser is NoiserRule.ONE_LERP else torch.zeros_like(tokens)
    return state.appended(initial, tokens, positions, 1 - strength)


def _grid(latent: Tensor) -> Grid:
    frames, rows, columns = latent.shape[2:]
    return frames, rows, columns


def _fps(state: ModalityState) -> float:
    assert state.fps is not None, "a video state has a frame rate"
    return state.fps


def _check_video(name: str, latent: Tensor, state: ModalityState) -> None:
    if not state.is_video or latent.ndim != 5:
        raise _shape_error(name, tuple(latent.shape), state.target_shape)


def _check_frames(name: str, latent: Tensor, state: ModalityState) -> None:
    """Same batch, channels, rows and columns; any number of frames."""
    _check_video(name, latent, state)
    shape, target = tuple(latent.shape), state.target_shape
    if (shape[:2], shape[3:]) != (target[:2], target[3:]):
        raise _shape_error(name, shape, target)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise _shape_error(name, tuple(tensor.shape), expected)


def _shape_error(name: str, shape: tuple[int, ...], target: tuple[int, ...]) -> RequestError:
    return RequestError(
        f"{name} has shape {shape}, which does not fit the target {target}",
        hint="prepare it at the size of this stage",
    )


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise RequestError(f"strength={strength} is outside 0..1", hint="1.0")
