"""ModelConfig: the public API's arguments, where files are looked for, and when something is fetched."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.errors import CheckpointError, DownloadError, RequestError
from diffsynth.loader import ModelConfig
from tests.loader.fake_hub import FakeHub
from tests.loader.headers import TINY

GEMMA_ID = "google/gemma-3-12b-it-qat-q4_0-unquantized"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
REPOSITORY = {
    **dict.fromkeys(SHARDS, b"weights"),
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MODEL_BASE_PATH", "SKIP_DOWNLOAD", "DOWNLOAD_SOURCE"):
        monkeypatch.delenv(f"DIFFSYNTH_{name}", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_arguments_of_the_public_api() -> None:
    assert [f.name for f in fields(ModelConfig)] == [
        *("path", "model_id", "origin_file_pattern", "download_source", "local_model_path", "skip_download"),
        *("offload_device", "offload_dtype", "onload_device", "onload_dtype"),
        *("preparing_device", "preparing_dtype", "computation_device", "computation_dtype", "state_dict"),
    ]


def test_states_of_the_public_example() -> None:
    states: dict[str, Any] = {
        "offload_dtype": torch.float8_e5m2,
        "offload_device": "cpu",
        "onload_dtype": torch.float8_e5m2,
        "onload_device": "cpu",
        "preparing_dtype": torch.float8_e5m2,
        "preparing_device": "cuda",
        "computation_dtype": torch.bfloat16,
        "computation_device": torch.device("cuda:0"),
    }
    config = ModelConfig(model_id=GEMMA_ID, origin_file_pattern="model-*.safetensors", **states)
    config.validate()
    assert config.vram_config() == states
    disk: dict[str, Any] = dict.fromkeys(
        ("offload_device", "offload_dtype", "onload_device", "onload_dtype"), "disk"
    )
    ModelConfig(model_id=GEMMA_ID, **disk).validate()
    ModelConfig(model_id=GEMMA_ID, onload_device="npu:1").validate()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "path"),
        ({"path": ""}, "path"),
        ({"path": []}, "path"),
        ({"path": ["a", 3]}, "path"),
        ({"model_id": "LTX-2"}, "model_id"),
        ({"model_id": "../LTX-2"}, "model_id"),
        ({"model_id": "a/b/c"}, "model_id"),
        ({"path": "a", "origin_file_pattern": "b"}, "origin_file_pattern"),
        ({"model_id": "a/b", "origin_file_pattern": "../c"}, "origin_file_pattern"),
        ({"model_id": "a/b", "origin_file_pattern": ["/c"]}, "origin_file_pattern"),
        ({"model_id": "a/b", "origin_file_pattern": [3]}, "origin_file_pattern"),
        ({"model_id": "a/b", "download_source": "ftp"}, "download_source"),
        ({"path": "a", "offload_device": 3}, "offload_device"),
        ({"path": "a", "onload_device": "a disk"}, "onload_device"),
        ({"path": "a", "preparing_device": "disk"}, "preparing_device"),
        ({"path": "a", "computation_device": "disk"}, "computation_device"),
        ({"path": "a", "offload_dtype": "bfloat16"}, "offload_dtype"),
        ({"path": "a", "offload_dtype": "disk", "offload_device": "cpu"}, "offload_dtype"),
        ({"path": "a", "computation_dtype": "disk"}, "computation_dtype"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=f"^{named}") as raised:
        ModelConfig(**arguments).validate()
    assert raised.value.hint


@pytest.mark.parametrize("name", ["DOWNLOAD_SOURCE", "SKIP_DOWNLOAD"])
def test_wrong_settings_of_the_environment_are_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"DIFFSYNTH_{name}", "perhaps")
    with pytest.raises(RequestError, match=f"DIFFSYNTH_{name}='perhaps'"):
        ModelConfig(model_id="a/b", origin_file_pattern="c").resolve(FakeHub({}))


def test_given_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert ModelConfig(path="a.safetensors").resolve() == [Path("a.safetensors")]
    both = ModelConfig(path=[str(tmp_path), tmp_path / "a.safetensors"], model_id="a/b")
    assert both.resolve() == [tmp_path, tmp_path / "a.safetensors"]
    with pytest.raises(CheckpointError, match=r"b\.safetensors does not exist"):
        ModelConfig(path=["a.safetensors", "b.safetensors"]).resolve()


def test_base_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ModelConfig(model_id="a/b")
    assert config.folder() == Path("models/a/b")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "env"))
    assert config.folder() == tmp_path / "env" / "a" / "b"
    assert ModelConfig(model_id="a/b", local_model_path=tmp_path).folder() == tmp_path / "a" / "b"


def test_hub_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(model_id="a/b")
    assert config.hub_name() == "modelscope"
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "HuggingFace")
    assert config.hub_name() == "huggingface"
    assert ModelConfig(model_id="a/b", download_source="modelscope").hub_name() == "modelscope"


def test_fetch_once_then_stay_offline(tmp_path: Path) -> None:
    hub = FakeHub(REPOSITORY)
    config = ModelConfig(model_id=GEMMA_ID, origin_file_pattern="model-*.safetensors")
    expected = [Path("models") / GEMMA_ID / name for name in SHARDS]
    assert config.resolve(hub) == expected
    assert config.resolve(hub) == expected
    assert (hub.listed, hub.downloads) == (1, SHARDS)


def test_tokenizer_folder_beside_the_weights() -> None:
    """The public default: the same repository, no pattern."""
    hub = FakeHub(REPOSITORY)
    ModelConfig(model_id=GEMMA_ID, origin_file_pattern="model-*.safetensors").resolve(hub)
    folder = Path("models") / GEMMA_ID
    assert ModelConfig(model_id=GEMMA_ID).resolve(hub) == [folder]
    assert (folder / "tokenizer_config.json").exists()
    assert ModelConfig(model_id=GEMMA_ID, origin_file_pattern="").resolve(hub) == [folder]
    assert hub.listed == 2


def test_interrupted_tokenizer_folder_is_not_taken_for_whole() -> None:
    hub = FakeHub(REPOSITORY, stops={"tokenizer_config.json": KeyboardInterrupt()})
    config = ModelConfig(model_id=GEMMA_ID)
    with pytest.raises(KeyboardInterrupt):
        config.resolve(hub)
    assert (config.folder() / "tokenizer.json").exists()
    config.resolve(hub)
    assert (config.folder() / "tokenizer_config.json").exists()


def test_tokenizer_folder_completed_by_hand() -> None:
    hub = FakeHub(REPOSITORY, stops={"tokenizer_config.json": KeyboardInterrupt()})
    config = ModelConfig(model_id=GEMMA_ID)
    with pytest.raises(KeyboardInterrupt):
        config.resolve(hub)
    (config.folder() / "tokenizer_config.json").write_bytes(b"{}")
    assert config.resolve(hub) == [config.folder()]
    assert config.resolve(FakeHub({})) == [config.folder()]


def test_missing_shard_is_fetched(tmp_path: Path) -> None:
    hub = FakeHub(REPOSITORY)
    config = ModelConfig(model_id=GEMMA_ID, origin_file_pattern="model-*.safetensors")
    config.resolve(hub)
    (config.folder() / SHARDS[1]).unlink()
    assert len(config.resolve(hub)) == 2
    assert hub.downloads == [*SHARDS, SHARDS[1]]


def test_shard_that_only_the_index_names_is_missed(tmp_path: Path) -> None:
    config = ModelConfig(model_id="a/b", origin_file_pattern="part*.safetensors", local_model_path=tmp_path)
    config.folder().mkdir(parents=True)
    (config.folder() / "part1.safetensors").touch()
    assert len(config.resolve(FakeHub({}))) == 1
    index = {"weight_map": {"x": "part1.safetensors", "y": "part2.safetensors", "z": "else.safetensors"}}
    (config.folder() / "model.safetensors.index.json").write_text(json.dumps(index))
    config.skip_download = True
    with pytest.raises(CheckpointError, match=r"part2\.safetensors") as raised:
        config.resolve(FakeHub({}))
    assert "else.safetensors" not in raised.value.message


def test_several_patterns(tmp_path: Path) -> None:
    hub = FakeHub({"a.safetensors": b"1", "b.safetensors": b"2", "c.safetensors": b"3"})
    config = ModelConfig(model_id="a/b", origin_file_pattern=["b.safetensors", "[ab].safetensors"])
    assert [path.name for path in config.resolve(hub)] == ["b.safetensors", "a.safetensors"]


@pytest.mark.parametrize("value", ["true", "1", "Yes"])
def test_skip_download_names_the_place_and_both_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    hub = FakeHub({"c.safetensors": b"1"})
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", value)
    config = ModelConfig(model_id="a/b", origin_file_pattern="c.safetensors", local_model_path=tmp_path)
    with pytest.raises(CheckpointError) as raised:
        config.resolve(hub)
    assert str(tmp_path / "a" / "b" / "c.safetensors") in raised.value.message
    assert "put it there" in raised.value.hint
    assert "skip_download=False" in raised.value.hint
    assert hub.listed == 0
    config.skip_download = False
    assert config.resolve(hub) == [tmp_path / "a" / "b" / "c.safetensors"]


@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_skip_download_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", value)
    assert ModelConfig(model_id="a/b").may_download()


def test_a_name_that_the_hub_lacks() -> None:
    with pytest.raises(DownloadError, match="no file that fits"):
        ModelConfig(model_id="a/b", origin_file_pattern="c.safetensors").resolve(FakeHub({"d": b""}))


def test_open_gives_the_weights() -> None:
    files = ModelConfig(path=TINY / "gemma").open()
    assert len(files.keys) == 64
    in_memory = ModelConfig(path="not/there", state_dict={"x": torch.zeros(2)})
    assert in_memory.open().keys == ["x"]
    assert "state_dict" not in repr(in_memory)
    with pytest.raises(RequestError):
        ModelConfig().open()
    assert ModelConfig(state_dict={}).resolve() == []
