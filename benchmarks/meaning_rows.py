"""Rows of :mod:`benchmarks.meaning`: clips of held-out prompts made in one way, and what they show.

A way is a storage format, a mode, a placement of the blocks and a manner of decoding.  Rows that differ in
the decoding only share their latents.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.device import backend_for, resolve_device
from diffsynth.errors import DiffSynthError, RequestError
from diffsynth.loader import ModelConfig
from diffsynth.nano.judge import ATTRIBUTES, Summary, Verdict, judge, psnr
from diffsynth.nano.world import Description, held_out_descriptions, words
from diffsynth.pipelines.assemble import PART_OF, open_models, read_transformer_lora
from diffsynth.pipelines.inputs import load_inputs
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.memory import ManagedMemory
from diffsynth.pipelines.rescue import FinalLatents
from diffsynth.pipelines.result import Result
from diffsynth.request import GenerateRequest
from diffsynth.vram.cache import PackedCache
from diffsynth.vram.plan import PhasePlan, Plan
from diffsynth.vram.planner import Budget
from training.nano.clips import Scenes, as_uint8

FORMATS = ("bf16", "int8", "fp8", "e4m3", "e5m2", "int4")
MODES = ("one-stage", "two-stage", "distilled", "distilled-two-stage", "image")
"""The last one is one-stage, with the first frame of a drawn clip as first frame."""
PLACEMENTS = ("resident", "streamed", "disk")
"""All blocks on the device; in host memory and brought in turn; read from the disk every time."""
DECODINGS = ("whole", "tiled")
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_DRAWN = 900
"""Held-out descriptions, of about a thousand, among which a word is looked for."""
NUM_REPEATED = 2
"""Clips of every way that are made twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all rows have in common."""

    model: str
    prompts: int = 64
    word: str | None = None
    """That every caption has; None: any."""
    side: int = 256
    num_frames: int = 25
    steps: int = 20
    cfg_scale: float = 3.0
    device: str | None = None
    dtype: str = "bfloat16"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How latents are made, and in which manners they are decoded."""

    format: str
    mode: str
    placement: str
    decodings: tuple[str, ...] = DECODINGS

    def names(self) -> list[str]:
        """One for each row."""
        return [f"{self.format} {self.mode} {self.placement} {decoding}" for decoding in self.decodings]


class PlacedMemory(ManagedMemory):
    """A memory manager that keeps no block on the device: tiny blocks would all fit."""

    def _begin(self, found: Plan, budget: Budget) -> None:
        super()._begin(replace(found, phases=tuple(map(self._streamed, found.phases))), budget)

    def _streamed(self, phase: PhasePlan) -> PhasePlan:
        part = self._sizes.parts.get(phase.part)
        blocks = {} if part is None else {block.name: block.nbytes for block in part.blocks}
        if not blocks:
            return phase
        on_disk = self._weights._cache is not None
        return replace(
            phase,
            residents=(),
            slots=2,
            ram_blocks=() if on_disk else tuple(blocks),
            bytes_per_traversal=sum(blocks.values()),
            disk_bytes_per_traversal=sum(blocks.values()) if on_disk else 0,
        )


def measure(way: Way, settings: Settings) -> list[dict[str, Any]]:
    """A row for each manner of decoding; a way that this model cannot go says why."""
    begun = time.perf_counter()
    verdicts: dict[str, list[Verdict]] = {decoding: [] for decoding in way.decodings}
    ratios: dict[str, list[float]] = {decoding: [] for decoding in way.decodings}
    crcs: list[str] = []
    repeated: list[bool] = []
    try:
        with opened(way, settings) as pipe:
            for number, description in enumerate(descriptions(settings)):
                made = generate(pipe, way, settings, number, description)
                crcs.append(checksum(made))
                if number < NUM_REPEATED:
                    again = generate(pipe, way, settings, number, description)
                    repeated.append(checksum(again) == crcs[-1])
                for decoding in way.decodings:
                    video, sound, rate = decoded(pipe, made, decoding, way, settings)
                    verdicts[decoding].append(judge(video, sound, rate, description))
                    if way.mode == "image":
                        first = first_frame(description, number, settings.side)
                        ratios[decoding].append(psnr(video[0], first))
    except (DiffSynthError, RuntimeError) as error:
        if not isinstance(error, DiffSynthError) and "out of memory" not in str(error):
            raise
        failed = f"{type(error).__name__}: {error}"
        return [{"row": name, "way": asdict(way), "failed": failed} for name in way.names()]
    seconds = time.perf_counter() - begun
    shared = {"way": asdict(way), "latent_crc32": crcs, "repeats": all(repeated), "seconds": seconds}
    return [
        {"row": name, "decoding": decoding, **shared, **figures(verdicts[decoding], ratios[decoding])}
        for name, decoding in zip(way.names(), way.decodings, strict=True)
    ]


def figures(verdicts: Sequence[Verdict], ratios: Sequence[float]) -> dict[str, Any]:
    """Percentages, what was wrong clip by clip, and how near the first frames are to the pictures given."""
    summary = Summary.of(verdicts)
    wrong = {n: [i for i, v in enumerate(verdicts) if getattr(v, n) is False] for n in ATTRIBUTES}
    found: dict[str, Any] = {
        "percent": summary.percent,
        "judged": dict(summary.judged),
        "all_right": 100 * fmean(v.right for v in verdicts) if verdicts else None,
        "wrong": {name: clips for name, clips in wrong.items() if clips},
    }
    if ratios:
        found["first_frame_psnr"] = {"mean": fmean(ratios), "min": min(ratios), "all": list(ratios)}
    return found


def descriptions(settings: Settings) -> list[Description]:
    """What is asked for: never seen in training.  Raises RequestError when too few have the word."""
    word, count = settings.word, settings.prompts
    if word is None:
        return held_out_descriptions(count, settings.seed)
    drawn = held_out_descriptions(_DRAWN, settings.seed)
    found = [description for description in drawn if word in words(description.caption())]
    if len(found) < count:
        raise RequestError(f"{len(found)} prompts have the word {word!r}", hint=f"--prompts {len(found)}")
    return found[:count]


def first_frame(description: Description, number: int, side: int) -> Tensor:
    """(H, W, 3) uint8: the beginning of a drawn clip of this description."""
    return as_uint8(Scenes.of([description], seed=number).video(side, num_frames=1))[0, 0]


def request_for(way: Way, settings: Settings, number: int, description: Description) -> GenerateRequest:
    """The request for one prompt; captions take turns in their forms."""
    distilled = way.mode.startswith("distilled")
    return GenerateRequest(
        prompt=description.caption(number),
        negative_prompt="",
        seed=settings.seed + number,
        height=settings.side,
        width=settings.side,
        num_frames=settings.num_frames,
        num_inference_steps=None if distilled else settings.steps,
        cfg_scale=None if distilled else settings.cfg_scale,
        use_distilled_pipeline=distilled,
        use_two_stage_pipeline=way.mode.endswith("two-stage"),
        stage2_lora_strength=1.0 if way.mode == "two-stage" else None,
        input_images=("first frame",) if way.mode == "image" else (),
        tiled=False,
    )


def generate(
    pipe: LTX2AudioVideoPipeline, way: Way, settings: Settings, number: int, description: Description
) -> Result:
    """Make one clip, decoded whole."""
    request = request_for(way, settings, number, description)
    pictures = []
    if way.mode == "image":
        pictures = [Image.fromarray(first_frame(description, number, settings.side).numpy())]
    return pipe.generate(request, load_inputs(request, input_images=pictures))


def decoded(
    pipe: LTX2AudioVideoPipeline, made: Result, decoding: str, way: Way, settings: Settings
) -> tuple[Tensor, Tensor, int]:
    """Frames (F, H, W, 3) uint8, sound (2, S) and its rate in Hz."""
    if decoding == "tiled":
        record = {**made.record, "request": replace(made.request, **tiles(settings)).to_dict()}
        latents = FinalLatents(video=made.video_latent, audio=made.audio_latent, sound=None, record=record)
        made = pipe.decode(latents)
    if made.frames is None or made.waveform is None:
        raise RequestError("the model makes no video with sound", hint="a model with all its parts")
    frames = torch.from_numpy(np.stack([np.asarray(frame) for frame in made.frames]))
    return frames, made.waveform.samples, made.waveform.sampling_rate


def tiles(settings: Settings) -> dict[str, Any]:
    """Tiles of half the side and part of the length, so that there are several both ways."""
    size = max(64, settings.side // 2 // 32 * 32)
    return {
        "tiled": True,
        "tile_size_in_pixels": size,
        "tile_overlap_in_pixels": max(32, size // 2 // 32 * 32),
        "tile_size_in_frames": 16,
        "tile_overlap_in_frames": 8,
    }


def checksum(result: Result) -> str:
    """Of the final latents: clips that agree in it agree in every bit."""
    crc32 = 0
    for latent in (result.video_latent, result.audio_latent):
        if latent is not None:
            crc32 = zlib.crc32(latent.detach().cpu().contiguous().view(torch.uint8).numpy().data, crc32)
    return f"{crc32:08x}"


@contextmanager
def opened(way: Way, settings: Settings) -> Iterator[LTX2AudioVideoPipeline]:
    """The model of the settings, stored and placed as a way has it."""
    folder, dtype = Path(settings.model), getattr(torch, settings.dtype)
    device = resolve_device(settings.device)
    gemma = ModelConfig(path=folder / "gemma")
    checkpoints, lora_file = files(folder, way)
    models = open_models([*(ModelConfig(path=path) for path in checkpoints), gemma], gemma)
    # What is stored as it is computed with needs no memory manager, as in most runs of it.
    plain = way.placement == "resident" and dtype == _DTYPES.get(way.format)
    with TemporaryDirectory() as cache:
        assembly = models.load(device, dtype) if plain else models.hold(device, dtype)
        if not plain:
            kind = ManagedMemory if way.placement == "resident" else PlacedMemory
            limits = MemoryLimits(storage=way.format)
            backend = backend_for(device)
            parts = assembly.parts
            parts.memory = kind(
                parts,
                {PART_OF[network]: weights for network, weights in models.networks.items()},
                limits.storage_policy(models.configs, models.networks),
                backend,
                limits.budget(backend),
                cache=PackedCache(cache) if way.placement == "disk" else None,
                on_disk=list(PART_OF.values()) if way.placement == "disk" else (),
            )
        distilled = way.mode.startswith("distilled")
        lora = None if lora_file is None else read_transformer_lora(assembly.parts, lora_file)
        pipe = LTX2AudioVideoPipeline(assembly, stage2_lora=None if distilled else lora)
        if distilled and lora_file is not None:
            pipe.load_lora(pipe.dit, lora_file)
        yield pipe
        if isinstance(assembly.parts.memory, ManagedMemory):
            assembly.parts.memory.close()


def files(folder: Path, way: Way) -> tuple[list[Path], Path | None]:
    """The checkpoints of a way, and the distilled LoRA unless the checkpoint is distilled itself."""
    found = sorted(folder.glob("*.safetensors"))
    loras = [path for path in found if "lora" in path.name and "distilled" in path.name]
    checkpoints = [path for path in found if "lora" not in path.name]
    distilled = [path for path in checkpoints if "distilled" in path.name]
    if distilled and way.mode.startswith("distilled"):
        return [path for path in checkpoints if "dev" not in path.name], None
    return [path for path in checkpoints if path not in distilled], loras[0] if loras else None
