"""Feature extractor: the hidden states of the text model become one feature row per token and stream.

D text width (3840), L hidden states (49), n valid tokens of a prompt, O output width.

The checkpoint stores one linear layer over all hidden states of a token, D*L -> O, channel d of state l
in column d*L + l.  No statistic of the normalisation crosses states, so the product is a sum over them:
each state is normalised, multiplied with its [O, D] slice of the weight, added to a float32 accumulator and
forgotten.  Neither the stack of states nor the flattened [n, D*L] tensor ever exists.

Source: official ltx-core 1.0.0 (feature extractors of LTX-2 and LTX-2.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Slices = Callable[[int], Sequence[Tensor]]
"""Hidden state index -> the [O, D] slices of the projections for it, any float dtype and device."""

_EPS = 1e-6


class PromptFeatures(NamedTuple):
    """Features of one prompt's n valid tokens: video [n, Ov] and audio [n, Oa].  LTX-2 shares one tensor."""

    video: Tensor
    audio: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureExtractorConfig:
    """Sizes and form.  ``num_states`` stands in no metadata, only in the shape of the weight."""

    hidden_size: int
    num_states: int = 49
    separate: bool
    """True: one projection per stream and normalisation per token (LTX-2.3); False: one projection for both
    and normalisation over all tokens of a prompt (LTX-2)."""
    video_width: int
    audio_width: int


class FeatureExtractor(nn.Module):
    """``aggregate_embed`` of LTX-2, or ``video_aggregate_embed`` and ``audio_aggregate_embed`` of LTX-2.3."""

    def __init__(self, config: FeatureExtractorConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.hidden_size * config.num_states
        if config.separate:
            self.video_aggregate_embed = nn.Linear(inputs, config.video_width)
            self.audio_aggregate_embed = nn.Linear(inputs, config.audio_width)
        else:
            self.aggregate_embed = nn.Linear(inputs, config.video_width, bias=False)

    def projections(self) -> tuple[nn.Linear, ...]:
        """The projections in the order of all results: (shared,) or (video, audio)."""
        if self.config.separate:
            return self.video_aggregate_embed, self.audio_aggregate_embed
        return (self.aggregate_embed,)

    def rescale(self, projection: nn.Linear) -> float:
        """Factor between the normalised states and what the projection of LTX-2.3 was trained on."""
        if not self.config.separate:
            return 1.0
        return float((projection.out_features / self.config.hidden_size) ** 0.5)

    def slices(self, index: int) -> tuple[Tensor, ...]:
        """Slices [O, D] of the projections for hidden state ``index``: strided views where the weights lie.

        Every cache line of the weight holds columns of many states, so whoever streams them brings the weight
        into the order of :func:`by_state` once and hands its own slices to :meth:`begin`.
        """
        return tuple(p.weight[:, index :: self.config.num_states] for p in self.projections())

    def normalise(self, state: Tensor) -> Tensor:
        """Normalise one hidden state of one prompt, in float32 whatever comes in.

        LTX-2: 8 * (x - mean) / range over all tokens and channels.  LTX-2.3: RMS norm of each token.

        Args:
            state: [n, D], valid tokens only.

        Returns:
            [n, D] float32.
        """
        x = state.float()
        if self.config.separate:
            return functional.rms_norm(x, x.shape[-1:], eps=_EPS)
        if not x.numel():  # no token, no range: the context will be registers alone
            return x
        low, high = torch.aminmax(x)
        mean = x.sum() / (x.numel() + _EPS)
        # The mean leaves before the product: taken out of the sum afterwards, it would cancel badly.
        return (x - mean).mul_(8.0).div_(high - low + _EPS)

    def begin(self, num_prompts: int, *, slices: Slices | None = None) -> "FeatureAccumulator":
        """Start the features of ``num_prompts`` prompts; ``slices`` replaces :meth:`slices`."""
        return FeatureAccumulator(self, num_prompts, slices or self.slices)


def by_state(weight: Tensor, num_states: int) -> Tensor:
    """Reorder a projection weight [O, D*L] into [L, O, D], contiguous: one block per hidden state."""
    return weight.view(weight.shape[0], -1, num_states).permute(2, 0, 1).contiguous()


class FeatureAccumulator:
    """Running sums of some prompts.  :meth:`add` has the signature of the text model's ``on_state``.

    States arrive state by state and within a state prompt by prompt; so a slice of the weight is fetched
    once, used for all prompts and released before the text model goes on.
    """

    def __init__(self, extractor: FeatureExtractor, num_prompts: int, slices: Slices) -> None:
        self._extractor = extractor
        self._slices = slices
        self._num_prompts = num_prompts
        self._sums: list[tuple[Tensor, ...]] = []
        self._current: list[Tensor] = []
        self._num_added = 0

    def add(self, index: int, prompt: int, state: Tensor) -> None:
        """Add hidden state ``index`` [1, n, D] of ``prompt``, on the device that shall hold the sums.

        Raises:
            ValueError: out of order, or more states than the projection reads.
        """
        expected = divmod(self._num_added, self._num_prompts)
        if (index, prompt) != expected or index >= self._extractor.config.num_states:
            raise ValueError(f"state {index} of prompt {prompt} came where {expected} was expected")
        z_nD = self._extractor.normalise(state.flatten(0, -2))
        if prompt == 0:
            # float32 costs little here and spares 49 roundings of the partial products.  One memory layout
            # means one kernel: slices that were streamed give the bits of those that were resident.
            fetched = self._slices(index)
            self._current = [w_OD.to(z_nD.device).to(torch.float32).contiguous() for w_OD in fetched]
        if index == 0:
            self._sums.append(tuple(z_nD.new_zeros(len(z_nD), len(w_OD)) for w_OD in self._current))
        for total_nO, w_OD in zip(self._sums[prompt], self._current, strict=True):
            total_nO.addmm_(z_nD, w_OD.t())
        if prompt == self._num_prompts - 1:
            self._current = []
        self._num_added += 1

    def finish(self) -> list[PromptFeatures]:
        """Rescale and add the biases: float32 features of each prompt, where the sums lie.

        Raises:
            ValueError: states are missing.
        """
        if self._num_added != self._num_prompts * self._extractor.config.num_states:
            raise ValueError(f"only {self._num_added} states of {self._num_prompts} prompts were added")
        return [self._features(sums) for sums in self._sums]

    def _features(self, sums: tuple[Tensor, ...]) -> PromptFeatures:
        results = []
        for total_nO, projection in zip(sums, self._extractor.projections(), strict=True):
            result = total_nO * self._extractor.rescale(projection)
            if projection.bias is not None:
                result += projection.bias.to(result)
            results.append(result)
        return PromptFeatures(results[0], results[-1])
