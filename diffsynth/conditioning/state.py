"""The state of one modality while it is denoised: tokens, masks and positions."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from diffsynth.conditioning.tokens import audio_positions, patchify, unpatchify, video_positions
from diffsynth.errors import RequestError
from diffsynth.sampling.conventions import FrozenSigma


def uniform_mask(value: float, tokens: Tensor) -> Tensor:
    """One mask value for all ``tokens`` (B, T, C): (B, T, 1) float32, expanded from a single number."""
    return torch.full((1, 1, 1), value, device=tokens.device).expand(*tokens.shape[:2], 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModalityState:
    """Tokens of one stream: the T0 target tokens first, then what conditionings appended, in their order.

    Nothing is changed in place: every method returns a new state, tensors may be shared between states.

    Attributes:
        latent: (B, T, C) current noisy tokens, any float dtype.
        clean: (B, T, C) tokens to keep where the mask says so; elsewhere zeros or the initial latent.
        mask: (B, T, 1) float32, 1 = generate, 0 = keep, in between = partly.  A mask of one value for all
            tokens is an expanded tensor, so the network sees without a look at the data that they agree.
        positions: (B, 3, T, 2) video or (B, 1, T, 2) audio, float32 intervals (seconds; pixels).
        target_shape: of the latent that is generated: (B, C, F, H, W) video, (B, C, T0, M) audio.
        fps: frames per second of the target video; None for audio.
        attention: (B, T, T) float32 in [0, 1], weight of a row attending to a column; None = all 1.
        frozen: the whole stream is given, nothing of it is generated.
    """

    latent: Tensor
    clean: Tensor
    mask: Tensor
    positions: Tensor
    target_shape: tuple[int, ...]
    fps: float | None = None
    attention: Tensor | None = None
    frozen: bool = False

    @classmethod
    def video(
        cls,
        shape: tuple[int, int, int, int, int],
        fps: float,
        *,
        latent: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A video stream to be generated.

        Args:
            shape: (B, C, F, H, W) of the latent.
            fps: frames per second of the video; scales the times.
            latent: initial latent of that shape, None for zeros.

        Raises:
            RequestError: an empty target, or an initial latent of another shape.
        """
        positions = video_positions(shape[2:], fps, batch=shape[0])
        return cls._initial(shape, positions, fps, latent, dtype, device)

    @classmethod
    def audio(
        cls,
        shape: tuple[int, int, int, int],
        *,
        latent: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """An audio stream to be generated; ``shape`` (B, C, T0, M), otherwise as :meth:`video`."""
        positions = audio_positions(shape[2], batch=shape[0])
        return cls._initial(shape, positions, None, latent, dtype, device)

    @classmethod
    def _initial(
        cls,
        shape: tuple[int, ...],
        positions: Tensor,
        fps: float | None,
        latent: Tensor | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Self:
        if min(shape) < 1:
            raise RequestError(
                f"the target latent would have shape {tuple(shape)}", hint="a longer or larger generation"
            )
        if latent is not None and tuple(latent.shape) != tuple(shape):
            raise RequestError(
                f"the initial latent has shape {tuple(latent.shape)}, the target {tuple(shape)}",
                hint="encode it at the size, length and frame rate of this generation",
            )
        given = torch.zeros(shape, dtype=dtype, device=device) if latent is None else latent
        tokens = patchify(given).to(device=device, dtype=dtype)
        return cls(
            latent=tokens,
            clean=tokens,
            mask=uniform_mask(1.0, tokens),
            positions=positions.to(device),
            target_shape=tuple(shape),
            fps=fps,
        )

    @property
    def is_video(self) -> bool:
        """Whether this is the video stream."""
        return len(self.target_shape) == 5

    @property
    def target_tokens(self) -> int:
        """T0, the number of tokens that are decoded in the end."""
        return math.prod(self.target_shape[2:]) if self.is_video else self.target_shape[2]

    @property
    def num_tokens(self) -> int:
        """T, appended tokens included."""
        return self.latent.shape[1]

    def timesteps(self, sigma: float) -> Tensor:
        """Noise level of every token, ``mask * sigma``: (B, T, 1) float32, expanded where the mask is."""
        if self.mask.stride(0) == self.mask.stride(1) == 0:
            return (self.mask[:1, :1] * sigma).expand_as(self.mask)
        return self.mask * sigma

    def sigma_shown(self, sigma: float, rule: FrozenSigma = FrozenSigma.ZERO) -> float:
        """The stream's own sigma for the network, which differs from the loop's for a frozen stream only."""
        return 0.0 if self.frozen and rule is FrozenSigma.ZERO else sigma

    def with_latent(self, latent: Tensor) -> Self:
        """The same state with other noisy tokens (B, T, C)."""
        return replace(self, latent=latent)

    def patchified(self, latent: Tensor) -> Tensor:
        """A latent of ``target_shape`` (or a mask of one channel) as tokens (B, T0, C)."""
        return patchify(latent)

    def unpatchified(self) -> Tensor:
        """The target tokens of ``latent`` as a latent of ``target_shape``; appended ones are left out."""
        return unpatchify(self.latent[:, : self.target_tokens], self.target_shape)

    def appended(self, latent: Tensor, clean: Tensor, positions: Tensor, mask_value: float) -> Self:
        """The state with N more tokens at the end.

        Args:
            latent, clean: (B, N, C).
            positions: (B, axes, N, 2).
            mask_value: mask of the new tokens.  If there is an attention mask, they enter it with weight 1.
        """
        count = clean.shape[1]
        mask = self.mask.new_full((self.mask.shape[0], count, 1), mask_value)
        return replace(
            self,
            latent=torch.cat([self.latent, latent.to(self.latent)], dim=1),
            clean=torch.cat([self.clean, clean.to(self.clean)], dim=1),
            mask=torch.cat([self.mask, mask], dim=1),
            positions=torch.cat([self.positions, positions.to(self.positions)], dim=2),
            attention=None if self.attention is None else self.extended_attention(count, 1.0),
        )

    def extended_attention(self, count: int, weight: float | Tensor) -> Tensor:
        """The attention mask for ``count`` tokens more than the state has.

        New tokens see each other fully and the target with ``weight``, as the target sees them; they never
        see tokens appended earlier, nor these them.

        Args:
            weight: in [0, 1], one value or (B, count).

        Returns:
            (B, T + count, T + count) float32.
        """
        before, target = self.num_tokens, self.target_tokens
        attention = self.mask.new_zeros(self.mask.shape[0], before + count, before + count)
        attention[:, :before, :before] = 1.0 if self.attention is None else self.attention
        attention[:, before:, before:] = 1.0
        per_token = torch.as_tensor(weight, dtype=attention.dtype, device=attention.device)
        per_token = per_token.expand(attention.shape[0], count)
        attention[:, before:, :target] = per_token[:, :, None]
        attention[:, :target, before:] = per_token[:, None, :]
        return attention

    def cleared(self) -> Self:
        """The end of a stage: only the target tokens, all to be generated, without an attention mask."""
        count = self.target_tokens
        return replace(
            self,
            latent=self.latent[:, :count],
            clean=self.clean[:, :count],
            mask=uniform_mask(1.0, self.latent[:, :count]),
            positions=self.positions[:, :, :count],
            attention=None,
            frozen=False,
        )
