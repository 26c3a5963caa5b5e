"""Train the nano family, stage by stage.

    python -m training.nano all --folder runs/nano --device cuda
    python -m training.nano audio-vae vocoder --folder runs/nano --device cuda

A stage that is done is skipped; ``FOLDER/done/STAGE.json`` says how and in what time it was done, and
removing it has the stage run again.  Stages that do not need each other can run side by side in processes
of their own.
"""

import json
import os
import platform
import time
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer


class Stage(StrEnum):
    """In the order in which they need each other."""

    VIDEO_VAE = "video-vae"
    UPSAMPLER = "upsampler"
    AUDIO_VAE = "audio-vae"
    VOCODER = "vocoder"
    LATENTS = "latents"
    TRANSFORMER = "transformer"
    DISTILL = "distill"
    STYLE = "style"
    EXPORT = "export"
    ALL = "all"


_WORK = {
    Stage.VIDEO_VAE: "video_vae:train",
    Stage.UPSAMPLER: "upsampler:train",
    Stage.AUDIO_VAE: "audio_vae:train",
    Stage.VOCODER: "vocoder:train",
    Stage.LATENTS: "latents:encode",
    Stage.TRANSFORMER: "transformer:train",
    Stage.DISTILL: "distill:train",
    Stage.STYLE: "style:train",
    Stage.EXPORT: "export:export",
}
"""Module and function of a stage; it takes the settings, whose class stands in its signature, the folder and
the device."""


def run(stage: Stage, folder: Path, device: str, changes: dict[str, Any], package: str = __package__) -> bool:
    """One stage, unless it is done.

    Args:
        stage: which one.
        folder: of all results.
        device: to train on.
        changes: to the settings of the stage, where it has such a setting; None leaves its own.
        package: whose modules do the work.

    Returns: whether anything was to be done.
    """
    note = folder / "done" / f"{stage}.json"
    if note.exists():
        print(f"{stage}: done already ({note})", flush=True)
        return False
    module, name = _WORK[stage].split(":")
    work = getattr(import_module(f"{package}.{module}"), name)
    settings = get_type_hints(work)["settings"]()
    known = {field.name for field in fields(settings)}
    settings = replace(settings, **{k: v for k, v in changes.items() if k in known and v is not None})
    print(f"{stage}: {settings}", flush=True)
    begun = time.monotonic()
    work(settings, folder, device)
    taken = time.monotonic() - begun
    note.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_how(stage, device, taken) | {"settings": asdict(settings)}, indent=1, default=str)
    note.write_text(text + "\n", encoding="utf-8")
    print(f"{stage}: {taken:.0f} s", flush=True)
    return True


def _how(stage: Stage, device: str, seconds: float) -> dict[str, Any]:
    cuda = torch.device(device).type == "cuda"
    return {
        "stage": stage,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def main(
    stages: Annotated[list[Stage], typer.Argument(help="What to do, in this order.")],
    folder: Annotated[Path, typer.Option(help="Of all results.")],
    device: Annotated[str, typer.Option(help="To train on.")] = "cpu",
    steps: Annotated[int | None, typer.Option(help="Instead of the number in the settings.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of training, for the stages that plan their steps by it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the one in the settings.")] = None,
) -> None:
    """Train the nano family; what is done is skipped."""
    torch.backends.cudnn.benchmark = True
    folder.mkdir(parents=True, exist_ok=True)
    for stage in _WORK if Stage.ALL in stages else stages:
        run(stage, folder, device, {"steps": steps, "minutes": minutes, "seed": seed})


if __name__ == "__main__":
    typer.run(main)
