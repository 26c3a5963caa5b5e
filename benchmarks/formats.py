"""What every storage format costs in precision, on a checkpoint's own weights or on synthetic ones.

    python -m benchmarks.formats ltx-2-19b-dev.safetensors --layers 'transformer_blocks\\.(0|24|47)\\.'
    python -m benchmarks.formats --synthetic laplace --json

Weights are read one after another, so any size of file works.  Errors are relative RMS; the output error is
that of ``x W^T`` for inputs with independent unit Gaussian entries, for which it agrees with the weight error
up to sampling.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffsynth.errors import DiffSynthError
from diffsynth.loader import SafetensorsFile
from diffsynth.vram.format_error import FormatError, format_report
from diffsynth.vram.formats import StorageFormat


class Distribution(StrEnum):
    """Of synthetic weights."""

    GAUSSIAN = "gaussian"
    LAPLACE = "laplace"


# Standard deviations that occur in the transformers; unscaled casts depend on them, scaled formats do not.
_DEVIATIONS = (0.05, 0.02, 0.01, 0.005)
_SIDE = 2048


def checkpoint_layers(path: Path, pattern: str, limit: int) -> Iterator[tuple[str, Tensor]]:
    """2-D weights whose names match, at most ``limit``, evenly spread; fp8 ones times their scale."""
    file = SafetensorsFile(path)
    names = [
        name
        for name, shape in file.shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and re.search(pattern, name)
    ]
    for number in range(min(limit, len(names))):
        name = names[number * len(names) // min(limit, len(names))]
        scale_name = f"{name}_scale"
        if scale_name in file.shapes:
            scale = file.read(scale_name, torch.float32)
            yield name, file.read(name, torch.float32).mul_(scale.reshape(-1, 1))
        else:
            yield name, file.read(name)


def synthetic_layers(distribution: Distribution) -> Iterator[tuple[str, Tensor]]:
    """Square weights of several sizes of numbers."""
    for deviation in _DEVIATIONS:
        # Not the seed of the inputs, of which these numbers must be independent.
        generator = torch.Generator().manual_seed(20_000)
        if distribution is Distribution.GAUSSIAN:
            weight = torch.randn(_SIDE, _SIDE, generator=generator)
        else:
            sign = torch.randint(0, 2, (_SIDE, _SIDE), generator=generator) * 2 - 1
            weight = torch.empty(_SIDE, _SIDE).exponential_(generator=generator) * sign / 2**0.5
        yield f"{distribution} {deviation}", weight * deviation


def table(errors: list[FormatError], *, per_layer: bool) -> Table:
    """One line per format, or per format and layer."""
    made = Table("format", "layers", "bits", "weight error", "worst", "output error", "worst", "worst layer")
    groups: dict[tuple[str, str], list[FormatError]] = {}
    for error in errors:
        groups.setdefault((error.format, error.name if per_layer else ""), []).append(error)
    for (format, _), group in groups.items():
        worst = max(group, key=lambda error: error.weight_error)
        bits = 8 * sum(e.stored_bytes for e in group) / sum(e.shape[0] * e.shape[1] for e in group)
        made.add_row(
            format,
            str(len(group)),
            f"{bits:.2f}",
            f"{fmean(e.weight_error for e in group):.3%}",
            f"{worst.weight_error:.3%}",
            f"{fmean(e.output_error for e in group):.3%}",
            f"{max(e.output_error for e in group):.3%}",
            worst.name,
        )
    return made


def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="safetensors file")] = None,
    synthetic: Annotated[Distribution | None, typer.Option(help="random weights instead")] = None,
    formats: Annotated[
        str, typer.Option(help="comma-separated storage formats")
    ] = "bf16,f16,e4m3,e5m2,fp8,fp8_tensor,int8,int4",
    layers: Annotated[str, typer.Option(help="regular expression that names must match")] = "",
    limit: Annotated[int, typer.Option(min=1, help="at most so many layers, evenly spread")] = 64,
    per_layer: Annotated[bool, typer.Option(help="one line per layer")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, every layer")] = False,
) -> None:
    """Measure weight and output error of storage formats."""
    if (checkpoint is None) == (synthetic is None):
        raise typer.BadParameter("give a checkpoint or --synthetic")
    try:
        wanted = [StorageFormat(name.strip()) for name in formats.split(",")]
        re.compile(layers)
    except (ValueError, re.error) as error:
        raise typer.BadParameter(str(error)) from None
    if checkpoint is not None:
        source = checkpoint_layers(checkpoint, layers, limit)
    else:
        assert synthetic is not None
        source = synthetic_layers(synthetic)
    try:
        # A layer whose width no int4 group divides is int8 twice when both are asked for.
        errors = list(dict.fromkeys(format_report(source, wanted)))
    except DiffSynthError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        report: list[dict[str, Any]] = [asdict(error) for error in errors]
        typer.echo(json.dumps(report, indent=2))
        return
    Console().print(table(errors, per_layer=per_layer))


if __name__ == "__main__":
    typer.run(main)
