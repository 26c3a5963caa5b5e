"""Small generations under the memory manager, with the weights where a test wants them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diffsynth.pipelines.inputs import Inputs, load_inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.memory import ManagedMemory
from diffsynth.pipelines.nearest import plan_request
from diffsynth.pipelines.progress import OnProgress, ignore
from diffsynth.pipelines.storage import Storage
from diffsynth.request import GenerateRequest
from diffsynth.utils.audio import Waveform
from diffsynth.vram.formats import AS_IS, decode, effective_format, encode
from diffsynth.vram.plan import PhasePlan, Plan
from diffsynth.vram.planner import Budget, PhaseDemand, fits, spread
from tests.pipelines.tiny import PICTURES, load, pixels

SMALL: Mapping[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
PICTURED: Mapping[str, Any] = {"input_images": tuple(map(str, PICTURES)), "input_images_indexes": (0, -1)}
TWO_STAGES: Mapping[str, Any] = {**SMALL, "height": 128, "width": 128, "use_two_stage_pipeline": True}
DISTILLED: Mapping[str, Any] = {"use_distilled_pipeline": True, "num_inference_steps": None}
SOME_REGIONS: Mapping[str, Any] = {
    "retake_video": "clip",
    "retake_video_regions": ((0.0, 0.04),),
    "retake_audio": "sound",
    "retake_audio_regions": ((0.1, 0.2),),
}
REFERENCES: Mapping[str, Any] = {
    **DISTILLED,
    "in_context_videos": ("clip", "clip"),
    "in_context_downsample_factor": 1,
    "in_context_strength": (1.0, 0.8),
    "in_context_attention_strength": 0.6,
    "clear_lora_before_state_two": True,
}
HQ: Mapping[str, Any] = {
    "sampler": "res_2s",
    "dynamic_shift": True,
    "stage1_lora_strength": 0.25,
    "stage2_lora_strength": 0.5,
}


def every_mode(two_stages: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Arguments of a small generation by mode, those in two stages at the size of ``two_stages``."""
    return {
        "one stage": SMALL,
        "two stages": two_stages,
        "distilled": {**two_stages, **DISTILLED},
        "sound alone": {**SMALL, "audio_only": True},
        "HQ": {**two_stages, **HQ},
        "keyframes": {**two_stages, **PICTURED, "input_images_as_keyframes": True},
        "given sound": {**two_stages, "retake_audio": "sound"},
        "retake": {**SMALL, **SOME_REGIONS},
        "retake in two stages": {**two_stages, **SOME_REGIONS},
        "given clip": {**SMALL, "retake_video": "clip"},
        "reference clips": {**two_stages, **REFERENCES},
        "gradient estimation": {**SMALL, "sampler": "gradient_estimation", "num_inference_steps": 3},
        "ancestral": {**SMALL, "sampler": "ancestral", "num_inference_steps": 3},
    }


MODES: Mapping[str, Mapping[str, Any]] = every_mode(TWO_STAGES)


class Made(NamedTuple):
    """Everything that a generation makes, on the host."""

    pixels: bytes
    sound: Tensor
    video: Tensor | None
    audio: Tensor | None


def asked(**arguments: Any) -> GenerateRequest:
    given = {"prompt": "a boat on a lake", "negative_prompt": "blurry", "seed": 43, **SMALL, **arguments}
    return GenerateRequest(**given).validate()


def given(request: GenerateRequest) -> Inputs:
    """What the request names: pictures of the tiny set, and for every clip and sound the same random one."""
    random = torch.Generator().manual_seed(5)
    clip = torch.randint(0, 256, (request.num_frames, 40, 50, 3), generator=random, dtype=torch.uint8)
    sound = Waveform(torch.rand(1, 12000, generator=random) - 0.5, 24000)
    return load_inputs(
        request,
        input_images=request.input_images,
        in_context_videos=[clip for _ in request.in_context_videos],
        retake_video=clip if request.retake_video else None,
        retake_audio=sound if request.retake_audio else None,
    )


def make(pipe: LTX2AudioVideoPipeline, on_progress: OnProgress = ignore, **arguments: Any) -> Made:
    request = asked(**arguments)
    result = pipe.generate(request, given(request), on_progress)
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
    for part in parts:
        through_format(getattr(pipe, part), part, storage)
    return pipe


def through_format(module: nn.Module, part: str, storage: str) -> None:
    """Replace the weights of a network by what a storage format makes of them."""
    policy = Storage.named(storage)
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
