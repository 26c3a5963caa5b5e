"""Several processes that train together, one per device: torchrun starts them, gradients are added up.

The passes of a step are dealt out among them, so the number of processes changes the time of a step and
nothing of what is learnt.  Every process holds everything; the first one writes.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from diffsynth.device import resolve_device
from diffsynth.errors import RequestError

T = TypeVar("T")

_BUCKET_VALUES = 2**24
"""So many gradients travel at once, 64 MB: each message has its own cost, and the bucket is a copy."""
_PATIENCE = timedelta(hours=2)
"""The others wait while the first process makes clips."""


def process_number() -> int:
    """Which of the processes of torchrun this is, from 0; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """This process among those that train together.

    Every method but :meth:`share` is called by all of them at the same place, or by none.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` passes this process makes."""
        return range(self.rank, count, self.size)

    def check(self, passes: int) -> None:
        """Make sure that all processes make equally many of the passes of a step.

        Raises:
            RequestError: they cannot.
        """
        if passes % self.size:
            raise RequestError(
                f"[training] gradient_accumulation={passes} cannot be dealt out among {self.size} processes",
                hint=f"gradient_accumulation = {-(-passes // self.size) * self.size}: it counts those of all",
            )

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter the sum of its gradients in all processes; none where nobody has one."""
        if self.size == 1:
            return
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        distributed.all_reduce(there, distributed.ReduceOp.MAX)
        gradients = []
        for parameter, anywhere in zip(parameters, there.tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        distributed.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process; all of them know when all have asked."""
        return any(self.gathered(flag))


@contextmanager
def joined(device: str | None) -> Iterator[tuple[Workers, torch.device]]:
    """Within the ``with`` block this process works with the others that torchrun started, if it did.

    Args:
        device: of the configuration; with several processes each has its own of this type.

    Yields: the workers, and the device of this one.

    Raises:
        RequestError: there is no such device, or one device for several processes.
    """
    if process_count() == 1:
        yield Workers(), resolve_device(device)
        return
    own = _own_device(device)
    backend = "gloo"
    if own.type != "cpu":
        torch.accelerator.set_device_index(own)  # libraries that ask for the present device find their own
        backend = f"cpu:gloo,{own.type}:{distributed.get_default_backend_for_device(own)}"
    distributed.init_process_group(backend, timeout=_PATIENCE, device_id=None if own.type == "cpu" else own)
    try:
        yield Workers(rank=distributed.get_rank(), size=distributed.get_world_size()), own
    finally:
        distributed.destroy_process_group()


def _own_device(device: str | None) -> torch.device:
    if device is not None and ":" in device:
        hint = f'device = "{device.partition(":")[0]}"'
        raise RequestError(f"[model] device={device!r} for {process_count()} processes", hint=hint)
    wanted = resolve_device(device)
    if wanted.type == "cpu":
        return wanted
    return resolve_device(f"{wanted.type}:{os.environ.get('LOCAL_RANK', '0')}")


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients that travel at once; a larger one travels alone."""
    bucket: list[Tensor] = []
    count = 0
    for gradient in gradients:
        if bucket and count + gradient.numel() > _BUCKET_VALUES:
            yield bucket
            bucket, count = [], 0
        bucket.append(gradient)
        count += gradient.numel()
    if bucket:
        yield bucket
