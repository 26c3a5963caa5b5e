"""What to say when a device is too small for training."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffsynth.device import is_out_of_memory
from diffsynth.errors import MemoryBudgetError


@contextmanager
def out_of_memory_told(what: str, hint: str) -> Iterator[None]:
    """Name what did not fit, and settings that need less.

    Raises:
        MemoryBudgetError: instead of what the device's library raises.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0]
        raise MemoryBudgetError(f"the device ran out of memory in {what}: {first}", hint=hint) from error
