"""Checkpoints in float8: every byte of them is what is computed with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.loader import ModelConfig, NetworkKind, WeightFiles, find_network
from diffsynth.pipelines.assemble import open_models
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.sizes import model_sizes
from diffsynth.pipelines.storage import Storage
from diffsynth.vram.blocks import unpack
from diffsynth.vram.cache import FOLDER_VARIABLE
from diffsynth.vram.formats import SCALE, StorageFormat
from diffsynth.vram.packed_file import PackedFile
from tests.pipelines.float8 import in_file, is_float8, is_float8_in_part, write_float8
from tests.pipelines.placed import MODES, Placement, make, manager, phases, place, same, unmanaged
from tests.pipelines.tiny import DEV, GEMMA, LORA, UPSCALER, load, sections, tensors, write_checkpoint
from tests.standin import StandIn

TEXT = ("text_encoder", "text_encoder_post_modules")
CHOICES = {"blocks": is_float8, "parts of blocks": is_float8_in_part}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path / "packed"


@pytest.fixture(params=["blocks", "parts of blocks, rows"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    chosen = CHOICES[request.param.split(",")[0]]
    return write_float8(tmp_path / "fp8.safetensors", chosen, per_row="rows" in request.param)


def managed(file: Path, **arguments: Any) -> LTX2AudioVideoPipeline:
    return load(file, GEMMA, UPSCALER, dtype=torch.bfloat16, **arguments)


def opened_dit(pipe: LTX2AudioVideoPipeline) -> PackedFile:
    weights = manager(pipe)._weights
    weights.convert("dit")
    return weights._files["dit"]


def test_bytes_are_taken_over_and_the_rest_is_kept(file: Path) -> None:
    packed = opened_dit(managed(file, vram_limit=8.0))
    assert packed.identity.policy == "fp8-mixed-verbatim-bf16"
    dequantised = managed(file).dit.state_dict()
    stored, float8 = tensors(file), 0
    for block, layout in packed.layouts.items():
        content = packed.mapped(block)
        for entry in layout.entries:
            values, scale = in_file(stored, entry.name)
            parts = layout.views_of(content, entry.name)
            if scale is None:
                assert entry.format is StorageFormat.BF16, entry.name
                assert torch.equal(parts[""], values.bfloat16())
            else:
                float8 += 1
                assert entry.format is StorageFormat.FP8
                assert torch.equal(parts[""].view(torch.uint8), values.view(torch.uint8))
                assert torch.equal(parts[SCALE], scale.expand(len(values)))
            decoded = unpack(layout, content, entry.name, torch.bfloat16)
            assert torch.equal(decoded, dequantised[entry.name]), entry.name
    assert float8 == sum(key.endswith(".weight_scale") for key in stored) > 0


@pytest.mark.parametrize(
    ("placement", "lora"),
    [(Placement(slots=2), 0.0), (Placement(slots=1, num_residents=1, in_ram=True), 0.6)],
)
def test_a_generation_is_that_of_the_dequantised_weights(
    file: Path, lora: float, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = unmanaged("int8", file, GEMMA, UPSCALER, parts=TEXT)
    place(monkeypatch, placement)
    with StandIn():
        pipe = managed(file, device="standin", vram_limit=8.0)
        for each in (plain, pipe):
            if lora:
                each.load_lora(each.dit, LORA, lora)
        assert same(make(pipe, **MODES["two stages"]), make(plain, **MODES["two stages"]))
        assert phases(pipe)["denoise 1"]["bytes_to_device"] > 0


def test_planned_bytes_are_those_of_the_file(file: Path) -> None:
    pipe = managed(file, vram_limit=8.0)
    packed, sizes = opened_dit(pipe), manager(pipe)._sizes.parts["dit"]
    planned = {block.name: block.nbytes for block in sizes.blocks} | {"rest": sizes.rest_bytes}
    assert {name: layout.nbytes for name, layout in packed.layouts.items()} == planned


def policy(*files: Path, **limits: Any) -> Storage:
    opened = open_models([ModelConfig(path=path) for path in files])
    return MemoryLimits(**limits).storage_policy(opened.configs, opened.networks)


def test_what_is_asked_for_goes_before_what_the_file_has(tmp_path: Path) -> None:
    file = write_float8(tmp_path / "fp8.safetensors")
    followed = policy(file, GEMMA)
    assert followed == policy(file, GEMMA, vram_limit="8gb")
    assert (followed.transformer, followed.audio) == (StorageFormat.FP8, StorageFormat.FP8)
    assert (followed.text_encoder, followed.connectors) == (StorageFormat.INT8, StorageFormat.INT8)
    assert all(".0." in name for name in followed.unquantised)
    assert policy(file, storage="fp8") == Storage.named("fp8")
    assert policy(file, storage="int8") == Storage.named("int8")
    assert policy(file, vram_limit="4gb") == Storage.named("int4")
    states = ModelConfig(path=file, offload_dtype=torch.float8_e5m2)
    opened = open_models([states])
    stated = MemoryLimits().storage_policy(opened.configs, opened.networks)
    assert (stated.transformer, stated.unquantised) == (StorageFormat.E5M2, frozenset())


@pytest.mark.parametrize(
    ("storage", "name"), [("fp8", "fp8-verbatim-bf16"), ("int8", "int8-bf16"), ("e4m3", "e4m3-bf16")]
)
def test_other_formats_of_the_same_file(storage: str, name: str, tmp_path: Path) -> None:
    """Asked for by name, a format is that of all: what the file has in bf16 is converted then."""
    file = write_float8(tmp_path / "fp8.safetensors")
    packed = opened_dit(managed(file, storage=storage))
    assert packed.identity.policy == name
    block = packed.layouts["transformer_blocks.0"]
    assert block.by_name["transformer_blocks.0.attn1.to_q.weight"].format == storage


def test_float8_without_factors(tmp_path: Path) -> None:
    """As tools make it by a plain cast: the factor is 1."""
    state = {
        key: value.to(torch.float8_e4m3fn) if is_float8(key) else value for key, value in tensors(DEV).items()
    }
    file = write_checkpoint(tmp_path / "plain.safetensors", state, sections())
    name = "transformer_blocks.1.ff.net.2.weight"
    weights = find_network(NetworkKind.TRANSFORMER, WeightFiles(file))
    values, factors = weights.read_float8(name)
    assert torch.equal(values.view(torch.uint8), in_file(state, name)[0].view(torch.uint8))
    assert torch.equal(factors, torch.ones(len(values)))
    with pytest.raises(ValueError, match="not stored as float8"):
        weights.read_float8("transformer_blocks.0.ff.net.2.weight")
    packed = opened_dit(managed(file, vram_limit=8.0))
    layout = packed.layouts["transformer_blocks.1"]
    decoded = unpack(layout, packed.mapped("transformer_blocks.1"), name, torch.bfloat16)
    assert torch.equal(decoded, values.bfloat16())


def test_sizes_of_all_parts_follow_the_policy(tmp_path: Path) -> None:
    file = write_float8(tmp_path / "fp8.safetensors")
    pipe = managed(file)
    mixed = model_sizes(pipe.parts, policy(file)).parts["dit"].blocks
    whole = model_sizes(pipe.parts, Storage.named("fp8")).parts["dit"].blocks
    plain = model_sizes(pipe.parts, Storage.named("bf16")).parts["dit"].blocks
    assert [block.nbytes for block in mixed] == [plain[0].nbytes, whole[1].nbytes, whole[2].nbytes]
