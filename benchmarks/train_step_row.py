"""One row of :mod:`benchmarks.train_step`, in its own process: ``python -m benchmarks.train_step_row JSON``.

The last line of the standard output is the result, as JSON; progress goes to the standard error.
"""

import json
import logging
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.footprint import Watch, high_water_mark
from benchmarks.synthetic import Dimensions, open_synthetic
from diffsynth.conditioning.text import PromptContext
from diffsynth.conditioning.tokens import video_latent_shape
from diffsynth.device import Backend, backend_for, resolve_device
from diffsynth.errors import DiffSynthError
from diffsynth.pipelines.assemble import MODEL_NAMES, OpenedModels
from diffsynth.training.adapters import TrainableLora
from diffsynth.training.base import StreamedBase, open_base
from diffsynth.training.batches import random_source
from diffsynth.training.config import (
    DataSection,
    LoraSection,
    MemorySection,
    ModelSection,
    OutputSection,
    TrainConfig,
    TrainingSection,
)
from diffsynth.training.samples import Sample, write_index
from diffsynth.training.trained import TrainedLora
from diffsynth.training.trainer import TrainingRun
from diffsynth.training.workers import Workers

GB = 2**30
USABLE = 0.9
"""Share of a card's memory that one process gets."""
TEXT_TOKENS = 1024
"""Of the released models."""
AUDIO_PER_S = 25.0
FPS = 24.0
MEL = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRow:
    """What to measure.  ``cap_gb`` None: everything resident, no limit."""

    name: str
    model: str
    layers: int | None
    cap_gb: float | None
    storage: str
    rank: int
    activations: str | None
    optimizer: str
    requests: tuple[str, ...]
    steps: int
    device: str | None
    dtype: str
    folder: str

    @classmethod
    def from_json(cls, text: str) -> "TrainRow":
        """The row that ``json.dumps(asdict(row))`` wrote."""
        data = json.loads(text)
        return cls(**{**data, "requests": tuple(data["requests"])})


def measure(row: TrainRow) -> dict[str, Any]:
    """All sizes of a row, one run of the trainer each."""
    started = time.perf_counter()
    device = resolve_device(row.device)
    backend = backend_for(device)
    folder = Path(row.folder)
    os.environ["DIFFSYNTH_CACHE_PATH"] = str(folder / "cache")
    opened = open_synthetic(Dimensions.of(row.model, row.layers), folder, text=False).only(["dit"])
    result: dict[str, Any] = {**asdict(row), "usable_share": USABLE, "cases": []}
    del result["folder"]
    with Watch() as watch:
        for request in row.requests:
            case: dict[str, Any] = {"request": request}
            result["cases"].append(case)
            try:
                case |= _measured(row, request, opened, backend, watch)
            except (DiffSynthError, RuntimeError) as error:
                case["failed"] = f"{type(error).__name__}: {error}"
                _tell(row, f"{request}: {case['failed'][:300]}")
        result["peak_host_bytes"] = watch.peak.own
    result["high_water_mark_bytes"] = high_water_mark()
    result["process_s"] = time.perf_counter() - started
    return result


def _measured(
    row: TrainRow, request: str, opened: OpenedModels, backend: Backend, watch: Watch
) -> dict[str, Any]:
    config = _config(row, request, opened)
    entries = _entries(config, request, opened)
    begun = time.perf_counter()
    base = open_base(config, opened, entries)
    assert isinstance(base, StreamedBase)
    limit = base.budget.vram_bytes
    cap = None if limit is None else max(1, limit - base.budget.reserve_bytes)
    backend.set_memory_cap(cap)
    _tell(row, f"{request}: planned in {time.perf_counter() - begun:.1f} s, {base.summary}")
    watch.mark()
    with base.entered() as network:
        backend.synchronize()
        entered_s = time.perf_counter() - begun
        _tell(row, f"{request}: weights are there after {entered_s:.1f} s")
        adapter = TrainableLora(
            network,
            config.lora.targets,
            rank=row.rank,
            alpha=row.rank,
            generator=random_source(config.training.seed, "adapter"),
            device=backend.device,
        )
        trained = TrainedLora(adapter, MODEL_NAMES[opened.version])
        run = TrainingRun(config, base, network, trained, entries, {}, Workers())
        try:
            steps = [_step(row, request, run, base, backend) for _ in range(row.steps + 1)]
        finally:
            adapter.detach()
        memory, host = backend.memory(), watch.mark()
        values = sum(parameter.numel() for parameter in run.parameters.values())
        held = base.host_bytes
    counted = steps[1:]
    free = None if memory.total is None or memory.free is None else memory.total - memory.free
    del run, adapter, network
    backend.empty_cache()
    return {
        "step_s": statistics.median(step["seconds"] for step in counted),
        "steps": steps,
        "bytes_to_device_per_step": statistics.median(step["bytes_to_device"] for step in counted),
        "planned_bytes_per_step": base.bytes_per_pass,
        "stalls_per_step": statistics.median(step["stalls"] for step in counted),
        "residents": len(base.plan.residents),
        "blocks": base.plan.num_blocks,
        "slots": base.plan.slots,
        "pinned": base.plan.pinned,
        "activations_on_host": base.stash is not None,
        "adapter_values": values,
        "planned_vram_bytes": base.plan.peak_vram_bytes,
        "planned_step_s": 2 * base.plan.traversal_s,
        "context_bytes": base.budget.reserve_bytes,
        "limit_bytes": limit,
        "cap_enforced": cap is not None and backend.capabilities.memory_cap,
        "peak_allocated_bytes": memory.peak_allocated,
        "peak_reserved_bytes": memory.peak_reserved,
        "device_used_bytes": free,
        "weights_host_bytes": held,
        "peak_host_bytes": host.own,
        "peak_rss_bytes": host.resident,
        "ready_s": entered_s,
    }


def _step(
    row: TrainRow, request: str, run: TrainingRun, base: StreamedBase, backend: Backend
) -> dict[str, Any]:
    """One step of the trainer, the device's work included."""
    before, begun = base.traffic, time.perf_counter()
    values = run.advance()
    backend.synchronize()
    seconds = time.perf_counter() - begun
    moved = base.traffic - before
    _tell(row, f"{request}: step {run.step} of {row.steps + 1} in {seconds:.3f} s, loss {values['loss']:.4f}")
    return {
        "seconds": seconds,
        "bytes_to_device": moved.bytes_to_device,
        "bytes_from_disk": moved.bytes_from_disk,
        "stalls": moved.stalls,
        "loss": values["loss"],
        "gradient_norm": values["gradient_norm"],
    }


def _config(row: TrainRow, request: str, opened: OpenedModels) -> TrainConfig:
    folder = Path(row.folder)
    return TrainConfig(
        model=ModelSection(checkpoint=("synthetic",), device=row.device, dtype=row.dtype),
        data=DataSection(source=folder, folder=folder / "samples" / f"{row.model}-{request}", buckets=()),
        output=OutputSection(folder=folder / "none"),
        lora=LoraSection(rank=row.rank),
        training=TrainingSection(steps=row.steps + 1, optimizer=row.optimizer),
        memory=MemorySection(
            vram_limit=None if row.cap_gb is None else USABLE * row.cap_gb,
            storage=row.storage,
            activations=row.activations,
        ),
    )


def _entries(config: TrainConfig, request: str, opened: OpenedModels) -> tuple[Any, ...]:
    """A sample of unit variance of the size, written as preprocessing does."""
    (weights,) = opened.networks.values()
    shape = weights.config
    height, width, frames = (int(number) for number in request.split("x"))
    random = torch.Generator().manual_seed(1)

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random)

    video = video_latent_shape(frames, height, width)
    widths = [shape.caption_channels] * 2
    if shape.caption_proj_before_connector:
        widths = [shape.cross_attention_dim, shape.audio_cross_attention_dim]
    sample = Sample(
        video=noise(1, shape.in_channels, *video),
        audio=noise(1, shape.audio_in_channels // MEL, round(frames / FPS * AUDIO_PER_S), MEL),
        context=PromptContext(*(noise(1, TEXT_TOKENS, w).to(torch.bfloat16) for w in widths)),
        fps=FPS,
    )
    folder = config.data.folder
    folder.mkdir(parents=True, exist_ok=True)
    sample.save(folder / "0.safetensors", source="none", caption="noise")
    entries = (sample.entry("0.safetensors", source="none", caption="noise"),)
    write_index(folder, entries)
    return entries


def _tell(row: TrainRow, text: str) -> None:
    print(f"{row.name}: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure the row in the arguments."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    row = TrainRow.from_json(sys.argv[1])
    try:
        result = measure(row)
    except (DiffSynthError, RuntimeError, OSError) as error:
        result = {"name": row.name, "failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
