"""What tests count."""

from dataclasses import dataclass, fields, replace


@dataclass(slots=True)
class Counters:
    """Totals since the stand-in was opened; ``later - earlier`` is what happened in between."""

    host_to_device_bytes: int = 0
    host_to_device_copies: int = 0
    device_to_host_bytes: int = 0
    device_to_host_copies: int = 0
    pageable_copies: int = 0
    """Of the copies on copy streams: those whose host side is not page-locked, so would not overlap."""
    allocations: int = 0
    host_syncs: int = 0
    """The host waited for the device: ``item``, ``nonzero``, ``cpu``, ``synchronize`` and their like."""

    def snapshot(self) -> "Counters":
        """The totals of now."""
        return replace(self)

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})
