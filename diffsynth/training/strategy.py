"""From clean samples to the pass of a training step and its loss.

B batch, T tokens, C channels.  Source: the flexible strategy of the official LTX-2 trainer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from diffsynth.conditioning.tokens import audio_positions, patchify, reference_positions, video_positions
from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.transformer import LTX2Transformer, Modality
from diffsynth.training.conditions import AUDIO, VIDEO, Condition, ConditionType, draw_mask
from diffsynth.training.objective import masked_loss, noisy, velocity
from diffsynth.training.samples import Sample, SampleEntry
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
        reference_probability: of a batch having its reference clips, which are given beside the video
            (IC-LoRA).
        audio_reference_probability: the same for its reference sounds, beside the sound; drawn for itself.
    """

    video: str = Role.GENERATE
    audio: str = Role.GENERATE
    conditions: tuple[Condition, ...] = ()
    reference_probability: float = 0.0
    audio_reference_probability: float = 0.0

    def check(self) -> None:
        """Make sure that something is learnt and that every condition has its modality.

        Raises:
            RequestError: naming what cannot work.
        """
        for name in (VIDEO, AUDIO):
            role = getattr(self, name)
            if role not in list(Role):
                raise RequestError(f"{name}={role!r} is not known", hint=", ".join(Role))
        if Role.GENERATE not in (self.video, self.audio):
            raise RequestError("nothing is generated", hint='video = "generate"')
        for name, prefix in ((VIDEO, ""), (AUDIO, "audio_")):
            probability = getattr(self, f"{prefix}reference_probability")
            if not 0 <= probability <= 1:
                raise RequestError(
                    f"{prefix}reference_probability={probability}", hint="a number from 0 to 1"
                )
            if probability and getattr(self, name) != Role.GENERATE:
                raise RequestError(
                    f"{prefix}reference_probability for {name} that is not generated",
                    hint=f'{name} = "generate"',
                )
        for condition in self.conditions:
            condition.check()
            if getattr(self, condition.modality) != Role.GENERATE:
                raise RequestError(
                    f"condition {condition.type} is one of the {condition.modality}, which is not generated",
                    hint=f'{condition.modality} = "generate"',
                )


def check_samples(config: StrategyConfig, entries: Sequence[SampleEntry]) -> None:
    """Make sure, before any step, that every sample has what the strategy wants of it.

    Raises:
        CheckpointError: it names the first clip without, and how samples get it.
    """
    masked = {c.modality for c in config.conditions if c.type == ConditionType.MASK and c.probability}
    wanted = {
        "video_shape": (config.video != Role.NONE, "pictures", "video = true in [data]"),
        "audio_shape": (config.audio != Role.NONE, "sound", "audio = true in [data]"),
        "reference_shape": (config.reference_probability, "reference clip", "reference_scale in [data]"),
        "audio_reference_shape": (
            config.audio_reference_probability,
            "reference sound",
            "audio_reference = true in [data]",
        ),
        "video_mask_shape": (VIDEO in masked, "mask of the video", "a column video_mask"),
        "audio_mask_shape": (AUDIO in masked, "mask of the audio", "a column audio_mask"),
    }
    for name, (needed, what, hint) in wanted.items():
        missing = [entry.source for entry in entries if needed and getattr(entry, name) is None]
        if missing:
            raise CheckpointError(
                f"{missing[0]} has no {what}, which the strategy trains on", hint=f"preprocess with {hint}"
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
            video = self._stream(VIDEO, samples, latent, torch.cat(places), context, source, None, device)
            if self._draws(source("reference"), self.config.reference_probability):
                video = _with_reference(video, samples)
        if self.config.audio != Role.NONE:
            latent = _stacked([s.audio for s in samples], AUDIO)
            positions = audio_positions(latent.shape[2], batch=len(samples))
            context = torch.cat([s.context.audio for s in samples])
            generated = video is not None and video.target is not None
            shared = video.sigma.cpu() if video is not None and generated and self._shared_sigma else None
            audio = self._stream(AUDIO, samples, latent, positions, context, source, shared, device)
            if self._draws(source("audio reference"), self.config.audio_reference_probability):
                audio = _with_audio_reference(audio, samples)
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

    @staticmethod
    def _draws(generator: torch.Generator, probability: float) -> bool:
        """One draw for the whole batch."""
        return bool(torch.rand(1, generator=generator) < probability)

    def _stream(
        self,
        name: str,
        samples: Sequence[Sample],
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
            masks = _masks(samples, name) if any(c.type == ConditionType.MASK for c in conditions) else None
            mask = draw_mask(conditions, latent.shape[1:], batch, source(f"{name} conditions"), masks)
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


def reference_factors(video_shape: Sequence[int], reference_shape: Sequence[int]) -> tuple[int, int]:
    """Size of a video / size of its reference, and frames alike, from the shapes (C, F, H, W) of latents.

    The first latent frame is one frame of the clip and does not count.

    Raises:
        CheckpointError: not whole numbers.
    """
    size = video_shape[2] // reference_shape[2]
    time = max(1, (video_shape[1] - 1) // max(1, reference_shape[1] - 1))
    spanned = [(reference_shape[1] - 1) * time + 1, *(n * size for n in reference_shape[2:])]
    if spanned != list(video_shape[1:]):
        raise CheckpointError(
            f"a reference of {tuple(reference_shape)} for a video of {tuple(video_shape)}",
            hint="`diffsynth preprocess` with reference_scale and reference_temporal_scale",
        )
    return size, time


def _with_reference(stream: TrainingStream, samples: Sequence[Sample]) -> TrainingStream:
    """The stream with the clean tokens of the reference clips in front."""
    latent = _stacked([s.reference for s in samples], "reference clip")
    video = next(s.video for s in samples if s.video is not None)
    size, time = reference_factors(video.shape[1:], latent.shape[1:])
    places = [
        reference_positions(_grid(latent), s.fps, downscale_factor=size, temporal_scale_factor=time)
        for s in samples
    ]
    return _in_front(stream, latent, torch.cat(places))


def _with_audio_reference(stream: TrainingStream, samples: Sequence[Sample]) -> TrainingStream:
    """The stream with the clean tokens of the reference sounds in front: they begin with the clip."""
    latent = _stacked([s.audio_reference for s in samples], "reference sound")
    return _in_front(stream, latent, audio_positions(latent.shape[2], batch=len(samples)))


def _in_front(stream: TrainingStream, latent: Tensor, places: Tensor) -> TrainingStream:
    """The stream with the tokens of another latent before its own: clean, at sigma 0, without loss."""
    assert stream.target is not None, "references come with a modality that is generated"
    modality = stream.modality
    clean = patchify(latent).to(modality.latent)
    batch, count = clean.shape[:2]

    def before(value: Tensor, tokens: int) -> Tensor:
        """Per-token values (B or 1, T or 1, n) with zeros for the reference."""
        width = value.shape[-1]
        return torch.cat([value.new_zeros(batch, count, width), value.expand(batch, tokens, width)], dim=1)

    num_tokens = modality.latent.shape[1]
    positions = torch.cat([places.to(modality.positions), modality.positions], dim=2)
    with_reference = replace(
        modality,
        latent=torch.cat([clean, modality.latent], dim=1),
        timesteps=before(modality.timesteps, num_tokens),
        positions=positions,
    )
    return replace(
        stream,
        modality=with_reference,
        target=before(stream.target, num_tokens),
        mask=before(stream.mask, num_tokens),
    )


def _masks(samples: Sequence[Sample], name: str) -> Tensor:
    """(B, tokens) bool, in the order of the tokens."""
    masks = [getattr(sample, f"{name}_mask") for sample in samples]
    return _stacked(masks, f"mask of the {name}").flatten(1)


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
            hint="`diffsynth preprocess` clips that have it, or another strategy",
        )
    return torch.cat(there)


def _grid(latent: Tensor) -> tuple[int, int, int]:
    frames, rows, columns = latent.shape[2:]
    return frames, rows, columns
