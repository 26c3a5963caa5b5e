"""Loading networks: every tensor in its place, in the dtype asked for; files that do not fit say why."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.loader import NetworkKind, WeightFiles, find_network, load_network, sort_networks
from diffsynth.loader.load import StoredTensor
from tests.loader.headers import TINY

CHECKPOINT = TINY / "ltx-2-tiny-dev.safetensors"
UPSCALER = TINY / "ltx-2-tiny-spatial-upscaler-x2.safetensors"
LINEAR = "transformer_blocks.1.attn1.to_q"
KEY = f"model.diffusion_model.{LINEAR}"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(CHECKPOINT)


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    return dict(WeightFiles(CHECKPOINT).metadata)


def _source(kind: NetworkKind) -> WeightFiles:
    gemma = dict.fromkeys((NetworkKind.GEMMA, NetworkKind.GEMMA_VISION), TINY / "gemma")
    paths = {NetworkKind.UPSAMPLER: UPSCALER, **gemma}
    return WeightFiles(paths.get(kind, CHECKPOINT))


def _keys(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in NetworkKind if kind is not NetworkKind.LORA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_network_of_the_tiny_set(kind: NetworkKind, dtype: torch.dtype) -> None:
    files = _source(kind)
    module = load_network(kind, files, dtype=dtype)
    entries = find_network(kind, files).entries
    state = _keys(module)
    assert state.keys() == entries.keys()
    for name, tensor in state.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, files.read(entries[name].key).to(dtype)), name
    assert not module.training
    assert not any(p.requires_grad or p.is_meta for p in module.parameters())
    assert not any(buffer.is_meta for buffer in module.buffers())


def test_all_tensors_of_the_file_find_a_place(tensors: dict[str, Tensor]) -> None:
    kinds = list(NetworkKind)[:7]
    files = WeightFiles(CHECKPOINT)
    taken = {entry.key for kind in kinds for entry in find_network(kind, files).entries.values()}
    assert taken == tensors.keys()


def test_another_device() -> None:
    module = load_network(NetworkKind.VOCODER, WeightFiles(CHECKPOINT), dtype=torch.float32, device="meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("keep", [True, False])
def test_float32_tables(tensors: dict[str, Tensor], keep: bool) -> None:
    """As the released files store them: tables in float32 among bfloat16 weights."""
    state = {key: value.float() if "scale_shift_table" in key else value for key, value in tensors.items()}
    files = WeightFiles(state_dict=state)
    sections = WeightFiles(CHECKPOINT).sections()
    assert sections is not None
    files.sources[0].metadata["config"] = json.dumps(sections)  # type: ignore[index]
    module = load_network(NetworkKind.TRANSFORMER, files, dtype=torch.bfloat16, keep_float32=keep)
    for name, tensor in _keys(module).items():
        table = keep and "scale_shift_table" in name
        assert tensor.dtype == (torch.float32 if table else torch.bfloat16), name


def test_gemma_takes_the_configuration_beside_its_shards(tmp_path: Path) -> None:
    assert find_network(NetworkKind.GEMMA, WeightFiles(TINY / "gemma")).config.sliding_window == 32
    shard = shutil.copy(TINY / "gemma" / "model-00001-of-00001.safetensors", tmp_path / "model.safetensors")
    assert find_network(NetworkKind.GEMMA, WeightFiles(shard)).config.sliding_window == 1024
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        find_network(NetworkKind.GEMMA, WeightFiles(shard))


def test_gemma_from_several_shards(tmp_path: Path) -> None:
    state = load_file(TINY / "gemma" / "model-00001-of-00001.safetensors")
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: state[name] for name in part}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    shutil.copy(TINY / "gemma" / "config.json", tmp_path)
    module = load_network(NetworkKind.GEMMA, WeightFiles(tmp_path), dtype=torch.bfloat16)
    whole = load_network(NetworkKind.GEMMA, WeightFiles(TINY / "gemma"), dtype=torch.bfloat16)
    assert all(torch.equal(value, _keys(whole)[name]) for name, value in _keys(module).items())


def _quantised(tensors: dict[str, Tensor], scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint with one linear in fp8, its factor, and the factor for activations."""
    factors = scale.reshape(-1, 1) if scale.numel() > 1 else scale
    return tensors | {
        f"{KEY}.weight": (tensors[f"{KEY}.weight"].float() / factors).to(dtype),
        f"{KEY}.weight_scale": scale,
        f"{KEY}.input_scale": torch.tensor(0.0157),
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.0013), torch.tensor([0.0013]), torch.linspace(0.001, 0.1, 32)],
    ids=["scalar", "one element", "per row"],
)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_scaled_fp8(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    dtype: torch.dtype,
    scale: Tensor,
    target: torch.dtype,
) -> None:
    state = _quantised(tensors, scale, dtype)
    save_file(state, tmp_path / "fp8.safetensors", metadata)
    files = WeightFiles(tmp_path / "fp8.safetensors")
    module = load_network(NetworkKind.TRANSFORMER, files, dtype=target)
    factors = scale.reshape(-1, 1) if scale.numel() > 1 else scale
    expected = (state[f"{KEY}.weight"].float() * factors).to(target)
    found = _keys(module)[f"{LINEAR}.weight"]
    assert torch.equal(found, expected)
    assert found.dtype == target
    assert (found.float() - tensors[f"{KEY}.weight"].float()).abs().max() < 0.2
    weights = find_network(NetworkKind.TRANSFORMER, files)
    assert weights.entries[f"{LINEAR}.weight"] == StoredTensor(f"{KEY}.weight", f"{KEY}.weight_scale")
    assert weights.entries[f"{LINEAR}.bias"].scale_key is None


def test_plain_fp8_is_upcast(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    quantised = tensors[f"{KEY}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{KEY}.weight": quantised}, tmp_path / "fp8.safetensors", metadata)
    module = load_network(
        NetworkKind.TRANSFORMER, WeightFiles(tmp_path / "fp8.safetensors"), dtype=torch.bfloat16
    )
    assert torch.equal(_keys(module)[f"{LINEAR}.weight"], quantised.to(torch.bfloat16))


def test_a_factor_that_does_not_fit(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    state = _quantised(tensors, torch.tensor(0.1), torch.float8_e4m3fn) | {
        f"{KEY}.weight_scale": torch.ones(3)
    }
    save_file(state, tmp_path / "fp8.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"weight_scale \[3\] does not fit the weight \[32, 32\]"):
        load_network(NetworkKind.TRANSFORMER, WeightFiles(tmp_path / "fp8.safetensors"), dtype=torch.bfloat16)


def test_both_key_lists_and_shapes_must_agree(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    state = {key: value for key, value in tensors.items() if not key.endswith("attn2.to_k.bias")}
    state["model.diffusion_model.proj_out.new"] = torch.zeros(1)
    state["model.diffusion_model.proj_out.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "a.safetensors", metadata)
    with pytest.raises(CheckpointError) as raised:
        load_network(NetworkKind.TRANSFORMER, WeightFiles(tmp_path / "a.safetensors"), dtype=torch.float32)
    message = raised.value.message
    assert "6 missing: transformer_blocks.0.attn2.to_k.bias, " in message
    assert "1 unexpected: proj_out.new" in message
    assert "1 of another shape: proj_out.bias is [3] instead of [128]" in message


def test_network_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="holds no transformer") as raised:
        load_network(NetworkKind.TRANSFORMER, WeightFiles(UPSCALER), dtype=torch.float32)
    assert "inspect" in raised.value.hint


def test_truncated_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(CHECKPOINT.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off") as raised:
        WeightFiles(tmp_path / "a.safetensors")
    assert "fetch it again" in raised.value.hint


def _renamed(tensors: dict[str, Tensor], kind: NetworkKind, cut: str) -> dict[str, Tensor]:
    keys = [entry.key for entry in find_network(kind, WeightFiles(CHECKPOINT)).entries.values()]
    return {key.removeprefix(cut): tensors[key] for key in keys}


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        (NetworkKind.TRANSFORMER, "model.diffusion_model."),
        (NetworkKind.TRANSFORMER, "model."),
        (NetworkKind.TEXT_CONNECTORS, "model.diffusion_model."),
        (NetworkKind.VIDEO_ENCODER, "vae."),
        (NetworkKind.VIDEO_DECODER, "vae."),
        (NetworkKind.AUDIO_ENCODER, "audio_vae."),
        (NetworkKind.AUDIO_DECODER, "audio_vae."),
        (NetworkKind.VOCODER, "vocoder."),
    ],
)
def test_repackaged_without_prefix(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], kind: NetworkKind, cut: str
) -> None:
    save_file(_renamed(tensors, kind, cut), tmp_path / "part.safetensors", metadata)
    module = load_network(kind, WeightFiles(tmp_path / "part.safetensors"), dtype=torch.bfloat16)
    official = load_network(kind, WeightFiles(CHECKPOINT), dtype=torch.bfloat16)
    assert all(torch.equal(value, _keys(official)[name]) for name, value in _keys(module).items())


@pytest.mark.parametrize(
    "kind",
    [
        NetworkKind.VIDEO_ENCODER,
        NetworkKind.VIDEO_DECODER,
        NetworkKind.AUDIO_ENCODER,
        NetworkKind.AUDIO_DECODER,
    ],
)
def test_metadata_stripped(tmp_path: Path, tensors: dict[str, Tensor], kind: NetworkKind) -> None:
    """Where the shapes of the tiny set tell all that the metadata says."""
    save_file(tensors, tmp_path / "bare.safetensors")
    stated, bare = (find_network(kind, WeightFiles(p)) for p in (CHECKPOINT, tmp_path / "bare.safetensors"))
    assert bare.config == stated.config


def test_upsampler_with_metadata_stripped(tmp_path: Path) -> None:
    save_file(load_file(UPSCALER), tmp_path / "bare.safetensors")
    stated, bare = (
        find_network(NetworkKind.UPSAMPLER, WeightFiles(p)) for p in (UPSCALER, tmp_path / "bare.safetensors")
    )
    assert bare.config == stated.config


def test_which_file_fills_which_part() -> None:
    files = [WeightFiles(path) for path in (UPSCALER, TINY / "gemma", CHECKPOINT)]
    parts = sort_networks(files)
    assert set(parts) == set(NetworkKind) - {NetworkKind.LORA}
    assert parts[NetworkKind.VOCODER] is files[2]
    assert parts[NetworkKind.UPSAMPLER] is files[0]


def test_two_transformers_are_an_open_question(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT, tmp_path / "distilled.safetensors")
    with pytest.raises(CheckpointError, match=r"distilled\.safetensors both hold the transformer"):
        sort_networks([WeightFiles(CHECKPOINT), WeightFiles(tmp_path / "distilled.safetensors")])


def test_connectors_and_projection_in_two_files(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    state = _renamed(tensors, NetworkKind.TEXT_CONNECTORS, "model.diffusion_model.")
    projection = {key: value for key, value in state.items() if key.startswith("text_embedding")}
    save_file(projection | {"extra": torch.zeros(1)}, tmp_path / "projection.safetensors")
    connectors = {key: value for key, value in state.items() if key not in projection}
    save_file(connectors, tmp_path / "connectors.safetensors", metadata)
    names = ("projection", "connectors")
    caplog.set_level(logging.WARNING, "diffsynth")
    parts = sort_networks([WeightFiles(tmp_path / f"{name}.safetensors") for name in names])
    module = load_network(
        NetworkKind.TEXT_CONNECTORS, parts[NetworkKind.TEXT_CONNECTORS], dtype=torch.bfloat16
    )
    assert len(module.state_dict()) == 59
    assert "1 tensors are not used: extra" in caplog.messages[0]
