"""From clean samples to the pass of a training step and its loss.

B batch, T tokens, C channels.  Source: the flexible strategy of the official LTX-2 trainer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from diffsynth.conditioning.tokens import audio_positions, patchify, video_positions
from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.transformer import LTX2Transformer, Modality
from diffsynth.training.conditions import AUDIO, VIDEO, Condition, draw_mask
from diffsynth.training.objective import masked_loss, noisy, velocity
from diffsynth.training.samples import Sample
from diffsynth.training.sigmas import SigmaSampler

Source = Callable[[str], torch.Generator]
"""A generator on the CPU by the name of what is drawn."""


class Role(StrEnum):
    """What a modality is in training."""

    GENERATE = "generate"
    """Noised, predicted, in the loss."""
    GIVEN = "given"
    """Clean, at sigma 0, without loss; the other modality attends to it."""
    NONE = "none"
    """Not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyConfig:
    """What is learnt from what.

    Attributes:
        video, audio: one of :class:`Role` each.
        conditions: regions of a generated modality that are given.
    """

    video: str = Role.GENERATE
    audio: str = Role.GENERATE
    conditions: tuple[Condition, ...] = ()

    def check(self) -> None:
        """Make sure that something is learnt and that every condition has its modality.

        Raises:
            RequestError: naming what cannot work.
        """
        for name in (VIDEO, AUDIO):
            role = getattr(self, name)
            if role not in list(Role):
                raise RequestError(f"strategy {name}={role!r} is not known", hint=", ".join(Role))
        if Role.GENERATE not in (self.video, self.audio):
            raise RequestError("strategy: nothing is generated", hint='video = "generate"')
        for condition in self.conditions:
            condition.check()
            if getattr(self, condition.modality) != Role.GENERATE:
                raise RequestError(
                    f"condition {condition.type} is one of the {condition.modality}, which is not generated",
                    hint=f'{condition.modality} = "generate"',
                )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingStream:
    """One modality of a batch: what the network reads, and what it is compared with.

    Attributes:
        modality: input of the network.
        target: (B, T, C) velocity; None where nothing is generated.
        mask: (B, T, 1), 1 = generated.
        sigma: (B,) float32 noise level of the generated tokens, 0 for a given stream.
    """

    modality: Modality
    target: Tensor | None
    mask: Tensor
    sigma: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchLoss:
    """Losses of a batch: ``total`` is the mean over the samples of the sum over the modalities.

    ``video`` and ``audio`` are (B,) without gradient, with the sigmas they were taken at; None where the
    modality is not generated.
    """

    total: Tensor
    video: tuple[Tensor, Tensor] | None
    audio: tuple[Tensor, Tensor] | None


class Strategy:
    """Makes passes of batches by one configuration."""

    def __init__(
        self, config: StrategyConfig, sample_sigmas: SigmaSampler, *, shared_sigma: bool, dtype: torch.dtype
    ) -> None:
        """
        Args:
            config: checked.
            sample_sigmas: see :mod:`diffsynth.training.sigmas`.
            shared_sigma: audio has the noise level of the video.
            dtype: what the network computes in.
        """
        self.config = config
        self._sample_sigmas = sample_sigmas
        self._shared_sigma = shared_sigma
        self._dtype = dtype

    def streams(
        self, samples: Sequence[Sample], source: Source, device: torch.device
    ) -> tuple[TrainingStream | None, TrainingStream | None]:
        """Video and audio of a batch of samples of equal shapes; all draws are made on the CPU.

        Raises:
            CheckpointError: the samples lack a modality that is trained.
            RequestError: the conditions leave nothing of a clip.
        """
        video = audio = None
        if self.config.video != Role.NONE:
            latent = _stacked([s.video for s in samples], VIDEO)
            places = [video_positions(_grid(latent), s.fps) for s in samples]
            context = torch.cat([s.context.video for s in samples])
            video = self._stream(VIDEO, latent, torch.cat(places), context, source, None, device)
        if self.config.audio != Role.NONE:
            latent = _stacked([s.audio for s in samples], AUDIO)
            positions = audio_positions(latent.shape[2], batch=len(samples))
            context = torch.cat([s.context.audio for s in samples])
            generated = video is not None and video.target is not None
            shared = video.sigma.cpu() if video is not None and generated and self._shared_sigma else None
            audio = self._stream(AUDIO, latent, positions, context, source, shared, device)
        return video, audio

    def loss(
        self,
        network: LTX2Transformer,
        streams: tuple[TrainingStream | None, TrainingStream | None],
    ) -> BatchLoss:
        """One pass and its losses."""
        video, audio = streams
        predicted = network(
            None if video is None else video.modality, None if audio is None else audio.modality
        )
        losses = [_losses(stream, velocities) for stream, velocities in zip(streams, predicted, strict=True)]
        total = torch.stack([loss.mean() for loss in losses if loss is not None]).sum()
        return BatchLoss(
            total=total, video=_with_sigma(losses[0], video), audio=_with_sigma(losses[1], audio)
        )

    def _stream(
        self,
        name: str,
        latent: Tensor,
        positions: Tensor,
        context: Tensor,
        source: Source,
        shared_sigma: Tensor | None,
        device: torch.device,
    ) -> TrainingStream:
        clean = patchify(latent).float()
        batch, num_tokens = clean.shape[:2]
        if getattr(self.config, name) == Role.GENERATE:
            own = self._sample_sigmas(batch, num_tokens, source(f"{name} sigma"))
            sigma = own if shared_sigma is None else shared_sigma
            conditions = [c for c in self.config.conditions if c.modality == name]
            mask = draw_mask(conditions, latent.shape[1:], batch, source(f"{name} conditions"))
            noise = torch.randn(clean.shape, generator=source(f"{name} noise"))
            target = velocity(clean, noise).to(device)
        else:
            sigma, mask, noise, target = torch.zeros(batch), torch.zeros(1, 1, 1), clean, None
        timesteps = _timesteps(mask, sigma)
        modality = Modality(
            latent=noisy(clean, noise, timesteps).to(device=device, dtype=self._dtype),
            sigma=sigma.to(device),
            timesteps=timesteps.to(device),
            positions=positions.to(device),
            context=context.to(device=device, dtype=self._dtype),
        )
        return TrainingStream(modality=modality, target=target, mask=mask.to(device), sigma=sigma.to(device))


def _timesteps(mask: Tensor, sigma: Tensor) -> Tensor:
    """(B, T, 1); (B, 1, 1) where all tokens of a sample agree, which the network sees without a look."""
    if mask.shape[1] == 1 or mask.stride(1) == 0:
        mask = mask[:, :1]
    return mask * sigma[:, None, None]


def _losses(stream: TrainingStream | None, predicted: Tensor | None) -> Tensor | None:
    if stream is None or stream.target is None:
        return None
    assert predicted is not None, "a stream with tokens has velocities"
    return masked_loss(predicted, stream.target, stream.mask)


def _with_sigma(losses: Tensor | None, stream: TrainingStream | None) -> tuple[Tensor, Tensor] | None:
    return None if losses is None or stream is None else (losses.detach(), stream.sigma)


def _stacked(latents: Sequence[Tensor | None], name: str) -> Tensor:
    there = [latent for latent in latents if latent is not None]
    if len(there) < len(latents):
        raise CheckpointError(
            f"the samples hold no {name}, which the strategy trains on",
            hint=f'{name} = "none", or `diffsynth preprocess` clips that have it',
        )
    return torch.cat(there)


def _grid(latent: Tensor) -> tuple[int, int, int]:
    frames, rows, columns = latent.shape[2:]
    return frames, rows, columns
