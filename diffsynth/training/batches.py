"""Which samples make up which batch: a function of seed and number alone, so that any run can go on."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import torch

from diffsynth.training.samples import SampleEntry


def random_source(seed: int, *names: object) -> torch.Generator:
    """A generator on the CPU for one purpose, told apart from all others by ``names``.

    Draws of one purpose do not move those of another, and nothing has to be stored to go on from a step.
    """
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class BatchPlan:
    """Every sample once per epoch, in an order of its own; samples of a batch have the same shapes."""

    def __init__(self, entries: Sequence[SampleEntry], *, batch_size: int, seed: int) -> None:
        self._seed = seed
        self._batch_size = batch_size
        groups: dict[object, list[int]] = defaultdict(list)
        for index, entry in enumerate(entries):
            groups[entry.shapes].append(index)
        self._groups = list(groups.values())
        self._epoch, self._order = -1, list[list[int]]()

    @property
    def batches_per_epoch(self) -> int:
        """The last batch of each group of shapes may be smaller."""
        return sum(-(-len(group) // self._batch_size) for group in self._groups)

    def batch(self, number: int) -> list[int]:
        """Indices of the samples of a batch, ``number`` counted from 0 over all epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        source, size = random_source(self._seed, "order", epoch), self._batch_size
        batches = []
        for group in self._groups:
            order = [group[i] for i in torch.randperm(len(group), generator=source).tolist()]
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=source).tolist()]
