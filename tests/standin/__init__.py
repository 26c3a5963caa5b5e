"""A strict stand-in for a small accelerator: it runs on the CPU and is stricter than any real device.

    with StandIn(capacity_bytes=50_000, seed=1) as device:
        model.to("standin")
        ...
        assert device.peak_bytes < 40_000
        assert device.counters.host_to_device_bytes == expected

Modelled:

* **A device of its own.**  Tensors report the device ``standin:0``; mixing them with host tensors in one
  operation is an error (0-dim host scalars pass, as in torch).  Even indices must be on the device.
* **Capacity.**  Every storage on the device counts from its creation until its last tensor dies; views
  share.  One byte too many raises ``torch.OutOfMemoryError`` with a ledger of the largest tensors.
* **Streams.**  What ``copy_async`` is given arrives only when somebody waits for an event behind it, or
  synchronises; until then the destination holds NaN.  Copies of several streams arrive in a seeded order.
* **Ordering.**  Each access of a buffer is checked against every earlier access on another stream by
  happens-before: reading what no wait has made visible, overwriting what is still read, writing into fresh
  memory before the computation that owned it, freeing what a copy still uses: all are ``HazardError``.
  The check does not depend on timing: a missing guard is found on the first run.
* **Host side of a copy.**  A source that changes before the *host* has waited for its copy is found by
  checksum, when the buffer is sent again or the host waits; that the device waited is not enough.
* **Missing dtypes** (``strict_dtypes``): no float64, no complex, float8 only as stored bytes, no float32
  autocast: what Ascend NPUs lack.
* **Page-locking** with a limit, and **counters**: bytes and number of copies each way, allocations, host
  synchronisations.

Not modelled:

* Time.  Nothing overlaps; only the order of effects is that of a device.
* Memory inside one operation: convolution workspaces, intermediates of composite operations under
  ``torch.inference_mode`` (``einsum``, ``rms_norm``), fragmentation, rounding by the allocator.
* A random generator of the device (sampling there draws from the host's generator), ``set_``,
  ``record_stream``, several devices.
* Reads of a host destination before its copy has arrived are not refused; they see NaN.
* A page-locked source that is freed early: a pending copy keeps it alive here.
"""

from tests.standin.counters import Counters
from tests.standin.device import StandIn
from tests.standin.errors import HazardError, UnsupportedOnDeviceError

__all__ = ["Counters", "HazardError", "StandIn", "UnsupportedOnDeviceError"]
