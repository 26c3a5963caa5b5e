"""Keys and values that a Gemma 3 layer has computed, so that a further token costs one token's work."""

import torch
from torch import Tensor


class KeyValueCache:
    """What one layer remembers of one text, in memory of a fixed size.

    The text comes as a whole first and then token by token.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, *, window: int | None = None, mask: Tensor | None = None
    ) -> None:
        """
        Args:
            keys: memory of the keys, [1, key/value heads, capacity, h].
            values: memory of the values, of the same shape.
            window: tokens that a token sees, itself included; None: all before it.
            mask: which tokens of the first text see which, boolean [n, n]; None: all before them.
        """
        self._keys = keys
        self._values = values
        self._window = window
        self._mask = mask
        self._length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Remember keys and values [1, key/value heads, n, h], after rotation.

        Returns:
            The keys and values that the n tokens attend to, and which of them see which: boolean [n, n], or
            None, which means all before them.

        Raises:
            ValueError: more tokens than fit, or several at once after the first text.
        """
        start, end = self._length, self._length + keys.shape[2]
        if end > self._keys.shape[2] or (start and end > start + 1):
            raise ValueError(f"{keys.shape[2]} tokens after {start} do not fit {self._keys.shape[2]}")
        self._keys[:, :, start:end].copy_(keys)
        self._values[:, :, start:end].copy_(values)
        self._length = end
        if not start:
            return self._keys[:, :, :end], self._values[:, :, :end], self._mask
        first = 0 if self._window is None else max(0, end - self._window)
        return self._keys[:, :, first:end], self._values[:, :, first:end], None


def first_mask(n: int, window: int | None, picture: slice | None) -> Tensor | None:
    """Which of n tokens see which, boolean [n, n] on the CPU; None where plain causality says it.

    Args:
        n: tokens of the first text.
        window: tokens that a token sees, itself included; None: all before it.
        picture: the tokens of a picture: they see one another, whatever their order, inside the window.
    """
    if picture is None and (window is None or n <= window):
        return None
    position = torch.arange(n)
    distance = position[:, None] - position[None, :]
    mask = distance >= 0
    if picture is not None:
        mask[picture, picture] = True
    if window is not None:
        mask &= distance < window
    return mask
