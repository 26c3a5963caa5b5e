"""What a process takes of a device beside its tensors: driver context, loaded kernels, library handles."""

import torch
from torch import Tensor

from diffsynth.device.base import Backend, MemoryFigures

CONTEXT_BYTES = 2**29
"""What a context takes where it was not measured: published figures lie between 0.3 and 0.5 GB."""
CONTEXT_LIMIT_BYTES = 2**31
"""More than any process takes: an H200 with all kernels of a generation takes 1.3 GB."""
CONTEXT_MARGIN_BYTES = 3 * 2**28
"""A bare context may be so much larger than ``CONTEXT_BYTES``; what exceeds it belongs to other processes.
With a third of it 0.91 GB, with two thirds 1.16 GB, with all of it 1.19 GB were found on an H200 that held
1.26 GB beside the tensors of a generation: what is left is for the allocator's margin."""


def measured_context(backend: Backend) -> int:
    """Bytes that this process will take beside its tensors, found by using the device a little.

    No driver tells this in every setting: its figure per process needs a package that torch does not bring,
    and containers hide it.  So the memory in use on the whole device, less what torch's allocator holds, is
    read when the context is there and again after one matrix product, one attention and two convolutions.
    The growth is what kernels and libraries took; the bare context counts as assumed for the device, or as
    what was in use if that is at most ``CONTEXT_MARGIN_BYTES`` more.  So other processes may hold any
    amount.  One that takes memory between the two readings, a second apart, brings the figure up to
    ``CONTEXT_LIMIT_BYTES`` at worst; one that gives memory back, down to the assumption.

    Args:
        backend: of a device on which this process has no tensor yet.  If there is no context, this makes it.

    Returns:
        A figure between the assumption in ``capabilities.context_bytes`` and ``CONTEXT_LIMIT_BYTES``.

    Raises:
        RuntimeError: the device does not tell its memory, cannot do one of the operations, or was used
            before, so that libraries are loaded and no growth would be seen.
    """
    assumed = backend.capabilities.context_bytes
    start = backend.memory()
    if start.peak_reserved is None or start.peak_reserved > 0:
        raise RuntimeError(f"this process has used {backend.device} before")
    before = _beside_tensors(start)
    _use(backend)
    after = _beside_tensors(backend.memory())
    backend.empty_cache()
    own = min(after, assumed + CONTEXT_MARGIN_BYTES + max(0, after - before))
    return max(assumed, min(own, CONTEXT_LIMIT_BYTES))


def _beside_tensors(memory: MemoryFigures) -> int:
    """In use on the whole device, what this process's allocator holds not counted."""
    if memory.total is None or memory.free is None or memory.reserved is None:
        raise RuntimeError("the device does not tell its memory")
    return memory.total - memory.free - memory.reserved


@torch.inference_mode()
def _use(backend: Backend) -> None:
    """One small operation of every kind for which the networks need a library."""
    half = torch.bfloat16 if backend.capabilities.bfloat16 else torch.float16

    def ones(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=backend.device)

    torch.mm(ones(256, 256), ones(256, 256))
    query = ones(1, 2, 128, 64)
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
    torch.conv3d(ones(1, 64, 4, 16, 16), ones(64, 64, 3, 3, 3), padding=1)
    torch.conv1d(ones(1, 64, 256, dtype=torch.float32), ones(64, 64, 3, dtype=torch.float32), padding=1)
    backend.synchronize()
