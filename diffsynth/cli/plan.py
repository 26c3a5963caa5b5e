"""``diffsynth plan``: what a generation needs on a machine and how long it takes, without any weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import typer

from diffsynth.cli import machine
from diffsynth.errors import RequestError

if TYPE_CHECKING:
    from diffsynth.pipelines.gpus import GpuClass
    from diffsynth.pipelines.parts import ModelVersion, Parts
    from diffsynth.pipelines.storage import Storage
    from diffsynth.request import GenerateRequest
    from diffsynth.vram.plan import PhasePlan, Plan

T = TypeVar("T")

MODELS: "Mapping[str, ModelVersion]" = {"ltx-2": "2.0", "ltx-2.3": "2.3"}
MODES: Mapping[str, tuple[bool, bool]] = {
    "one-stage": (False, False),
    "two-stage": (True, False),
    "distilled": (True, True),
}
"""Name -> two stages, distilled checkpoint."""
DEFAULT_MODEL = "ltx-2.3"
MACHINE = "Machine"
DEFAULT_TFLOPS = 20.0
DEFAULT_LINK_GB_PER_S = 12.5


def plan(
    gpu: Annotated[
        str | None, typer.Option(help="a card by name, e.g. 'RTX 4060 8GB'", rich_help_panel=MACHINE)
    ] = None,
    vram: Annotated[
        float | None, typer.Option(help="memory of a card in GB, instead of a name", rich_help_panel=MACHINE)
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="dense bf16 peak of such a card; 20", rich_help_panel=MACHINE)
    ] = None,
    link: Annotated[
        float | None, typer.Option(help="host to device in GB/s; 12.5, PCIe 4.0 x8", rich_help_panel=MACHINE)
    ] = None,
    host_limit: Annotated[
        float | None, typer.Option(help="host memory to stay under, in GB", rich_help_panel=MACHINE)
    ] = None,
    disk: Annotated[float, typer.Option(help="large reads in GB/s", rich_help_panel=MACHINE)] = 3.5,
    model: Annotated[str | None, typer.Option(help="ltx-2 or ltx-2.3; ltx-2.3 if left out")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="instead of --model: files that are here (a path, or MODEL_ID:FILE_PATTERN), of which the "
            "headers are read; what they lack is taken from the released model"
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="one-stage, two-stage or distilled")] = "one-stage",
    height: Annotated[int, typer.Option(help="height in pixels")] = 512,
    width: Annotated[int, typer.Option(help="width in pixels")] = 768,
    num_frames: Annotated[int, typer.Option("--num-frames", "--frames", help="number of frames: 8k+1")] = 121,
    storage: machine.Storage = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Predict memory and time on a machine.  Nothing is downloaded or loaded."""
    subject = _subject(model, checkpoint or (), storage)
    request = _request(mode, height, width, num_frames)
    for option, value in (("disk", disk), ("host-limit", host_limit)):
        _check_positive(option, value)
    card = _card(gpu, vram, tflops, link)

    from diffsynth.pipelines.demand import measured
    from diffsynth.pipelines.first_start import with_conversion
    from diffsynth.pipelines.nearest import plan_request

    budget = card.budget(host_gb=host_limit, disk_gb_per_s=disk)
    sizes = measured(subject.version, subject.storage, subject.parts)
    found = plan_request(request, subject.version, budget, storage=subject.storage, parts=sizes)
    found = with_conversion(found, sizes, budget)
    stored = subject.stored
    if as_json:
        asked = {"gpu": card.name, "model": subject.model, "mode": mode, "storage": stored}
        size = {"height": height, "width": width, "num_frames": num_frames}
        limits = {"vram_limit_bytes": budget.vram_bytes, "host_limit_bytes": budget.host_bytes}
        _print_json({**asked, **size, **limits, **found.to_dict()})
        return
    _show(found, f"{subject.model} {mode} {width}x{height}x{num_frames}, {stored}, {card.name}: predicted")


class _Subject(NamedTuple):
    """What a plan is about; ``parts`` None: the released networks."""

    model: str
    version: "ModelVersion"
    storage: "Storage"
    stored: str
    """``storage`` in a word."""
    parts: "Parts | None" = None


def _subject(model: str | None, checkpoint: Sequence[str], storage: str | None) -> _Subject:
    """A released model, or files that are here.

    Raises:
        RequestError: an unknown name, or one that is not that of the files.
        CheckpointError: files that cannot be used.
    """
    version = _chosen("model", model or DEFAULT_MODEL, MODELS)

    from diffsynth.pipelines.limits import DEFAULT_STORAGE, MemoryLimits
    from diffsynth.pipelines.storage import Storage

    if not checkpoint:
        stored = storage or DEFAULT_STORAGE
        return _Subject(model or DEFAULT_MODEL, version, Storage.named(stored), stored)
    import torch

    from diffsynth.loader import ModelConfig
    from diffsynth.pipelines.assemble import open_models
    from diffsynth.pipelines.released import completed

    opened = open_models([replace(ModelConfig.named(name), skip_download=True) for name in checkpoint])
    if model is not None and version != opened.version:
        raise RequestError(f"--model={model}, but the files are of another", hint="leave --model out")
    policy = MemoryLimits(storage=storage).storage_policy(opened.configs, opened.networks)
    parts = completed(opened.outline(torch.device("meta"), torch.bfloat16).parts)
    name = next(name for name, each in MODELS.items() if each == opened.version)
    followed = policy != Storage.named(storage or DEFAULT_STORAGE)
    stored = f"{policy.transformer} as in the file" if followed else storage or DEFAULT_STORAGE
    return _Subject(name, opened.version, policy, stored, parts)


def _request(mode: str, height: int, width: int, num_frames: int) -> "GenerateRequest":
    from diffsynth.request import GenerateRequest

    two_stage, distilled = _chosen("mode", mode, MODES)
    return GenerateRequest(
        height=height,
        width=width,
        num_frames=num_frames,
        use_two_stage_pipeline=two_stage,
        use_distilled_pipeline=distilled,
    ).validate()


def _card(gpu: str | None, vram: float | None, tflops: float | None, link: float | None) -> "GpuClass":
    """The card of that name, or one made of figures; ``tflops`` and ``link`` go before those of a name.

    Raises:
        RequestError: neither or both of name and memory, an unknown name, figures that are not positive.
    """
    from diffsynth.pipelines.gpus import GPUS, GpuClass, find_gpu

    if (gpu is None) == (vram is None):
        names = ", ".join(f"'{card.name}'" for card in GPUS)
        raise RequestError(
            "--gpu and --vram are both missing" if gpu is None else "--gpu and --vram are both given",
            hint=f"--gpu with one of {names}; or --vram GB, and --tflops and --link if they are known",
        )
    for option, value in (("vram", vram), ("tflops", tflops), ("link", link)):
        _check_positive(option, value)
    known = None if gpu is None else find_gpu(gpu)
    if known is not None:
        return GpuClass(
            name=known.name,
            vram_gb=known.vram_gb,
            tflops=tflops or known.tflops,
            link_gb_per_s=link or known.link_gb_per_s,
        )
    assert vram is not None
    return GpuClass(
        name=f"a card of {vram:g} GB",
        vram_gb=vram,
        tflops=tflops or DEFAULT_TFLOPS,
        link_gb_per_s=link or DEFAULT_LINK_GB_PER_S,
    )


def _chosen(option: str, value: str, choices: Mapping[str, T]) -> T:
    if value not in choices:
        raise RequestError(f"--{option}={value} is not known", hint=", ".join(choices))
    return choices[value]


def _check_positive(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise RequestError(f"--{option}={value:g} is not a positive number", hint="a number above 0")


def _print_json(values: Mapping[str, object]) -> None:
    import json

    typer.echo(json.dumps(values, indent=2))


def _show(found: "Plan", title: str) -> None:
    """A table with a row per phase, then the totals.  Memory is in GB of 2**30 bytes."""
    from rich.console import Console
    from rich.table import Table

    typer.echo(title)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    table.add_column("phase", no_wrap=True)
    for name in ("VRAM GB", "RAM GB", "seconds", "steps", "resident", "in RAM", "GB/step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("waits for", no_wrap=True)
    for phase in found.phases:
        table.add_row(*_row(phase))
    Console().print(table)
    for phase in found.phases:
        if phase.settings.get("tile_size_in_pixels") is not None:
            typer.echo(f"{phase.name}: {_tiles(phase.settings)}")
    typer.echo(
        f"peak {_gb(found.peak_vram_bytes)} GB of device memory and {_gb(found.peak_host_bytes)} GB of host "
        f"memory; {found.seconds:.0f} s, of which {found.load_s:.0f} s reading weights"
    )
    typer.echo(f"the first start converts the weights: {_gb(found.conversion_host_bytes)} GB of host memory")


def _row(phase: "PhasePlan") -> tuple[str, ...]:
    blocks = phase.num_blocks
    return (
        phase.name,
        _gb(phase.peak_vram_bytes),
        _gb(phase.peak_host_bytes),
        f"{phase.seconds:.1f}",
        str(phase.traversals),
        f"{len(phase.residents)}/{blocks}" if blocks else "all",
        f"{len(phase.ram_blocks)}/{blocks}" if blocks else "",
        _gb(phase.bytes_per_traversal),
        phase.bound,
    )


def _tiles(settings: Mapping[str, int | None]) -> str:
    """Size over overlap."""
    tiles = [
        settings[f"tile_{what}_in_{unit}"] for unit in ("pixels", "frames") for what in ("size", "overlap")
    ]
    return "tiles {}/{} px, {}/{} frames".format(*tiles)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f}"
