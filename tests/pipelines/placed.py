"""Small generations under the memory manager, with the weights where a test wants them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.memory import ManagedMemory
from diffsynth.pipelines.nearest import plan_request
from diffsynth.pipelines.progress import OnProgress, ignore
from diffsynth.pipelines.storage import Storage
from diffsynth.request import GenerateRequest
from diffsynth.vram.formats import AS_IS, decode, effective_format, encode
from diffsynth.vram.plan import PhasePlan, Plan
from diffsynth.vram.planner import Budget, PhaseDemand, fits, spread
from tests.pipelines.tiny import PICTURES, load, pixels

SMALL: Mapping[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
PICTURED: Mapping[str, Any] = {"input_images": tuple(map(str, PICTURES)), "input_images_indexes": (0, -1)}
TWO_STAGES: Mapping[str, Any] = {**SMALL, "height": 128, "width": 128, "use_two_stage_pipeline": True}
MODES: Mapping[str, Mapping[str, Any]] = {
    "one stage": SMALL,
    "two stages": TWO_STAGES,
    "distilled": {**TWO_STAGES, "use_distilled_pipeline": True, "num_inference_steps": None},
    "sound alone": {**SMALL, "audio_only": True},
}


class Made(NamedTuple):
    """Everything that a generation makes, on the host."""

    pixels: bytes
    sound: Tensor
    video: Tensor | None
    audio: Tensor | None


def asked(**arguments: Any) -> GenerateRequest:
    given = {"prompt": "a boat on a lake", "negative_prompt": "blurry", "seed": 43, **SMALL, **arguments}
    return GenerateRequest(**given).validate()


def make(pipe: LTX2AudioVideoPipeline, on_progress: OnProgress = ignore, **arguments: Any) -> Made:
    result = pipe.generate(asked(**arguments), on_progress=on_progress)
    assert result.waveform is not None
    frames = b"" if result.frames is None else pixels(result.frames)
    latents = (None if t is None else t.cpu() for t in (result.video_latent, result.audio_latent))
    return Made(frames, result.waveform.samples, *latents)


def same(first: Made, second: Made) -> bool:
    """Whether every bit of pictures, sound and latents is equal."""
    pairs = zip(first[1:], second[1:], strict=True)
    return first.pixels == second.pixels and all(_same(*pair) for pair in pairs)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)


def compute_dtype(storage: str) -> torch.dtype:
    return torch.float32 if storage == "f32" else torch.bfloat16


def unmanaged(
    storage: str,
    *models: Path,
    parts: Sequence[str] = ("dit", "text_encoder", "text_encoder_post_modules"),
) -> LTX2AudioVideoPipeline:
    """A plain pipeline on the CPU; the weights of some parts went through a storage format."""
    pipe = load(*models, dtype=compute_dtype(storage))
    policy = Storage.named(storage)
    for part in parts:
        module: nn.Module = getattr(pipe, part)
        for name, layer in module.named_modules():
            format = policy.format_of(part, f"{name}.weight") if isinstance(layer, nn.Linear) else None
            if format is None or format in AS_IS:
                continue
            weight = layer.weight
            assert isinstance(weight, Tensor)
            shape = tuple(weight.shape)
            format = effective_format(format, shape)
            decoded = decode(encode(weight.float(), format), format, shape, weight.dtype)
            layer.weight = nn.Parameter(decoded, requires_grad=False)
    return pipe


class Placement(NamedTuple):
    """How the blocks of every phase that has some are placed."""

    slots: int
    num_residents: int = 0
    in_ram: bool = False
    pinned: bool = False

    def of(self, phase: PhasePlan, blocks: Mapping[str, int]) -> PhasePlan:
        """The phase with its blocks, given with the bytes that move with each, placed so."""
        names = list(blocks)
        residents = tuple(names[i] for i in spread(min(self.num_residents, len(names)), len(names)))
        streamed = tuple(name for name in names if name not in residents)
        return replace(
            phase,
            slots=self.slots,
            residents=residents,
            ram_blocks=streamed if self.in_ram else (),
            pinned=self.pinned,
            bytes_per_traversal=sum(blocks[name] for name in streamed),
        )


def place(monkeypatch: pytest.MonkeyPatch, placement: Placement) -> None:
    """Every plan made from now on places the blocks so: in tiny models they fit as soon as decoding does."""

    def planned(*args: Any, **how: Any) -> Plan:
        def placed(phase: PhasePlan) -> PhasePlan:
            blocks = {block.name: block.nbytes for block in how["parts"].parts[phase.part].blocks}
            if phase.part == "dit":
                beside = how["lora"][int(phase.name[-1])].nbytes
                blocks = {name: nbytes + beside.get(name, 0) for name, nbytes in blocks.items()}
            return placement.of(phase, blocks) if blocks else phase

        return Plan(phases=tuple(map(placed, plan_request(*args, **how).phases)))

    monkeypatch.setattr("diffsynth.pipelines.memory.plan_request", planned)


def manager(pipe: LTX2AudioVideoPipeline) -> ManagedMemory:
    assert isinstance(pipe.parts.memory, ManagedMemory)
    return pipe.parts.memory


def smallest_limit(pipe: LTX2AudioVideoPipeline, **arguments: Any) -> int:
    """Device bytes that the leanest plan of a request needs; it is run once for that."""
    make(pipe, **arguments)
    memory = manager(pipe)
    return smallest_of(memory._demands, memory._budget)


def smallest_of(demands: Sequence[PhaseDemand], budget: Budget) -> int:
    """Device bytes that the leanest plan of some phases needs."""
    low, high = 0, 2**30
    while low < high:
        middle = (low + high) // 2
        enough = fits(demands, replace(budget, vram_bytes=middle))
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def phases(pipe: LTX2AudioVideoPipeline) -> dict[str, dict[str, Any]]:
    """Figures of the last run by phase."""
    return {figures["phase"]: figures for figures in pipe.memory_report()["phases"]}
