"""Options about the machine, which every command that computes has: device, arithmetic, memory."""

from dataclasses import dataclass
from typing import Annotated, Self, TypeAlias

import typer

RUN = "Running"
MEMORY = "Memory (with any limit or storage format, weights come to the device block by block)"
DEFAULT_DTYPE = "bfloat16"

Device: TypeAlias = Annotated[
    str | None, typer.Option(help="cuda, npu, mps or cpu; the best one if left out", rich_help_panel=RUN)
]
Dtype: TypeAlias = Annotated[
    str, typer.Option(help="arithmetic: bfloat16, float16 or float32", rich_help_panel=RUN)
]
VramLimit: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="device memory to stay under: GB, 'auto' for what is free, or a card: 4gb, 6gb, 8gb ... 24gb",
        rich_help_panel=MEMORY,
    ),
]
HostLimit: TypeAlias = Annotated[
    float | None,
    typer.Option(help="host memory to stay under, in GB; what is free if left out", rich_help_panel=MEMORY),
]
Storage: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="how weights are stored: bf16, fp8, int8, int4, e4m3 or e5m2; if left out int8, or "
        "fp8 as the file has it where the file is fp8",
        rich_help_panel=MEMORY,
    ),
]
Cache: TypeAlias = Annotated[
    bool, typer.Option(help="keep converted weights and encoded prompts on the disk", rich_help_panel=MEMORY)
]
Stats: TypeAlias = Annotated[
    bool, typer.Option("--stats", help="show what each phase took and moved", rich_help_panel=MEMORY)
]
Quiet: TypeAlias = Annotated[bool, typer.Option(help="no progress", rich_help_panel=RUN)]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineOptions:
    """Where a command computes and what it may take; the values are checked by the pipeline."""

    device: str | None
    dtype: str
    vram_limit: float | str | None
    host_limit: float | None
    storage: str | None
    cache: bool
    prefetch_count: int | None = None

    @classmethod
    def of(
        cls,
        device: str | None,
        dtype: str,
        vram_limit: str | None,
        host_limit: float | None,
        storage: str | None,
        cache: bool,
        *,
        prefetch_count: int | None = None,
    ) -> Self:
        """From the options as they are typed."""
        return cls(
            device=device,
            dtype=dtype,
            vram_limit=_number(vram_limit),
            host_limit=host_limit,
            storage=storage,
            cache=cache,
            prefetch_count=prefetch_count,
        )


def _number(text: str | None) -> float | str | None:
    """GB when it is a number, else the text in the form in which cards are named."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text.lower().replace(" ", "") if text else text
