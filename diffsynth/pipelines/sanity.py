"""Whether what a phase made can be a picture or a sound at all."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.errors import NumericalError

logger = logging.getLogger(__name__)


def check_finite_values(what: str, values: Tensor, dtype: torch.dtype) -> None:
    """Make sure that nothing overflowed; on the CPU, so that the device need not make room.

    Args:
        what: made these values, for the message.
        values: of any shape and dtype.
        dtype: in which the networks compute.

    Raises:
        NumericalError: there is a NaN or an infinity.
    """
    # The sum of a NaN is one; unlike a mask it takes no memory.
    if values.cpu().sum(dtype=torch.float64).isfinite():
        return
    hint = "another storage format (storage, --storage), weaker LoRAs, or the weights fetched again"
    if dtype == torch.float16:
        hint = "torch_dtype=torch.bfloat16 (--dtype bfloat16), or float32"
    raise NumericalError(f"{what} gave values that are not finite", hint=hint)


def tell_plain_frames(frames: Sequence[Image.Image]) -> None:
    """Warn about a video without any picture in it, which a prompt hardly asks for."""
    if all(np.ptp(np.asarray(frame), axis=(0, 1)).max() == 0 for frame in frames):  # stops at a picture
        logger.warning("every frame is of one colour: weights, LoRAs and mode may not belong together")
