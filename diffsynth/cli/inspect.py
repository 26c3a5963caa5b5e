"""``diffsynth inspect``: what a file holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from diffsynth.errors import CheckpointError, RequestError

MEDIA_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".wav", ".flac"})


def run(file: Path, *, as_json: bool) -> None:
    """Print a report on a checkpoint, a LoRA, an upsampler, or a generated video or sound.

    Raises:
        CheckpointError: the file is missing, damaged or of no known kind; a video or sound without a request.
    """
    if not file.exists():
        raise CheckpointError(f"{file}: no such file", hint="check the path")
    report = _media(file) if file.suffix.lower() in MEDIA_SUFFIXES else _weights(file)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    _print(report)


def _media(file: Path) -> dict[str, Any]:
    from diffsynth.utils.media_io_ltx2 import read_request

    try:
        record = read_request(file)
    except RequestError as error:  # it names an argument of a request, and here it is a damaged file
        raise CheckpointError(error.message, hint=error.hint) from error
    if record is None:
        raise CheckpointError(f"{file} carries no request", hint="only files that diffsynth wrote do")
    return dict(record)


def _weights(file: Path) -> dict[str, Any]:
    from diffsynth.loader import describe

    found = describe(file)
    report: dict[str, Any] = {"file": str(file)}
    if found.version is not None:
        report["model"] = "LTX-2" if found.version == "2.0" else f"LTX-{found.version}"
    report["configuration"] = "in the file" if found.has_config else "inferred from shapes"
    for network in found.networks:
        dtypes = ", ".join(f"{count} x {dtype}" for dtype, count in network.dtypes.items())
        report[str(network.kind)] = (
            f"{network.parameters:,} parameters in {network.tensors} tensors, {network.bytes / 1e9:.3f} GB, "
            f"{network.storage} ({dtypes})"
        )
    if found.lora is not None:
        ranks = ", ".join(map(str, found.lora.ranks))
        alpha = "with alpha" if found.lora.has_alpha else "without alpha"
        report["LoRA"] = f"{found.lora.format} keys, {found.lora.targets} layers, rank {ranks}, {alpha}"
    if found.unknown_keys:
        report["unknown keys"] = list(found.unknown_keys)
    if found.problem:
        report["problem"] = f"{found.problem}  Try: {found.hint}"
    return report


def _print(report: Mapping[str, Any], indent: str = "") -> None:
    for key, value in report.items():
        if value in (None, "", [], (), {}):
            continue
        if isinstance(value, Mapping):
            typer.echo(f"{indent}{key}:")
            _print(value, indent + "  ")
        else:
            typer.echo(f"{indent}{key}: {value}")
