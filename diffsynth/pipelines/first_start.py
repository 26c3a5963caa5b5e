"""What a first start takes beside its phases: weights are converted before the phase that needs them."""

from collections.abc import Collection
from dataclasses import replace

from diffsynth.errors import MemoryBudgetError
from diffsynth.pipelines.phases import parts_of_phase
from diffsynth.pipelines.sizes import ModelSizes
from diffsynth.vram.plan import Plan
from diffsynth.vram.planner import Budget

GB = 2**30


def planned_parts(found: Plan) -> list[str]:
    """The networks that the phases of a plan need, in the order in which they need them."""
    return list(dict.fromkeys(part for phase in found.phases for part in parts_of_phase(phase.name)))


def with_conversion(found: Plan, sizes: ModelSizes, budget: Budget, *, packed: Collection[str] = ()) -> Plan:
    """The plan of a start that has to convert networks.

    Args:
        found: its phases.
        sizes: of the networks.
        budget: that the phases were planned with.
        packed: networks that are converted already.

    Raises:
        MemoryBudgetError: a conversion needs more host memory than is allowed.
    """
    missing = [part for part in planned_parts(found) if part not in packed and sizes.has(part)]
    if not missing:
        return found
    largest = max(missing, key=lambda part: sizes.parts[part].conversion_bytes)
    needed = budget.host_base_bytes + sizes.parts[largest].conversion_bytes
    if budget.host_bytes is not None and needed > budget.host_bytes:
        raise MemoryBudgetError(
            f"the first start converts the {largest}, which needs {needed / GB:.2f} GB of host memory, "
            f"{budget.host_bytes / GB:.2f} GB are allowed",
            hint=f"host_limit={needed / GB + 0.01:.2f} once: later starts need "
            f"{found.peak_host_bytes / GB:.2f} GB",
        )
    return replace(found, conversion_host_bytes=needed)
