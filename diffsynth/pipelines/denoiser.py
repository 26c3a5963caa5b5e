"""From two noisy states to two guided estimates: the door between the samplers and the transformer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.text import PromptContext
from diffsynth.models.ltx2.streams import CrossTimestep, Modality, Pass, Perturbation, SkipKind
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.request import GuidanceParams
from diffsynth.sampling.conventions import Conventions
from diffsynth.sampling.guidance import PassKind, combine, guidance_passes, skips_step
from diffsynth.sampling.steps import x0_from_velocity

_ISOLATED = (Perturbation(SkipKind.A2V_CROSS_ATTN), Perturbation(SkipKind.V2A_CROSS_ATTN))


@dataclass(kw_only=True)
class Denoiser:
    """Callable as the samplers want it: (video, audio, sigma, step) -> x0 of both, before the mask blend.

    All guidance passes of a step go through the transformer in one traversal of its blocks.

    Attributes:
        positive, negative: contexts of the prompt; ``negative`` may be None when no pass needs it.
        dtype: what the network computes in; the states keep their own dtype.
        positive_only: streams that have no negative context while they are frozen and unguided, as the sound
            of an official audio-to-video run.
        chunk_tokens: tokens that a feed-forward handles at once.
        estimates: x0 by stream of the step before, for streams that sit a step out.
    """

    transformer: LTX2Transformer
    positive: PromptContext
    negative: PromptContext | None
    video_guidance: GuidanceParams
    audio_guidance: GuidanceParams
    conventions: Conventions
    dtype: torch.dtype
    positive_only: frozenset[str] = frozenset()
    chunk_tokens: int | None = None
    estimates: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(
        self, video: ModalityState | None, audio: ModalityState | None, sigma: float, step: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Guided x0 (B, T, C) of the states that are there, in their dtype."""
        states = {name: state for name, state in (("video", video), ("audio", audio)) if state is not None}
        guidance = {"video": self.video_guidance, "audio": self.audio_guidance}
        skipped = {n for n in states if n in self.estimates and skips_step(step, guidance[n].skip_step)}
        estimates = {name: self.estimates[name] for name in skipped}
        awake = {name: params for name, params in guidance.items() if name in states.keys() - skipped}
        if awake:
            kinds = guidance_passes(awake.get("video"), awake.get("audio"))
            streams = {name: self._stream(name, state, sigma) for name, state in states.items()}
            unguided = {n for n, state in states.items() if state.frozen and guidance[n].cfg_scale == 1}
            positive_only = unguided & self.positive_only
            passes = [self._pass(kind, streams, positive_only, skipped) for kind in kinds]
            velocities = self.transformer.forward_passes(
                passes,
                cross_timestep=CrossTimestep(self.conventions.cross_timestep),
                chunk_tokens=self.chunk_tokens,
            )
            for name in awake:
                x0s = {
                    kind: _x0(states[name], velocity[0 if name == "video" else 1], sigma)
                    for kind, velocity in zip(kinds, velocities, strict=True)
                }
                estimates[name] = combine(guidance[name], x0s)
        self.estimates = estimates
        return estimates.get("video"), estimates.get("audio")

    def _stream(self, name: str, state: ModalityState, sigma: float) -> Modality:
        """The stream of the conditional pass; the other passes differ from it in context only."""
        shown = state.sigma_shown(sigma, self.conventions.frozen_sigma)
        latent = state.latent.to(self.dtype)
        return Modality(
            latent=latent,
            sigma=torch.full((latent.shape[0],), shown, device=latent.device),
            timesteps=state.timesteps(sigma),
            positions=state.positions,
            context=_context(self.positive, name),
            attention_mask=state.attention,
        )

    def _pass(
        self, kind: PassKind, streams: Mapping[str, Modality], positive_only: set[str], skipped: set[str]
    ) -> Pass:
        """One guidance pass; some streams keep the positive context in the unconditional one."""
        perturbations: tuple[Perturbation, ...] = ()
        if kind is PassKind.PERTURBED:
            perturbations = tuple(
                Perturbation(skip, params.stg_blocks)
                for skip, params in (
                    (SkipKind.VIDEO_SELF_ATTN, self.video_guidance),
                    (SkipKind.AUDIO_SELF_ATTN, self.audio_guidance),
                )
                if params.stg_scale != 0
            )
        elif kind is PassKind.ISOLATED:
            perturbations = _ISOLATED
        own: dict[str, Modality] = {}
        asleep = set() if kind is PassKind.UNCOND and self.conventions.skipped_in_uncond else skipped
        for name, stream in streams.items():
            context = stream.context
            if kind is PassKind.UNCOND and self.negative is not None and name not in positive_only:
                context = _context(self.negative, name)
            own[name] = replace(stream, context=context, enabled=name not in asleep)
        batch = next(iter(streams.values())).latent.shape[0]
        return Pass(
            video=own.get("video"),
            audio=own.get("audio"),
            perturbations=(perturbations,) * batch if perturbations else None,
        )


def _context(context: PromptContext, name: str) -> Tensor:
    return context.video if name == "video" else context.audio


def _x0(state: ModalityState, velocity: Tensor | None, sigma: float) -> Tensor:
    assert velocity is not None, "a stream that went in comes out"
    return x0_from_velocity(state.latent, velocity, state.timesteps(sigma))
