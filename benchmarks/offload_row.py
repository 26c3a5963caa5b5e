"""One row of :mod:`benchmarks.offload`, in a process of its own: ``python -m benchmarks.offload_row JSON``.

The last line of the standard output is the result, as JSON.
"""

import json
import logging
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.footprint import Held, Watch, high_water_mark
from benchmarks.synthetic import Dimensions, open_synthetic, open_written, synthetic_lora
from diffsynth.device import Backend, backend_for, resolve_device
from diffsynth.errors import Cancelled, DiffSynthError
from diffsynth.lora import Lora
from diffsynth.pipelines.assemble import PART_OF, Assembly, OpenedModels
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.memory import ManagedMemory
from diffsynth.pipelines.packing import PackedWeights
from diffsynth.pipelines.phases import PhaseRun
from diffsynth.pipelines.progress import Progress
from diffsynth.pipelines.prompt_cache import PromptCache
from diffsynth.pipelines.result import Result
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.vram.cache import PackedCache
from diffsynth.vram.file_source import MappedSource
from diffsynth.vram.plan import PhasePlan
from diffsynth.vram.planner import Budget
from diffsynth.vram.source import BlockSource
from diffsynth.vram.streamer import Traffic

ROWS: Mapping[str, str] = {
    "first-start": "no packed file yet; ends after the first step",
    "second-start": "packed files there, not in the system's file cache; ends after the first step",
    "warm-start": "packed files there and in the file cache; ends after the first step",
    "resident": "everything on the device, no limit",
    "streamed": "device memory limited, blocks in host memory",
    "shared": "device and host memory limited, part of the blocks on the disk",
    "mapped": "device memory limited, packed files mapped",
    "disk": "device memory limited, every block read from the disk every time",
    "no-cache": "device memory limited, packed into host memory, no packed file",
}
STARTS = ("first-start", "second-start", "warm-start")
FROM_DISK = ("disk", "shared")
USABLE = 0.9
"""Share of a card's memory that one process gets."""
GB = 2**30
DISK_HOST_GB = 6.0
PROMPT = "A lighthouse keeper climbs a spiral stair at dusk while the wind howls outside. " * 12
PICTURE = Path(__file__).parents[1] / "tests" / "golden" / "pipelines" / "tiny_ltx2" / "cond_image_0.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One generation."""

    mode: str
    height: int
    width: int
    num_frames: int
    passes: int
    steps: int
    image: bool = False

    @property
    def name(self) -> str:
        """Short, and the same in every row."""
        size = f"{self.height}x{self.width}x{self.num_frames}"
        return f"{self.mode} {size} x{self.passes}{' image' if self.image else ''}"

    def request(self, num_layers: int) -> GenerateRequest:
        """The request, with one more step for warming up."""
        distilled = self.mode == "distilled"
        guidance = _guidance(self.passes, num_layers)
        return GenerateRequest(
            prompt=PROMPT,
            negative_prompt="blurry, noisy",
            seed=1,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            num_inference_steps=None if distilled else self.steps + 1,
            use_distilled_pipeline=distilled,
            use_two_stage_pipeline=self.mode != "one-stage",
            video_guidance=None if distilled else guidance,
            audio_guidance=None if distilled else guidance,
            input_images=(str(PICTURE),) if self.image else (),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What to measure, and under which limits."""

    name: str
    model: str
    layers: int | None
    cap_gb: float
    host_gb: float
    storage: str
    device: str | None
    dtype: str
    folder: str
    cases: tuple[Case, ...]
    files: bool = False
    """Weights come from written checkpoints, instead of being made when they are read."""

    @classmethod
    def from_json(cls, text: str) -> "Row":
        """The row that ``json.dumps(asdict(row))`` wrote."""
        data = json.loads(text)
        return cls(**{**data, "cases": tuple(Case(**case) for case in data["cases"])})

    @property
    def limits(self) -> MemoryLimits:
        """As a user would state them."""
        host = {"shared": self.host_gb, "disk": DISK_HOST_GB}.get(self.name)
        vram = None if self.name == "resident" else USABLE * self.cap_gb
        cache = self.name != "no-cache"
        return MemoryLimits(vram_limit=vram, host_limit=host, storage=self.storage, cache=cache)


class _MappedWeights(PackedWeights):
    """Blocks come from the mapped packed file, wherever the plan would keep them."""

    def source(self, part: str, plan: PhasePlan | None) -> BlockSource:
        super().source(part, plan)
        return MappedSource(self._files[part], self._backend)


class MeasuredMemory(ManagedMemory):
    """A memory manager that watches its phases.  Its attributes are about the run since :meth:`begin`."""

    def __init__(
        self, opened: OpenedModels, row: Row, backend: Backend, budget: Budget, assembly: Assembly
    ) -> None:
        weights = {PART_OF[kind]: network for kind, network in opened.networks.items()}
        storage = row.limits.storage_policy(opened.configs, opened.networks)
        cache = PackedCache() if row.limits.cache else None
        on_disk = list(weights) if row.name == "disk" else []
        parts = assembly.parts
        super().__init__(parts, weights, storage, backend, budget, cache=cache, on_disk=on_disk)
        if row.name == "mapped":
            self._weights = _MappedWeights(weights, storage, parts.dtype, backend, cache=cache)
        self.phases: list[dict[str, Any]] = []

    def begin(self, watch: Watch) -> None:
        """A new run."""
        self.phases, self._watch = [], watch

    def traffic(self) -> Traffic:
        """What the present phase has moved so far."""
        return sum((managed.traffic for managed in self._managed.values()), Traffic())

    @contextmanager
    def phase(self, name: str) -> Iterator[PhaseRun]:
        """As the memory manager has it, with a clock and a look at all memories."""
        self._backend.synchronize()
        self._watch.mark()
        started = time.perf_counter()
        with super().phase(name) as run:
            yield run
            self._backend.synchronize()
        memory, host = self._backend.memory(), self._watch.mark()
        figures = self.report()["phases"][-1]
        used = None if memory.total is None or memory.free is None else memory.total - memory.free
        self.phases.append(
            {
                **figures,
                "seconds": time.perf_counter() - started,
                "peak_vram_reserved_bytes": memory.peak_reserved,
                "device_used_at_end_bytes": used,
                **_host_figures(host),
            }
        )


class Steps:
    """Listens to a run: seconds and bytes of every denoising step."""

    def __init__(
        self,
        memory: MeasuredMemory,
        backend: Backend,
        *,
        started: float,
        stop: bool,
        between: Callable[[], None],
    ) -> None:
        """
        Args:
            memory: that is measured.
            backend: of the device.
            started: when the row did.
            stop: end after the first step.
            between: called after every step, outside of what is timed.
        """
        self.first_step_s: float | None = None
        """From the start of the row until the first step was done."""
        self._memory = memory
        self._backend = backend
        self._started = started
        self._stop = stop
        self._between = between
        self._stages: dict[int, list[dict[str, Any]]] = {}
        self._before = (time.perf_counter(), Traffic())

    def __call__(self, progress: Progress) -> None:
        """See :class:`~diffsynth.pipelines.progress.OnProgress`."""
        if progress.denoised is None:
            return
        self._backend.synchronize()
        now, moved = time.perf_counter(), self._memory.traffic()
        if progress.done:
            if self.first_step_s is None:
                self.first_step_s = now - self._started
            then, earlier = self._before
            difference = moved - earlier
            self._stages.setdefault(progress.denoised.stage.number, []).append(
                {"seconds": now - then, **asdict(difference)}
            )
            if self._stop:
                raise Cancelled("the first step is done", hint="this is a measurement")
            self._between()
        self._before = (time.perf_counter(), moved)

    def summary(self, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        """By stage: medians over all steps but the first, which also loads residents."""
        found = []
        for stage, steps in self._stages.items():
            counted = steps[1:]
            if not counted:
                continue
            planned = next(p for p in plan["phases"] if p["name"] == f"denoise {stage}")
            medians = {key: statistics.median(step[key] for step in counted) for key in counted[0]}
            found.append(
                {
                    "stage": stage,
                    "steps": len(counted),
                    "step_s": medians["seconds"],
                    "step_s_all": [step["seconds"] for step in steps],
                    "planned_step_s": planned["traversal_s"],
                    "bytes_to_device_per_step": medians["bytes_to_device"],
                    "planned_bytes_per_step": planned["bytes_per_traversal"],
                    "bytes_from_disk_per_step": medians["bytes_from_disk"],
                    "planned_disk_bytes_per_step": planned["disk_bytes_per_traversal"],
                    "stalls_per_step": medians["stalls"],
                    "residents": len(planned["residents"]),
                    "blocks_in_ram": len(planned["ram_blocks"]),
                    "pinned": planned["pinned"],
                }
            )
        return found


def measure(row: Row) -> dict[str, Any]:
    """Run all cases of a row."""
    started = time.perf_counter()
    device = resolve_device(row.device)
    backend = backend_for(device)
    folder = Path(row.folder)
    os.environ["DIFFSYNTH_CACHE_PATH"] = str(folder / "cache")
    before = _packed_files(folder)
    if row.name == "first-start":
        PackedCache().clear()
        _drop_from_file_cache(sorted(folder.rglob("*.safetensors")))
    elif row.name == "second-start":
        _drop_from_file_cache(before)
    limit = row.limits.vram_limit
    capped = isinstance(limit, float) and backend.capabilities.memory_cap
    budget = row.limits.budget(backend)
    if isinstance(limit, float):
        backend.set_memory_cap(max(1, int(limit * GB) - budget.reserve_bytes))
    result: dict[str, Any] = {"row": row.name, "what": ROWS[row.name], "limits": asdict(row.limits)}
    result |= {"cap_enforced": capped, "context_bytes": budget.reserve_bytes}
    result |= {"storage": row.storage, "cases": []}
    with Watch() as watch, ExitStack() as stack:
        pipe, memory = _pipeline(row, device, backend, budget, stack)
        result["opened_s"] = time.perf_counter() - started
        for case in row.cases:
            memory.begin(watch)
            result["cases"].append(_measure_case(pipe, memory, backend, row, case, started))
        result["converted"] = row.name != "no-cache" and len(_packed_files(folder)) > len(
            [] if row.name == "first-start" else before
        )
        result |= {f"whole_{name}": value for name, value in _host_figures(watch.peak).items()}
        memory.close()
    result["high_water_mark_bytes"] = high_water_mark()
    result["bytes_read_from_storage"] = _read_bytes()
    return result


def _measure_case(
    pipe: LTX2AudioVideoPipeline,
    memory: MeasuredMemory,
    backend: Backend,
    row: Row,
    case: Case,
    started: float,
) -> dict[str, Any]:
    found: dict[str, Any] = {"case": case.name, **asdict(case)}
    folder = Path(row.folder)

    def between() -> None:
        if row.name in FROM_DISK:  # otherwise the system would hand out what it read a step ago
            _drop_from_file_cache(_packed_files(folder))

    steps = Steps(memory, backend, started=started, stop=row.name in STARTS, between=between)
    begun = time.perf_counter()
    assert pipe.parts.dit is not None
    request = case.request(pipe.parts.dit.config.num_layers)
    try:
        found["latent_crc32"] = _checksum(pipe.generate(request, on_progress=steps))
    except Cancelled:
        found["ended"] = "after the first step"
    except (DiffSynthError, RuntimeError, ValueError) as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    report = memory.report()
    plan = report["plan"]
    return found | {
        "seconds": time.perf_counter() - begun,
        "first_step_s": steps.first_step_s,
        "planned_peak_vram_bytes": plan["peak_vram_bytes"],
        "planned_peak_host_bytes": plan["peak_host_bytes"],
        "planned_seconds": plan["seconds"],
        "stepped_down": report.get("stepped_down", []),
        "phases": memory.phases,
        "denoise": steps.summary(plan),
    }


def _pipeline(
    row: Row, device: torch.device, backend: Backend, budget: Budget, stack: ExitStack
) -> tuple[LTX2AudioVideoPipeline, MeasuredMemory]:
    dimensions = Dimensions.of(row.model, row.layers)
    folder = Path(row.folder)
    opened = open_written(dimensions, folder) if row.files else open_synthetic(dimensions, folder)
    assembly = opened.hold(device, getattr(torch, row.dtype))
    lora: Lora | None = None
    if any(case.mode == "two-stage" for case in row.cases):
        assert assembly.parts.dit is not None
        lora = synthetic_lora(dimensions, assembly.parts.dit, folder)
    memory = MeasuredMemory(opened, row, backend, budget, assembly)
    assembly.parts.memory = memory
    prompts = Path(stack.enter_context(TemporaryDirectory()))
    # New in every row, so that each one encodes its prompts once.
    assembly.parts.prompt_cache = PromptCache(prompts, files=(), settings=row.name)
    pipe = LTX2AudioVideoPipeline(assembly, stage2_lora=lora)
    return pipe, memory


def _guidance(passes: int, num_layers: int) -> GuidanceParams:
    """Parameters that need so many passes: cond, uncond, perturbed, isolated."""
    if passes not in (1, 2, 3, 4):
        raise ValueError(f"1 to 4 passes, not {passes}")
    params = GuidanceParams(cfg_scale=3.0 if passes > 1 else 1.0)
    if passes > 2:
        params = replace(params, stg_scale=1.0, stg_blocks=(min(29, num_layers - 1),))
    return replace(params, modality_scale=3.0) if passes > 3 else params


def _checksum(result: Result) -> str:
    """Of the final latents: rows that agree in it agree in every bit."""
    crc32 = 0
    for latent in (result.video_latent, result.audio_latent):
        if latent is not None:
            content = latent.detach().cpu().contiguous().view(torch.uint8)
            crc32 = zlib.crc32(content.numpy().data, crc32)
    return f"{crc32:08x}"


def _host_figures(host: Held) -> dict[str, int]:
    return {"peak_host_bytes": host.own, "peak_rss_bytes": host.resident}


def _read_bytes() -> int | None:
    """What the process had the system fetch from storage; None where it does not count that."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _packed_files(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "packed").glob("*.safetensors"))


def _drop_from_file_cache(paths: Sequence[Path]) -> None:
    """Have the system read files from the disk again; where it cannot be told, nothing happens."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure the row in the arguments."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    started = time.perf_counter()
    row = Row.from_json(sys.argv[1])
    try:
        result = measure(row)
    except (DiffSynthError, RuntimeError, OSError) as error:
        result = {"row": row.name, "failed": f"{type(error).__name__}: {error}"}
    print(json.dumps({**result, "process_s": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
