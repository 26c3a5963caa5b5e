"""What a video VAE or an upsampler is worth on clips of the world that no training sees."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from diffsynth.models.ltx2.video_vae import VideoDecoder, VideoEncoder, to_uint8
from diffsynth.nano.judge import judge
from training.nano.clips import Scenes

_CHUNK = 4
SAMPLE_RATE = 16000


def psnr(again: Tensor, pixels: Tensor) -> Tensor:
    """Args: both (B, 3, F, H, W), pixels in [-1, 1].
    Returns: (B,) dB, of the clamped pictures."""
    error = again.float().clamp(-1, 1) - pixels
    return -10 * (error.square().mean((1, 2, 3, 4)) / 4).log10()


@torch.no_grad()
def measure_clips(
    reconstruct: Callable[[Tensor], Tensor], side: int, count: int, device: torch.device | str
) -> dict[str, Any]:
    """Signal-to-noise ratio, and how often what the judge reads from the pictures is right.

    Args:
        reconstruct: (B, 3, 25, H, W) float32 in [-1, 1] -> the same again.
        side: of the clips.
        count: how many.
        device: of the networks.

    Returns:
        ``psnr_db`` (mean over clips), ``worst_psnr_db`` and, by the judge's names, per cent right.
    """
    ratios: list[Tensor] = []
    right: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    for first in range(0, count, _CHUNK):
        clips = min(_CHUNK, count - first)
        scenes = Scenes.draw(clips, seed=5000 + first, device=device, held_out=True)
        pixels = scenes.video(side)
        again = reconstruct(pixels).float()
        ratios.append(psnr(again, pixels).cpu())
        sound = scenes.sound(SAMPLE_RATE).cpu()
        pictures = to_uint8(again).permute(0, 2, 3, 4, 1).cpu()
        for index, description in enumerate(scenes.descriptions):
            verdict = judge(pictures[index], sound[index], SAMPLE_RATE, description)
            for field in fields(verdict):
                value = getattr(verdict, field.name)
                if value is not None:
                    judged[field.name] += 1
                    right[field.name] += value
    all_ratios = torch.cat(ratios)
    shares = {name: round(100 * right[name] / number, 1) for name, number in judged.items()}
    return {
        "psnr_db": round(all_ratios.mean().item(), 2),
        "worst_psnr_db": round(all_ratios.min().item(), 2),
        **shares,
    }


@torch.no_grad()
def measure_video_vae(
    encoder: VideoEncoder,
    decoder: VideoDecoder,
    sides: Sequence[int],
    count: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """Reconstruction of clips of these sides, and of single images of the first of them."""
    dtype = encoder.conv_in.conv.weight.dtype

    def reconstruct(pixels: Tensor) -> Tensor:
        return decoder(encoder(pixels.to(dtype))).float()

    quality: dict[str, Any] = {
        f"clips_{side}": measure_clips(reconstruct, side, count, device) for side in sides
    }
    images = Scenes.draw(count, seed=6000, device=device, held_out=True).video(sides[0], 1)
    ratios = torch.cat([psnr(reconstruct(chunk), chunk) for chunk in torch.split(images, _CHUNK)])
    quality[f"images_{sides[0]}"] = {
        "psnr_db": round(ratios.mean().item(), 2),
        "worst_psnr_db": round(ratios.min().item(), 2),
    }
    return quality
