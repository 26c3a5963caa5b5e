"""LoRAs: every key format x every storage format x every place of the weights, one step of denoising each."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth.conditioning.text import PromptContext
from diffsynth.errors import RequestError
from diffsynth.lora import LoraUpdate, fuse, fuse_bias, linear_shapes
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.stages import plan_stages
from diffsynth.pipelines.state import GenerationState
from diffsynth.pipelines.units import Denoise
from diffsynth.sampling.conventions import OFFICIAL
from diffsynth.sampling.noise import noise_source
from diffsynth.vram.cache import FOLDER_VARIABLE
from tests.pipelines.float8 import in_float8
from tests.pipelines.lora_files import SCALE, WRITERS, Factors, random_factors, write_all, write_official
from tests.pipelines.placed import Placement, asked, place, through_format
from tests.pipelines.tiny import DEV, sections, tensors, write_checkpoint
from tests.standin import StandIn

CHECKPOINT = "fp8 checkpoint"
BF16_TOLERANCE = 0.01
"""How far results in bf16 lie from those in float32, relative to them."""
TOLERANCES: Mapping[str, float] = {
    "bf16": 0.01,
    "fp8": 2**-4,
    CHECKPOINT: 2**-4,
    "e4m3": 2**-4,
    "e5m2": 2**-3,
    "int8": 2**-6,
    "int4": 2**-4,
}
"""The same where the weights were stored anew after fusing: about half a step of the format near its largest
values, which quantising a weight moves it by."""
STORAGES = tuple(TOLERANCES)
PLAIN = "plain"
"""A pipeline without a memory manager, on the CPU, whose weights went through the storage format."""
PLACEMENTS: Mapping[str, Placement | None] = {
    PLAIN: None,
    "resident": Placement(slots=0, num_residents=99),
    "streamed": Placement(slots=1, in_ram=True),
    "on disk": Placement(slots=1),
}
STRENGTHS = (0.7, -0.4)
"""The first one, and what it is changed to."""


def is_chosen(layer: str) -> bool:
    """Whether the LoRA changes a layer: those outside the blocks, of the blocks every third part."""
    blocks = re.match(r"transformer_blocks\.(\d+)", layer)
    return blocks is None or (len(layer) + int(blocks[1])) % 3 == 0


class Latents(NamedTuple):
    video: Tensor
    audio: Tensor


def same(first: Latents, second: Latents) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def distance(first: Latents, second: Latents) -> float:
    """Relative to the second, of the stream that is farther away."""
    pairs = zip(first, second, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def denoised(pipe: LTX2AudioVideoPipeline, **arguments: Any) -> Latents:
    """One denoising stage, by default of one step with one pass, as a generation plans and runs it."""
    request = asked(**{"num_inference_steps": 1, "cfg_scale": 1.0, **arguments})
    (stage,) = plan_stages(request, pipe.parts.version)
    random = torch.Generator().manual_seed(3)
    contexts = [torch.randn(1, 8, 16, generator=random).to(pipe.parts.dtype) for _ in range(4)]
    state = GenerationState(
        request=request,
        inputs=Inputs(),
        conventions=OFFICIAL,
        stages=(stage,),
        noise=noise_source(OFFICIAL.noise_source, 1, "cpu"),
        audio_shape=(1, 8, 5, 16),
        positive=PromptContext(*contexts[:2]),
        negative=PromptContext(*contexts[2:]),
    )
    loras = partial(pipe._book.of_stage, request)
    with torch.inference_mode():
        pipe.parts.memory.prepare(request, loras=loras, prompts=())
        Denoise(stage, partial(loras, stage)).run(pipe.parts, state)
    assert state.video_latent is not None
    assert state.audio_latent is not None
    return Latents(state.video_latent.cpu(), state.audio_latent.cpu())


class Bench:
    """Two blocks of the tiny transformer in every storage format, and one LoRA in every key format."""

    def __init__(self, folder: Path) -> None:
        two_blocks = {key: value for key, value in tensors(DEV).items() if "transformer_blocks.2." not in key}
        config = sections()
        config["transformer"]["num_layers"] = 2
        self._files = {
            "": write_checkpoint(folder / "bf16.safetensors", two_blocks, config),
            CHECKPOINT: write_checkpoint(folder / "fp8.safetensors", in_float8(two_blocks), config),
        }
        network = self.plain("bf16").dit
        weights = {
            name: network.get_submodule(name).weight for name in filter(is_chosen, linear_shapes(network))
        }
        self.factors: Factors = random_factors(weights)
        self.files = write_all(self.factors, folder)
        self._expected: dict[str, Mapping[float, Latents]] = {}
        self._fused: dict[tuple[str, bool], Latents] = {}

    def open(self, storage: str, placement: Placement | None) -> LTX2AudioVideoPipeline:
        """The transformer alone."""
        if placement is None:
            return self.plain(storage)
        kept: dict[str, Any] = {"vram_limit": 8.0} if storage == CHECKPOINT else {"storage": storage}
        return self._load(storage, device="standin", **kept)

    def plain(self, storage: str, dtype: torch.dtype = torch.bfloat16) -> LTX2AudioVideoPipeline:
        pipe = self._load(storage, device="cpu", torch_dtype=dtype)
        if storage != CHECKPOINT:
            through_format(pipe.dit, "dit", storage)
        return pipe

    def _load(self, stored: str, **arguments: Any) -> LTX2AudioVideoPipeline:
        file = self._files.get(stored, self._files[""])
        return LTX2AudioVideoPipeline.from_pretrained(
            model_configs=[ModelConfig(path=file)], networks=["dit"], **arguments
        )

    def expected(self, storage: str) -> Mapping[float, Latents]:
        """By strength, with the official file in a plain pipeline; 0: without any LoRA."""
        if storage not in self._expected:
            pipe = self.plain(storage)
            found = {0.0: denoised(pipe)}
            for strength in STRENGTHS:
                pipe.load_lora(pipe.dit, self.files["official"], strength)
                found[strength] = denoised(pipe)
                pipe.clear_lora()
            self._expected[storage] = found
        return self._expected[storage]

    def fused(self, storage: str, *, stored_anew: bool) -> Latents:
        """With the first strength fused into the stored weights, in float32; or stored again after that."""
        if (storage, stored_anew) not in self._fused:
            pipe = self.plain(storage, torch.float32)
            for name, (down, up) in self.factors.items():
                layer = pipe.dit.get_submodule(name)
                update = LoraUpdate(down=down, up=up, scale=SCALE)
                weight = fuse(layer.weight, [(update, STRENGTHS[0])])
                layer.weight = nn.Parameter(weight, requires_grad=False)
            if stored_anew:
                through_format(pipe.dit, "dit", "fp8" if storage == CHECKPOINT else storage)
            self._fused[storage, stored_anew] = denoised(pipe)
        return self._fused[storage, stored_anew]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder / "cache"))
        yield Bench(folder)


class Placed(NamedTuple):
    storage: str
    placement: str
    pipe: LTX2AudioVideoPipeline


@pytest.fixture(scope="module")
def placed(request: pytest.FixtureRequest, bench: Bench) -> Iterator[Placed]:
    """One pipeline for LoRAs that come one after the other."""
    storage, name = request.param
    placement = PLACEMENTS[name]
    with pytest.MonkeyPatch.context() as patch, StandIn():
        if placement is not None:
            place(patch, placement)
        yield Placed(storage, name, bench.open(storage, placement))


def cells() -> list[Any]:
    """The whole product.  The quick third holds every pair of format, storage and placement."""
    axes = (enumerate(STORAGES), enumerate(PLACEMENTS), enumerate(WRITERS))
    found = []
    for (i, storage), (j, placement), (k, format) in product(*axes):
        marks = pytest.mark.slow if (i + j + k) % 3 else ()
        label = f"{storage}, {placement}, {format}"
        found.append(pytest.param((storage, placement), format, marks=marks, id=label))
    return found


@pytest.mark.parametrize(("placed", "format"), cells(), indirect=["placed"])
def test_a_lora_of_every_format_on_every_storage_in_every_place(
    placed: Placed, format: str, bench: Bench
) -> None:
    storage, placement, pipe = placed
    first, second = STRENGTHS
    handle = pipe.load_lora(pipe.dit, bench.files[format], first)
    assert (handle.report.format, handle.report.alpha) == (format, WRITERS[format][1])
    assert (handle.report.matched, handle.report.unmatched) == (len(bench.factors), ())
    made, expected = denoised(pipe), bench.expected(storage)
    assert same(made, expected[first])
    assert distance(made, bench.fused(storage, stored_anew=False)) < BF16_TOLERANCE
    assert distance(made, bench.fused(storage, stored_anew=True)) < TOLERANCES[storage]
    assert distance(made, expected[0.0]) > 4 * TOLERANCES[storage]
    if placement != PLAIN:
        moved = {
            phase["name"]: phase["bytes_per_traversal"] for phase in pipe.memory_report()["plan"]["phases"]
        }
        assert (moved["denoise 1"] > 0) == (placement != "resident")
    pipe.set_lora_strength(handle, second)
    assert same(denoised(pipe), expected[second])
    pipe.remove_lora(handle)
    assert same(denoised(pipe), expected[0.0])


# -- what other files hold, and several at once -----------------------------------------------------------

SOME = [("bf16", PLAIN), ("int8", "streamed"), (CHECKPOINT, "on disk"), ("e5m2", "resident")]


def full_differences(bench: Bench, weights: nn.Module, file: Path) -> dict[str, LoraUpdate]:
    """Write differences of weights and biases, beside factors for some of the layers; what they are."""
    random = torch.Generator().manual_seed(4)
    state: dict[str, Tensor] = {}
    updates: dict[str, LoraUpdate] = {}
    for name, (down, up) in bench.factors.items():
        weight, bias = weights.get_submodule(name).weight, weights.get_submodule(name).bias
        weight_diff = (torch.randn(weight.shape, generator=random) * 0.1 * weight.float().std()).bfloat16()
        bias_diff = torch.randn(bias.shape, generator=random).mul_(0.1).bfloat16()
        updates[name] = LoraUpdate(weight_diff=weight_diff, bias_diff=bias_diff)
        state |= {f"diffusion_model.{name}.diff": weight_diff, f"diffusion_model.{name}.diff_b": bias_diff}
        if "to_q" in name:
            updates[name] = replace(updates[name], down=down, up=up)
            state |= {f"diffusion_model.{name}.lora_down.weight": down}
            state |= {f"diffusion_model.{name}.lora_up.weight": up}
    save_file(state, file)
    return updates


@pytest.mark.parametrize("placed", SOME, indirect=True, ids=", ".join)
def test_full_differences_of_weights_and_biases(placed: Placed, bench: Bench, tmp_path: Path) -> None:
    file, strength = tmp_path / "differences.safetensors", 0.6
    plain, fused = bench.plain(placed.storage), bench.plain(placed.storage, torch.float32)
    for name, update in full_differences(bench, plain.dit, file).items():
        layer = fused.dit.get_submodule(name)
        layer.weight = nn.Parameter(fuse(layer.weight, [(update, strength)]), requires_grad=False)
        layer.bias = nn.Parameter(fuse_bias(layer.bias, [(update, strength)]), requires_grad=False)
    plain.load_lora(plain.dit, file, strength)
    handle = placed.pipe.load_lora(placed.pipe.dit, file, strength)
    assert handle.report.matched == len(bench.factors)
    made, base = denoised(placed.pipe), bench.expected(placed.storage)[0.0]
    assert same(made, denoised(plain))
    assert distance(made, denoised(fused)) < BF16_TOLERANCE
    assert distance(made, base) > 10 * BF16_TOLERANCE
    placed.pipe.remove_lora(handle)
    assert same(denoised(placed.pipe), base)


@pytest.mark.parametrize("placed", SOME, indirect=True, ids=", ".join)
def test_several_loras_come_and_go_one_by_one(placed: Placed, bench: Bench, tmp_path: Path) -> None:
    pipe, plain = placed.pipe, bench.plain(placed.storage)
    chosen = {name: plain.dit.get_submodule(name).weight for name in list(bench.factors)[::2]}
    # In float32, which both ways have to round alike.
    factors = random_factors(chosen, seed=2, rank=8)
    unrounded = {name: (down.float() * 1.1, up.float() / 1.1) for name, (down, up) in factors.items()}
    wide = write_official(unrounded, tmp_path)
    files = [bench.files["kohya"], wide, bench.files["kohya"]]
    handles = [
        pipe.load_lora(pipe.dit, file, alpha) for file, alpha in zip(files, (0.5, -0.3, 1.5), strict=True)
    ]
    assert list(pipe.active_loras.values()) == [0.5, -0.3, 1.5]
    assert list(pipe._book.record(asked()).values()) == [0.5, -0.3, 1.5], "files of one name count apart"

    def alone(*weighted: tuple[Path, float]) -> Latents:
        plain.clear_lora()
        for file, alpha in weighted:
            plain.load_lora(plain.dit, file, alpha)
        return denoised(plain)

    made = denoised(pipe)
    assert same(made, alone((files[0], 0.5), (files[1], -0.3), (files[2], 1.5)))
    pipe.remove_lora(handles[0])
    pipe.set_lora_strength(handles[1], 0.25)
    assert same(denoised(pipe), alone((files[1], 0.25), (files[2], 1.5)))
    pipe.set_lora_strength(handles[2], 0)
    assert same(denoised(pipe), alone((files[1], 0.25)))
    with pytest.raises(RequestError, match="is not active"):
        pipe.remove_lora(handles[0])
    with pytest.raises(RequestError, match="is not active"):
        pipe.set_lora_strength(handles[0], 1.0)
    with pytest.raises(RequestError, match="not a finite number"):
        pipe.set_lora_strength(handles[1], float("inf"))
    assert list(pipe.active_loras) == handles[1:]
    pipe.clear_lora()
    assert not pipe.active_loras
    assert same(denoised(pipe), bench.expected(placed.storage)[0.0])


def test_a_report_says_what_matched_and_the_text_side_once(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = bench.plain("bf16")
    state = tensors(bench.files["official"])
    text = "text_embedding_projection.aggregate_embed.lora_A.weight"
    unknown = "diffusion_model.transformer_blocks.99.attn1.to_q.lora_A.weight"
    save_file({**state, text: torch.ones(3, 8), unknown: torch.ones(3, 8)}, tmp_path / "more.safetensors")
    with caplog.at_level(logging.INFO):
        handle = pipe.load_lora(pipe.dit, tmp_path / "more.safetensors", STRENGTHS[0])
        for _ in range(2):
            made = denoised(pipe)
    assert same(made, bench.expected("bf16")[STRENGTHS[0]])
    report = handle.report
    assert (report.matched, report.unmatched, report.text_side) == (len(bench.factors), (unknown,), (text,))
    assert caplog.text.count("text-side") == 1
    assert caplog.text.count("entries are not applied") == 1
    assert text not in caplog.text
