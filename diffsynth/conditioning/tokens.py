"""Latents as tokens, the positions of tokens, and the sizes of latents.

B batch, C channels, F latent frames, H/W latent rows and columns, T tokens, M mel bins.  Positions are
intervals [start, end): seconds for time, pixels of the target video for rows and columns.  They are always
float32, and always computed on the CPU, so that they do not depend on where the run is.
"""

import torch
from einops import rearrange
from torch import Tensor

from diffsynth.errors import RequestError

Grid = tuple[int, int, int]
"""(F, H, W) of a video latent."""

VIDEO_SCALE = (8, 32, 32)
"""Pixel frames, rows and columns per latent cell; the first latent frame covers one pixel frame."""
AUDIO_LATENTS_PER_S = 25.0
"""16000 samples per second, 160 per mel frame, 4 mel frames per latent."""
_MEL_PER_LATENT = 4
_MEL_HOP = 160
_SAMPLE_RATE_HZ = 16000
REFERENCE_AUDIO_GAP_S = 0.04
"""Silence between the end of a reference voice and time 0: one latent."""


def video_latent_shape(num_frames: int, height: int, width: int) -> Grid:
    """(F, H, W) of the latent of a clip, ``num_frames`` = 8k + 1 and multiples of 32 pixels.

    Raises:
        RequestError: a size below one latent cell.
    """
    grid = ((num_frames - 1) // VIDEO_SCALE[0] + 1, height // VIDEO_SCALE[1], width // VIDEO_SCALE[2])
    if min(grid) < 1:
        raise RequestError(
            f"{num_frames} frames of {width}x{height} are less than one latent cell",
            hint="at least 1 frame of 32x32 pixels",
        )
    return grid


def audio_latent_frames(num_frames: int, fps: float) -> int:
    """Audio latents of a clip: ``round(num_frames / fps * 25)``, half to even; in this order of operations.

    0 for a clip shorter than 20 ms, which nothing can be generated for.
    """
    return round(float(num_frames) / float(fps) * AUDIO_LATENTS_PER_S)


def patchify(latent: Tensor) -> Tensor:
    """Video (B, C, F, H, W) -> (B, F*H*W, C), w fastest; audio (B, C, T, M) -> (B, T, C*M), m fastest.

    Raises:
        ValueError: neither four nor five axes.
    """
    if latent.ndim == 5:
        return rearrange(latent, "b c f h w -> b (f h w) c")
    if latent.ndim == 4:
        return rearrange(latent, "b c t m -> b t (c m)")
    raise ValueError(f"a latent has 5 axes (video) or 4 (audio), not {latent.ndim}")


def unpatchify(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`patchify`.

    Args:
        tokens: (B, T, D).
        shape: of the latent, (B, C, F, H, W) or (B, C, T, M); batch and channels are taken from the tokens,
            so a mask (B, T, 1) unpatchifies with the shape of its latent, audio masks to (B, 1, T, 1).
    """
    if len(shape) == 5:
        _, _, f, h, w = shape
        return rearrange(tokens, "b (f h w) c -> b c f h w", f=f, h=h, w=w)
    bins = 1 if tokens.shape[-1] == 1 else shape[3]
    return rearrange(tokens, "b t (c m) -> b c t m", m=bins)


def video_grid_bounds(grid: Grid) -> Tensor:
    """Start and end of every latent cell in cells: (3, F*H*W, 2) int64, axes (frame, row, column)."""
    cells = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, 3)
    starts = cells.T
    return torch.stack([starts, starts + 1], dim=-1)


def video_pixel_bounds(grid: Grid, *, causal: bool = True) -> Tensor:
    """Pixel frames, rows and columns of every latent cell: (3, F*H*W, 2) int64.

    Args:
        causal: frame 0 covers [0, 1) and frame k [8k - 7, 8k + 1); otherwise frame k covers [8k, 8k + 8).
    """
    bounds = video_grid_bounds(grid) * torch.tensor(VIDEO_SCALE)[:, None, None]
    if causal:
        bounds[0] = (bounds[0] + 1 - VIDEO_SCALE[0]).clamp(min=0)
    return bounds


def video_positions(grid: Grid, fps: float, *, batch: int = 1) -> Tensor:
    """Positions of the target tokens: (B, 3, F*H*W, 2) float32 on the CPU."""
    return _batched(_in_seconds(video_pixel_bounds(grid), fps), batch)


def keyframe_positions(
    grid: Grid, fps: float, frame_index: int, *, one_frame: bool = True, batch: int = 1
) -> Tensor:
    """Positions of a keyframe appended at pixel frame ``frame_index`` >= 0, of the target's size.

    Args:
        one_frame: every latent frame covers a single pixel frame (a still image); otherwise eight, and the
            causal rule holds at index 0 only.

    Returns:
        (B, 3, F*H*W, 2) float32 on the CPU.
    """
    bounds = video_pixel_bounds(grid, causal=frame_index == 0)
    bounds[0] += frame_index
    if one_frame:
        bounds[0, :, 1] = bounds[0, :, 0] + 1
    return _batched(_in_seconds(bounds, fps), batch)


def reference_positions(
    grid: Grid, fps: float, *, downscale_factor: int = 1, temporal_scale_factor: int = 1, batch: int = 1
) -> Tensor:
    """Positions of a reference clip that spans the target's area and time.

    Args:
        grid: of the reference latent.
        fps: of the target.
        downscale_factor: target size / reference size.
        temporal_scale_factor: target frames / reference frames.

    Returns:
        (B, 3, F*H*W, 2) float32 on the CPU.
    """
    positions = _in_seconds(video_pixel_bounds(grid), fps / temporal_scale_factor)
    positions[1:] *= downscale_factor
    if temporal_scale_factor != 1:
        positions[0] = (positions[0] - (temporal_scale_factor - 1) / fps).clamp(min=0)
    return _batched(positions, batch)


def reference_frames(num_frames: int, temporal_scale_factor: int) -> list[int]:
    """Frames of a clip that its sparse reference consists of: the first, then every one in so many from the
    second on, so that each stands for as many frames of the target.

    ``num_frames`` is one more than a multiple of eight times the factor.  Source: the official LTX-2 trainer.
    """
    return [0, *range(1, num_frames, temporal_scale_factor)]


def audio_positions(
    frames: int,
    *,
    shift: int = 0,
    causal: bool = True,
    batch: int = 1,
    mel_per_latent: int = _MEL_PER_LATENT,
    mel_hop: int = _MEL_HOP,
    sample_rate_hz: int = _SAMPLE_RATE_HZ,
) -> Tensor:
    """Positions of audio latents: (B, 1, frames, 2) float32 on the CPU, seconds.

    Args:
        shift: index of the first latent.
        causal: latent 0 covers one mel frame, [0, 0.01) s, the others four; otherwise all cover four.
        mel_per_latent, mel_hop, sample_rate_hz: of the audio VAE; the defaults are those of every checkpoint.
    """
    mel = torch.arange(shift, shift + frames + 1, dtype=torch.float32) * mel_per_latent
    if causal:
        mel = (mel + 1 - mel_per_latent).clamp(min=0)
    seconds = mel * mel_hop / sample_rate_hz
    return _batched(torch.stack([seconds[:-1], seconds[1:]], dim=-1)[None], batch)


def reference_audio_positions(frames: int, *, batch: int = 1) -> Tensor:
    """Positions of a reference voice: before time 0, ending 0.04 s early; (B, 1, frames, 2) float32."""
    positions = audio_positions(frames, batch=batch)
    return positions - positions.max() - REFERENCE_AUDIO_GAP_S


def resolve_frame_index(index: int, num_frames: int) -> int:
    """A frame index with negative ones resolved: -1 is the last frame.

    Raises:
        RequestError: outside the clip.
    """
    resolved = index + num_frames if index < 0 else index
    if not 0 <= resolved < num_frames:
        raise RequestError(
            f"frame index {index} is outside the {num_frames} frames",
            hint=f"0 to {num_frames - 1}, or -1 for the last frame",
        )
    return resolved


def _in_seconds(bounds: Tensor, fps: float) -> Tensor:
    positions = bounds.float()
    positions[0] /= fps
    return positions


def _batched(positions: Tensor, batch: int) -> Tensor:
    return positions.expand(batch, *positions.shape).contiguous()
