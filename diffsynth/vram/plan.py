"""A plan: where the weights of every phase lie, how it runs, and what that is predicted to take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_UNITS = ((2**30, "GB"), (2**20, "MB"), (2**10, "KB"))


def readable_bytes(nbytes: int) -> str:
    """Bytes with two decimals in the largest unit that leaves something before rounding, such as 0.93 GB.

    Units are powers of 1024, as torch and drivers count memory.
    """
    size, unit = next((pair for pair in _UNITS if nbytes >= pair[0] // 100), _UNITS[-1])
    return f"{nbytes / size:.2f} {unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePlan:
    """How one phase runs, and what that is predicted to take.

    Attributes:
        traversals: of the blocks, of which there are ``num_blocks``.
        residents: blocks that stay on the device, evenly spread, in the order of use.
        slots: device buffers that the other blocks take turns in; 0 when all are resident.
        ram_blocks: streamed blocks that are kept in host memory; the others come from the disk every time.
        pinned: whether those are page-locked, so that no ring is needed.
        settings: of the choice taken.
        peak_vram_bytes, peak_host_bytes: of the whole process.
        compute_s, transfer_s, disk_s: of one traversal but the first; traversal_s: what that takes.
        seconds: of the phase.
        bytes_per_traversal: copied to the device; disk_bytes_per_traversal: read from the disk.
    """

    name: str
    part: str
    traversals: int
    num_blocks: int
    residents: tuple[str, ...]
    slots: int
    ram_blocks: tuple[str, ...]
    pinned: bool
    settings: Mapping[str, int | None]
    peak_vram_bytes: int
    peak_host_bytes: int
    bytes_per_traversal: int
    disk_bytes_per_traversal: int
    compute_s: float
    transfer_s: float
    disk_s: float
    traversal_s: float
    seconds: float

    @property
    def load_s(self) -> float:
        """What the phase takes longer because its weights come from the disk at first."""
        return self.seconds - self.traversals * self.traversal_s

    @property
    def bound(self) -> str:
        """What a traversal waits for: ``compute``, ``transfer`` or ``disk``."""
        slowest = max(self.compute_s, self.transfer_s, self.disk_s)
        if slowest == self.compute_s:
            return "compute"
        return "transfer" if slowest == self.transfer_s else "disk"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        for name in ("residents", "ram_blocks"):
            values[name] = list(values[name])
        return values | {"settings": dict(self.settings), "bound": self.bound, "load_s": self.load_s}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The phases of a run in their order.

    Attributes:
        conversion_host_bytes: of the whole process while weights are brought into the form in which they
            wait, before the phases that need them; 0: all of them are.
    """

    phases: tuple[PhasePlan, ...]
    conversion_host_bytes: int = 0

    @property
    def peak_vram_bytes(self) -> int:
        """Of the phase that needs most: they follow one another, and each frees what it held."""
        return max((phase.peak_vram_bytes for phase in self.phases), default=0)

    @property
    def peak_host_bytes(self) -> int:
        """Of the phase that needs most, or of a conversion that needs more."""
        return max([self.conversion_host_bytes, *(phase.peak_host_bytes for phase in self.phases)])

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def load_s(self) -> float:
        """Of all phases: what they wait for the disk before they are under way."""
        return sum(phase.load_s for phase in self.phases)

    def phase(self, name: str) -> PhasePlan:
        """A phase by name.  Raises KeyError."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_host_bytes": self.peak_host_bytes,
            "conversion_host_bytes": self.conversion_host_bytes,
            "seconds": self.seconds,
            "load_s": self.load_s,
            "phases": [phase.to_dict() for phase in self.phases],
        }
