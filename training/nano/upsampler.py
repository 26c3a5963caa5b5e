"""Trains the latent upsampler: from the latent of a clip to that of the same clip at twice the side.

Legend: B clips, C latent channels, F frames.  Latents are normalised unless said otherwise.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from diffsynth.loader.key_names import NetworkKind
from diffsynth.loader.load import load_network
from diffsynth.loader.weight_files import WeightFiles
from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig, upsample_latent
from diffsynth.models.ltx2.video_vae import VideoDecoder, VideoEncoder
from training.nano import video_vae
from training.nano.clips import Scenes
from training.nano.loop import Loop
from training.nano.muon import MuonAdamW, learning_rate_scale
from training.nano.results import write_network
from training.nano.video_quality import measure_clips, psnr

NAME = "upsampler"
_CHUNK = 8


@dataclass(frozen=True, slots=True)
class Pool:
    """Pairs that are encoded once."""

    count: int
    side: int
    """Of the smaller clips."""
    num_frames: int = 25
    batch: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class UpsamplerSettings:
    """Sizes and training of the upsampler."""

    mid_channels: int = 64
    """Twice the groups of the norms: of a group of one channel the norm takes away the mean, and with it the
    colour of a plain ground."""
    num_blocks_per_stage: int = 0
    pools: tuple[Pool, ...] = (Pool(3072, 128), Pool(1024, 96), Pool(512, 128, num_frames=9))
    """They take turns."""
    steps: int = 4000
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.02
    warm_up: int = 50
    floor: float = 0.02
    noise: float = 0.05
    """Standard deviation of what is added to the smaller latent, which a model will not make perfect."""
    judged_clips: int = 64
    report_s: float = 10.0
    seed: int = 0


def config_section(settings: UpsamplerSettings, latent_channels: int) -> dict[str, Any]:
    """The metadata of the file, as the released spatial upsampler of LTX-2 has it."""
    return {
        "_class_name": "LatentUpsampler",
        "dims": 3,
        "in_channels": latent_channels,
        "mid_channels": settings.mid_channels,
        "num_blocks_per_stage": settings.num_blocks_per_stage,
        "rational_resampler": True,
        "spatial_scale": 2.0,
        "spatial_upsample": True,
        "temporal_upsample": False,
    }


def train(settings: UpsamplerSettings, folder: Path, device: str) -> dict[str, Any]:
    """Train, measure, write ``folder/upsampler.safetensors`` and ``folder/upsampler.json``.

    Needs ``folder/video_vae.safetensors``.  On CUDA all networks are bfloat16, as they will be used.

    Returns:
        The measured quality of the weights as they are stored.
    """
    begun = time.monotonic()
    torch.manual_seed(settings.seed)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    encoder, decoder = load_video_vae(folder, dtype, device)
    section = config_section(settings, encoder.config.latent_channels)
    upsampler = LatentUpsampler(UpsamplerConfig.from_sections(section)).to(device, dtype)
    print(f"{NAME}: {sum(p.numel() for p in upsampler.parameters()):,} parameters", flush=True)
    state = folder / "partial" / f"{NAME}.pt"
    _optimize(upsampler, encoder, decoder, settings, state, device)
    upsampler.requires_grad_(False)
    upsampler.bfloat16().to(dtype)  # measured as it will be loaded
    quality = measure(upsampler, encoder, decoder, settings, device)
    print(f"{NAME} {quality}", flush=True)
    notes = {"settings": asdict(settings), "quality": quality, "seconds": round(time.monotonic() - begun)}
    write_network(folder, NAME, [upsampler], section, notes, section_name="")
    state.unlink(missing_ok=True)
    return quality


def _optimize(
    upsampler: LatentUpsampler,
    encoder: VideoEncoder,
    decoder: VideoDecoder,
    settings: UpsamplerSettings,
    state: Path,
    device: str,
) -> None:
    pools = [_encode_pool(pool, encoder, index, device) for index, pool in enumerate(settings.pools)]
    print(f"{NAME}: pairs are encoded", flush=True)
    statistics = decoder.per_channel_statistics
    optimizer = MuonAdamW(
        upsampler.named_parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adamw_names=["final_conv"],
    )

    def loss_at(step: int, steps: int) -> Tensor:
        which = step % len(pools)
        small, large = pools[which]
        random_ = torch.Generator().manual_seed((settings.seed << 32) + step)
        chosen = torch.randint(len(small), (settings.pools[which].batch,), generator=random_).to(device)
        latent = small[chosen]
        latent = latent + settings.noise * torch.randn_like(latent)
        error = upsample_latent(upsampler, statistics, latent).float() - large[chosen].float()
        return error.square().mean()

    def schedule(step: int, steps: int) -> float:
        return learning_rate_scale(step, steps, warm_up=settings.warm_up, floor=settings.floor)

    loop = Loop(
        name=NAME,
        steps=settings.steps,
        schedule=schedule,
        state=state,
        report=_report(upsampler, encoder, decoder, settings.pools[0].side, device),
        report_s=settings.report_s,
    )
    loop.run(optimizer, loss_at)


def load_video_vae(folder: Path, dtype: torch.dtype, device: str) -> tuple[VideoEncoder, VideoDecoder]:
    """Both halves as the stage of the video VAE left them, without gradients."""
    files = WeightFiles(folder / f"{video_vae.NAME}.safetensors")
    encoder = load_network(NetworkKind.VIDEO_ENCODER, files, dtype=dtype, device=device)
    decoder = load_network(NetworkKind.VIDEO_DECODER, files, dtype=dtype, device=device)
    return cast(VideoEncoder, encoder), cast(VideoDecoder, decoder)


@torch.no_grad()
def measure(
    upsampler: LatentUpsampler,
    encoder: VideoEncoder,
    decoder: VideoDecoder,
    settings: UpsamplerSettings,
    device: str,
) -> dict[str, Any]:
    """Clips enlarged from half their side, against the clips themselves and against their reconstruction."""
    statistics, dtype = decoder.per_channel_statistics, encoder.conv_in.conv.weight.dtype
    found: dict[str, Any] = {}
    for side in sorted({pool.side for pool in settings.pools}):

        def enlarge(pixels: Tensor) -> Tensor:
            half = functional.interpolate(pixels, scale_factor=(1, 0.5, 0.5), mode="area")
            return decoder(upsample_latent(upsampler, statistics, encoder(half.to(dtype))))

        found[f"clips_{2 * side}"] = measure_clips(enlarge, 2 * side, settings.judged_clips, device)
        found[f"clips_{2 * side}"]["psnr_of_reconstruction_db"] = round(
            _against_reconstruction(upsampler, encoder, decoder, side, device), 2
        )
    return found


def _report(
    upsampler: LatentUpsampler, encoder: VideoEncoder, decoder: VideoDecoder, side: int, device: str
) -> Callable[[], str]:
    def report() -> str:
        ratio = _against_reconstruction(upsampler, encoder, decoder, side, device)
        return f"clips of {2 * side} px {ratio:.2f} dB of their reconstruction"

    return report


@torch.no_grad()
def _against_reconstruction(
    upsampler: LatentUpsampler, encoder: VideoEncoder, decoder: VideoDecoder, side: int, device: str
) -> float:
    """Mean dB over clips that no training sees."""
    scenes = Scenes.draw(_CHUNK, seed=7, device=device, held_out=True)
    dtype = encoder.conv_in.conv.weight.dtype
    small, large = (encoder(scenes.video(size).to(dtype)) for size in (side, 2 * side))
    enlarged = decoder(upsample_latent(upsampler, decoder.per_channel_statistics, small))
    return psnr(enlarged, decoder(large).float().clamp(-1, 1)).mean().item()


@torch.no_grad()
def _encode_pool(pool: Pool, encoder: VideoEncoder, index: int, device: str) -> tuple[Tensor, Tensor]:
    """(N, C, F', h, w) and (N, C, F', 2h, 2w)."""
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    dtype = encoder.conv_in.conv.weight.dtype
    for first in range(0, pool.count, _CHUNK):
        seed = (1 << 41) + (index << 20) + first
        scenes = Scenes.draw(min(_CHUNK, pool.count - first), seed=seed, device=device)
        for latents, side in zip(pairs, (pool.side, 2 * pool.side), strict=True):
            latents.append(encoder(scenes.video(side, pool.num_frames).to(dtype)))
    return torch.cat(pairs[0]), torch.cat(pairs[1])
