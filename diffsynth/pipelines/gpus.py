"""Classes of graphics cards for predictions: what a card can do by its specification.

``tflops`` is the dense peak in bf16 with float32 accumulation, ``link_gb_per_s`` the rate that copies from
page-locked memory reach in practice: 25 for PCIe 4.0 x16 or 5.0 x8, 12.5 for 4.0 x8, 50 for 5.0 x16 (decimal
GB).  The RTX 4060 figure is from its published specification page, those of the other GeForce cards follow
from core counts and clocks, H200 and Ascend 910B3 from their vendors' data sheets.  The link of the Ascend
card is not published per card; PCIe 4.0 x16 is assumed.

Usable memory: a driver and a desktop take part of a card, more on a larger one.  0.95 times the memory less
0.4 GB gives 7.2 of 8 GB, 5.3 of 6 GB and 3.4 of 4 GB, as headless Linux leaves them (a Windows desktop leaves
6.5 to 6.8 of 8).  Device memory is counted in GB of 2**30 bytes, as drivers and ``vram_limit`` do.
"""

from dataclasses import dataclass

from diffsynth.device import CONTEXT_BYTES
from diffsynth.errors import RequestError
from diffsynth.vram.planner import Budget

GB = 2**30

DISK_GB_PER_S = 3.5
"""A common NVMe drive, large reads."""
PINNED_SHARE = 0.5
"""Of host memory that Linux lets a process page-lock; a prediction does not depend on where it is made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuClass:
    """A card by its specification; see the module."""

    name: str
    vram_gb: float
    tflops: float
    link_gb_per_s: float

    @property
    def usable_bytes(self) -> int:
        """Device memory that one process can have."""
        return int((0.95 * self.vram_gb - 0.4) * GB)

    def budget(self, *, host_gb: float | None = None, disk_gb_per_s: float = DISK_GB_PER_S) -> Budget:
        """What a plan may use of this card in a machine.

        Args:
            host_gb: host memory in GB (2**30 bytes) that the process may have; None: any.
            disk_gb_per_s: large reads, decimal GB.
        """
        host = None if host_gb is None else int(host_gb * GB)
        return Budget(
            vram_bytes=self.usable_bytes,
            host_bytes=host,
            link_bytes_per_s=self.link_gb_per_s * 1e9,
            disk_bytes_per_s=disk_gb_per_s * 1e9,
            tflops=self.tflops,
            reserve_bytes=CONTEXT_BYTES,
            pin_limit_bytes=0 if host is None else int(host * PINNED_SHARE),
        )


def _gpu(name: str, vram_gb: float, tflops: float, link_gb_per_s: float) -> GpuClass:
    return GpuClass(name=name, vram_gb=vram_gb, tflops=tflops, link_gb_per_s=link_gb_per_s)


GPUS: tuple[GpuClass, ...] = (
    _gpu("RTX 3060 12GB", 12, 25.5, 25),
    _gpu("RTX 4060 8GB", 8, 30.2, 12.5),
    _gpu("RTX 5060 8GB", 8, 38.4, 25),
    _gpu("RTX 4070 12GB", 12, 58.3, 25),
    _gpu("RTX 4090 24GB", 24, 165.2, 25),
    _gpu("RTX 5090 32GB", 32, 209.5, 50),
    _gpu("H200 141GB", 141, 989.5, 50),
    _gpu("Ascend 910B3 64GB", 64, 313, 25),
)
"""The classes that are known by name."""


def find_gpu(name: str) -> GpuClass:
    """A class by its name, or by an unambiguous part of it; case and spaces do not count.

    Raises:
        RequestError: none or several; the message lists the names.
    """
    wanted = _key(name)
    found = [gpu for gpu in GPUS if wanted and wanted in _key(gpu.name)]
    exact = [gpu for gpu in found if _key(gpu.name) == wanted]
    if len(exact or found) != 1:
        raise RequestError(
            f"gpu={name!r} is {'ambiguous' if found else 'not known'}",
            hint=", ".join(gpu.name for gpu in found or GPUS)
            + ("" if found else "; or --vram, --tflops and --link"),
        )
    return (exact or found)[0]


def _key(name: str) -> str:
    return "".join(name.lower().split())
