"""Noise: where it comes from, and how it enters the tokens of a modality."""

import secrets
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from diffsynth.errors import RequestError
from diffsynth.sampling.conventions import NoiserRule, NoiseRule
from diffsynth.sampling.steps import normalised_noise


class TokenState(Protocol):
    """What samplers need of one modality; ``diffsynth.conditioning.state.ModalityState`` is one."""

    @property
    def latent(self) -> Tensor:
        """Noisy tokens, (B, T, C)."""

    @property
    def clean(self) -> Tensor:
        """Tokens to keep where the mask says so, (B, T, C)."""

    @property
    def mask(self) -> Tensor:
        """(B, T, 1) float32, 1 = generate, 0 = keep."""

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Unpatchified shape of the tokens that are generated."""

    def with_latent(self, latent: Tensor) -> Self:
        """The same state with other noisy tokens."""

    def patchified(self, latent: Tensor) -> Tensor:
        """A latent of ``target_shape`` as tokens (B, T0, C)."""


StateT = TypeVar("StateT", bound=TokenState)


def resolve_seed(seed: int | None) -> int:
    """The seed itself, or a fresh random one for None: the caller reports it, so that a run can be repeated.

    Raises:
        RequestError: not a whole number of 64 bits.
    """
    if seed is None:
        return secrets.randbelow(2**32)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise RequestError(f"seed={seed!r} is not a whole number of 64 bits", hint="seed=43")
    return seed


class NoiseSource(Protocol):
    """Unit Gaussian noise for the states of one run, in the order in which it is asked for."""

    seed: int

    def draw(self, state: TokenState) -> Tensor:
        """Noise for every token of the state, appended ones included: (B, T, C), its dtype and device."""


class SharedNoise:
    """One generator for the whole run, as in the official pipelines.

    Tokens are drawn in their own layout and in the dtype of the latent (a generator gives other numbers in
    bfloat16).  Draw video first, then audio, in stage 2 again from the same object; frozen modalities too.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, state: TokenState) -> Tensor:
        """Noise of the shape of ``state.latent``; the generator moves on."""
        x = state.latent
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=self.generator.device)
        return noise.to(x.device)


class FreshNoise:
    """A new generator of the same seed for every tensor, as in DiffSynth: float32, unpatchified layout.

    Video and audio noise therefore begin with the same numbers, and stage 2 repeats the audio noise of
    stage 1.  Appended tokens take what follows the target in the same generator.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = torch.device(device)

    def draw(self, state: TokenState) -> Tensor:
        """The same noise for the same target shape, whatever was drawn before."""
        return _unpatchified_draw(torch.Generator(self.device).manual_seed(self.seed), state)


class RenewedNoise:
    """Noise that an ancestral sampler adds between steps: one generator, video and audio in turns.

    Drawn in float32 in the unpatchified layout, appended tokens after the target; its seed lies apart from
    that of the initial noise, which it would otherwise repeat.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        # Seeds are 64 bits wide; the largest ones wrap around.
        self.generator = torch.Generator(device).manual_seed((seed + 10000 + 2**63) % 2**64 - 2**63)

    def draw(self, state: TokenState) -> Tensor:
        """Noise for every token of the state, (B, T, C), its dtype and device."""
        return _unpatchified_draw(self.generator, state)

    def snapshot(self) -> Tensor:
        """The generator's state, for :meth:`restore`."""
        return self.generator.get_state()

    def restore(self, snapshot: Tensor) -> None:
        """Continue where :meth:`snapshot` was taken."""
        self.generator.set_state(snapshot)


def _unpatchified_draw(generator: torch.Generator, state: TokenState) -> Tensor:
    device = generator.device
    tokens = state.patchified(torch.randn(state.target_shape, generator=generator, device=device))
    batch, total, channels = state.latent.shape
    if total > tokens.shape[1]:
        shape = (batch, total - tokens.shape[1], channels)
        tokens = torch.cat([tokens, torch.randn(shape, generator=generator, device=device)], dim=1)
    return tokens.to(state.latent.dtype).to(state.latent.device)


def noise_source(rule: NoiseRule, seed: int, device: torch.device | str = "cpu") -> NoiseSource:
    """The noise source of a convention; ``device`` is where numbers are drawn (``rand_device``)."""
    return SharedNoise(seed, device) if rule is NoiseRule.SHARED else FreshNoise(seed, device)


def mix_noise(
    latent: Tensor,
    clean: Tensor,
    mask: Tensor,
    noise: Tensor,
    scale: float = 1.0,
    rule: NoiserRule = NoiserRule.TWO_LERPS,
) -> Tensor:
    """Bring tokens to the noise level ``scale`` where the mask lets noise in; see :class:`NoiserRule`.

    Args:
        latent, clean, noise: (B, T, C); latent is the initial one, zeros or the result of stage 1.
        mask: (B, T, 1) float32.
        scale: 1 for a fresh start, the first sigma of stage 2 (0.909375) for its start.

    Returns:
        (B, T, C) in the dtype of ``latent``, computed in float32.
    """
    x, n = latent.float(), noise.float()
    if rule is NoiserRule.ONE_LERP:
        weight = mask * scale
        return (n * weight + x * (1 - weight)).to(latent.dtype)
    noisy = n * scale + x * (1 - scale)
    if rule is NoiserRule.UNMASKED:
        return noisy.to(latent.dtype)
    return torch.lerp(clean.float(), noisy, mask.expand_as(noisy)).to(latent.dtype)


def add_noise(
    state: StateT, source: NoiseSource, scale: float = 1.0, rule: NoiserRule = NoiserRule.TWO_LERPS
) -> StateT:
    """The state with its tokens at the noise level ``scale``, after all conditionings have been applied."""
    noise = source.draw(state)
    return state.with_latent(mix_noise(state.latent, state.clean, state.mask, noise, scale, rule))


class SdeNoise:
    """The two noise streams of the res_2s sampler, one for substeps and one for steps.

    Their seeds do not depend on the user's: official pipelines leave them at -1 and 9999.  Numbers are drawn
    in float64 on the CPU by default, so they are the same wherever the run is.
    """

    def __init__(
        self,
        seed: int = -1,
        substep_seed: int | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.dtype = dtype
        self.step = torch.Generator(device).manual_seed(seed)
        self.substep = torch.Generator(device).manual_seed(
            seed + 10000 if substep_seed is None else substep_seed
        )

    def draw(self, generator: torch.Generator, like: Tensor) -> Tensor:
        """Normalised noise of the shape and on the device of ``like`` from ``step`` or ``substep``."""
        on_cpu = generator.device.type == "cpu"
        draw_dtype = torch.float64 if on_cpu else self.dtype
        noise = torch.randn(like.shape, generator=generator, dtype=draw_dtype, device=generator.device)
        return normalised_noise(noise).to(self.dtype).to(like.device)

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """Both generator states, for :meth:`restore`."""
        return self.step.get_state(), self.substep.get_state()

    def restore(self, snapshot: tuple[Tensor, Tensor]) -> None:
        """Continue where :meth:`snapshot` was taken."""
        self.step.set_state(snapshot[0])
        self.substep.set_state(snapshot[1])
