"""Trains the video encoder and decoder together, on crops full of edges and on clips of the world.

Legend: B clips, C latent channels, F frames, H, W pixels.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.models.ltx2.video_vae import VideoDecoder, VideoEncoder
from diffsynth.models.ltx2.video_vae_config import VideoVAEConfig
from training.nano.clips import Scenes, dense_video
from training.nano.loop import Loop
from training.nano.muon import MuonAdamW, learning_rate_scale
from training.nano.results import write_network
from training.nano.video_quality import measure_video_vae, psnr

NAME = "video_vae"
_STATISTICS_SIDES = (128, 192, 256)


@dataclass(frozen=True, slots=True)
class Batch:
    """One kind of batch."""

    count: int
    num_frames: int
    height: int
    width: int
    side: int = 0
    """Of the clips of the world that these are crops of; 0 for crops full of edges."""
    framed: bool = False

    def draw(self, seed: int, device: torch.device | str) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1]."""
        random_ = torch.Generator().manual_seed(seed)
        if self.side:
            scenes = Scenes.draw(self.count, seed=seed, device=device, framed=self.framed)
            pixels = scenes.video(self.side, self.num_frames)
        else:
            square = max(self.height, self.width)
            pixels = dense_video(self.count, square, self.num_frames, seed=seed, device=device)
        top, left = (
            int(torch.randint(have - want + 1, (), generator=random_))
            for have, want in zip(pixels.shape[-2:], (self.height, self.width), strict=True)
        )
        return pixels[..., top : top + self.height, left : left + self.width]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the training; its batches take turns."""

    until: float
    """Share of all steps."""
    batches: tuple[Batch, ...]


PHASES = (
    Phase(0.15, (Batch(96, 9, 64, 64), Batch(512, 1, 64, 64), Batch(96, 9, 64, 64), Batch(40, 17, 64, 96))),
    Phase(
        0.5,
        (
            Batch(32, 9, 128, 128),
            Batch(12, 25, 128, 128, side=128),
            Batch(80, 9, 96, 64),
            Batch(256, 1, 128, 128),
            Batch(24, 17, 96, 128),
            Batch(18, 17, 128, 128, side=192),
        ),
    ),
    Phase(
        1.0,
        (
            Batch(3, 25, 256, 256, side=256),
            Batch(18, 17, 128, 128),
            Batch(12, 25, 128, 128, side=128),
            Batch(12, 9, 192, 256),
            Batch(5, 25, 192, 192, side=192),
            Batch(80, 1, 256, 256),
            Batch(8, 9, 256, 256, side=256, framed=True),
            Batch(12, 25, 128, 128, side=256),
        ),
    ),
)
"""About 5 million pixels in every batch, counting all frames: 1.2e12 operations for a step of the default
sizes, so that a large device has as much to compute as to launch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoVAESettings:
    """Sizes and training of the video VAE."""

    latent_channels: int = 64
    encoder_layers: tuple[int, int, int, int, int] = (1, 1, 1, 2, 0)
    """Residual blocks before each of the four reductions, and after the last."""
    encoder_multipliers: tuple[int, int, int, int] = (1, 1, 1, 2)
    decoder_base_channels: int = 8
    """An eighth of the width next to the latent."""
    decoder_layers: tuple[int, int, int, int] = (1, 2, 2, 3)
    """Residual blocks before each of the three enlargements, and after the last; from latent to pixels."""
    decoder_multipliers: tuple[int, int, int] = (2, 1, 1)
    phases: tuple[Phase, ...] = PHASES
    steps: int | None = None
    """None: as many as ``minutes`` allow, by the time that the batches take."""
    minutes: float = 8.0
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.02
    warm_up: int = 50
    floor: float = 0.02
    """Of the learning rate, as a share, at the end."""
    noise: float = 0.15
    """Standard deviation of what is added to the latent, whose own is about 1."""
    l1_weight: float = 0.5
    latent_penalty: float = 1e-3
    edge_weight: float = 0.3
    edges_from: float = 0.3
    """Share of the steps after which the differences of neighbouring pixels count."""
    statistics_clips: int = 192
    """For the statistics of the latent, at each of three sides."""
    judged_clips: int = 64
    judged_sides: tuple[int, ...] = (256, 192, 128)
    """Of the clips; the first is that of the single images too."""
    report_s: float = 20.0
    report_sides: tuple[int, ...] = (256, 128)
    seed: int = 0


def config_section(settings: VideoVAESettings) -> dict[str, Any]:
    """The section ``vae`` of the checkpoint's metadata, as the released files have it."""
    reductions = ("compress_space_res", "compress_time_res", "compress_all_res", "compress_all_res")
    encoder: list[Any] = []
    for index, layers in enumerate(settings.encoder_layers):
        if layers:
            encoder.append(["res_x", {"num_layers": layers}])
        if index < len(reductions):
            encoder.append([reductions[index], {"multiplier": settings.encoder_multipliers[index]}])
    decoder: list[Any] = []
    for index, layers in enumerate(settings.decoder_layers):
        if layers:
            decoder.append(["res_x", {"inject_noise": False, "num_layers": layers}])
        if index < len(settings.decoder_multipliers):
            multiplier = settings.decoder_multipliers[index]
            decoder.append(["compress_all", {"multiplier": multiplier, "residual": True}])
    return {
        "_class_name": "CausalVideoAutoencoder",
        "causal_decoder": False,
        "decoder_base_channels": settings.decoder_base_channels,
        "decoder_blocks": decoder[::-1],
        "dims": 3,
        "encoder_base_channels": settings.latent_channels,
        "encoder_blocks": encoder,
        "in_channels": 3,
        "latent_channels": settings.latent_channels,
        "latent_log_var": "uniform",
        "norm_layer": "pixel_norm",
        "normalize_latent_channels": False,
        "out_channels": 3,
        "patch_size": 4,
        "scaling_factor": 1.0,
        "timestep_conditioning": False,
        "use_quant_conv": False,
    }


class VideoVAE(nn.Module):
    """Encoder and decoder together."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)

    def forward(self, pixels: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """(B, 3, F, H, W), any float dtype -> the same clip again, and its latent, both float32.

        ``noise`` is the standard deviation of what the decoder gets on top of the latent.
        """
        latent = self.encoder(pixels.to(self.encoder.conv_in.conv.weight.dtype))
        noisy = latent + noise * torch.randn_like(latent) if noise else latent
        return self.decoder(noisy).float(), latent.float()


def loss_of(vae: VideoVAE, pixels: Tensor, settings: VideoVAESettings, *, edges: bool) -> Tensor:
    """Squares and magnitudes of the error, of its differences between neighbours, and of the latent."""
    again, latent = vae(pixels, settings.noise)
    error = again - pixels
    loss = error.square().mean() + settings.l1_weight * error.abs().mean()
    if edges:
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + settings.edge_weight * slopes
    return loss + settings.latent_penalty * latent.square().mean()


def train(settings: VideoVAESettings, folder: Path, device: str) -> dict[str, Any]:
    """Train, measure, write ``folder/video_vae.safetensors`` and ``folder/video_vae.json``.

    On CUDA the networks train in bfloat16, as they will be used, beside float32 masters.

    Returns:
        The measured quality of the weights as they are stored.
    """
    begun = time.monotonic()
    torch.manual_seed(settings.seed)
    section = config_section(settings)
    vae = VideoVAE(VideoVAEConfig.from_sections({"vae": section})).to(device)
    if torch.device(device).type == "cuda":
        vae = vae.bfloat16()
    halves = [sum(p.numel() for p in half.parameters()) for half in (vae.encoder, vae.decoder)]
    print(f"{NAME}: encoder {halves[0]:,} parameters, decoder {halves[1]:,}", flush=True)
    state = folder / "partial" / f"{NAME}.pt"
    _optimize(vae, settings, state, device)
    vae.eval().requires_grad_(False)
    store_statistics(vae, settings, device)
    dtype = next(vae.parameters()).dtype
    vae.bfloat16().to(dtype)  # measured as it will be loaded
    quality = measure_video_vae(
        vae.encoder, vae.decoder, settings.judged_sides, settings.judged_clips, device
    )
    print(f"{NAME} {quality}", flush=True)
    notes = {"settings": asdict(settings), "quality": quality, "seconds": round(time.monotonic() - begun)}
    write_network(folder, NAME, [vae.encoder, vae.decoder], section, notes, section_name="vae")
    state.unlink(missing_ok=True)
    return quality


def _optimize(vae: VideoVAE, settings: VideoVAESettings, state: Path, device: str) -> None:
    _choose_layout(vae, settings, device)
    optimizer = MuonAdamW(
        vae.named_parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adamw_names=["conv_out"],
    )

    def loss_at(step: int, steps: int) -> Tensor:
        batch = _batch_at(settings.phases, step, steps)
        pixels = batch.draw((settings.seed << 32) + step, device)
        return loss_of(vae, pixels, settings, edges=step >= settings.edges_from * steps)

    def schedule(step: int, steps: int) -> float:
        return learning_rate_scale(step, steps, warm_up=settings.warm_up, floor=settings.floor)

    loop = Loop(
        name=NAME,
        steps=_plan(vae, optimizer, settings, device),
        schedule=schedule,
        state=state,
        report=_report(vae, settings.report_sides, device),
        report_s=settings.report_s,
    )
    loop.run(optimizer, loss_at)


@torch.no_grad()
def store_statistics(vae: VideoVAE, settings: VideoVAESettings, device: str) -> None:
    """Measure mean and deviation of every latent channel over clips of the world, and use them from now on.

    Until then the networks must have those they begin with, 0 and 1.
    """
    moments, count = torch.zeros(2, settings.latent_channels, dtype=torch.float64, device=device), 0
    for side in _STATISTICS_SIDES:
        for first in range(0, settings.statistics_clips, 8):
            clips = min(8, settings.statistics_clips - first)
            scenes = Scenes.draw(clips, seed=(1 << 40) + side + first, device=device)
            pixels = scenes.video(side)
            latent = vae.encoder(pixels.to(vae.encoder.conv_in.conv.weight.dtype)).double()
            moments += torch.stack((latent, latent.square())).sum((1, 3, 4, 5))
            count += latent[:, 0].numel()
    mean, squares = moments / count
    # What varies less than the noise of the training carries nothing, and is not blown up to deviation 1.
    std = (squares - mean.square()).clamp(min=settings.noise**2).sqrt()
    for half in (vae.encoder, vae.decoder):
        half.per_channel_statistics.get_buffer("mean-of-means").copy_(mean)
        half.per_channel_statistics.get_buffer("std-of-means").copy_(std)
    print(f"{NAME}: latent deviations {std.min():.2f} to {std.max():.2f}, means to {mean.abs().max():.2f}")


def _batch_at(phases: tuple[Phase, ...], step: int, steps: int) -> Batch:
    phase = next(phase for phase in phases if step < phase.until * steps or phase is phases[-1])
    return phase.batches[step % len(phase.batches)]


def _report(vae: VideoVAE, sides: tuple[int, ...], device: str) -> Callable[[], str]:
    """What is told about clips that no training sees: 4 clips at each side, and 16 images at the first."""
    clips = {
        f"clips of {side} px": Scenes.draw(4, seed=7, device=device, held_out=True).video(side)
        for side in sides
    }
    images = Scenes.draw(16, seed=8, device=device, held_out=True).video(sides[0], 1)
    shown = {**clips, f"images of {sides[0]} px": images}

    @torch.no_grad()
    def report() -> str:
        found = {name: psnr(vae(pixels)[0], pixels).mean() for name, pixels in shown.items()}
        return ", ".join(f"{name} {value:.2f} dB" for name, value in found.items())

    return report


def _choose_layout(vae: VideoVAE, settings: VideoVAESettings, device: str) -> None:
    """Take the layout in memory that is faster on CUDA; before anything refers to the parameters."""
    if torch.device(device).type != "cuda":
        return
    trial = settings.phases[-1].batches[0]
    taken = {}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        _lay_out(vae, layout)
        taken[layout] = _time_batch(vae, trial, settings, device, vae.zero_grad)
    _lay_out(vae, min(taken, key=lambda layout: taken[layout]))
    print(f"{NAME}: {', '.join(f'{k} {v:.1f} ms' for k, v in taken.items())}", flush=True)


def _plan(vae: VideoVAE, optimizer: MuonAdamW, settings: VideoVAESettings, device: str) -> int:
    """Time every kind of batch on CUDA, and say how many steps there will be."""
    if torch.device(device).type != "cuda":
        if settings.steps is None:
            raise ValueError("the number of steps is planned on CUDA alone; elsewhere it must be given")
        return settings.steps
    mean, start = 0.0, 0.0
    for phase in settings.phases:
        # Steps of length zero: they take their time and change nothing.
        times = [
            _time_batch(vae, batch, settings, device, lambda: optimizer.step(0.0)) for batch in phase.batches
        ]
        mean += (phase.until - start) * sum(times) / len(times)
        start = phase.until
        print(f"{NAME}: until {phase.until}: {', '.join(f'{t:.0f}' for t in times)} ms", flush=True)
    steps = settings.steps or max(1, int(settings.minutes * 60_000 / mean))
    print(f"{NAME}: {mean:.1f} ms/step, {steps} steps, about {steps * mean / 60_000:.1f} minutes", flush=True)
    return steps


def _lay_out(vae: VideoVAE, layout: torch.memory_format) -> None:
    """The kernels decide on the layout of all activations."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _time_batch(
    vae: VideoVAE, batch: Batch, settings: VideoVAESettings, device: str, finish: Callable[[], None]
) -> float:
    """Milliseconds of drawing a batch, of its gradients and of what ``finish`` does with them."""
    repeats, begun = 4, 0.0
    for index in range(repeats + 2):
        if index == 2:  # the first choose the kernels
            torch.cuda.synchronize()
            begun = time.monotonic()
        torch.autograd.backward(loss_of(vae, batch.draw(index, device), settings, edges=True))
        finish()
    torch.cuda.synchronize()
    return 1000 * (time.monotonic() - begun) / repeats
