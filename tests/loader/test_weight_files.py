"""Several files as one key space, folders of shards, and state dicts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.errors import CheckpointError
from diffsynth.loader.weight_files import WeightFiles, shard_files
from tests.loader.headers import TINY


def _save(path: Path, *keys: str, **metadata: str) -> Path:
    save_file({key: torch.full((2,), float(i)) for i, key in enumerate(keys)}, path, metadata or None)
    return path


def test_shards_are_one_key_space(tmp_path: Path) -> None:
    files = WeightFiles([_save(tmp_path / "a.safetensors", "x", "y"), _save(tmp_path / "b.safetensors", "z")])
    assert files.keys == ["x", "y", "z"]
    assert files.read("y").tolist() == [1.0, 1.0]
    assert files.read("z", torch.bfloat16).dtype == torch.bfloat16
    assert [piece.tolist() for _, piece in files.pieces("y")] == [[1.0, 1.0]]
    assert files.dtypes == dict.fromkeys("xyz", "F32")
    assert files.name.endswith("a.safetensors and 1 more")
    assert files.holding(["z"]).keys == ["z"]
    assert files.holding(["z"]).paths == (tmp_path / "b.safetensors",)


def test_a_key_in_two_files_is_an_error(tmp_path: Path) -> None:
    paths = [_save(tmp_path / f"{name}.safetensors", "x", name) for name in "ab"]
    with pytest.raises(CheckpointError, match=r"a\.safetensors and .*b\.safetensors both hold 'x'"):
        WeightFiles(paths)


def test_no_files_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="no weight files"):
        WeightFiles([])


def test_state_dict_is_not_copied_without_need() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    files = WeightFiles(state_dict={"x": tensor, "scalar": torch.tensor(3.0)})
    assert files.dtypes == {"x": "BF16", "scalar": "F32"}
    assert files.shapes["x"] == (2, 3)
    assert files.read("x").data_ptr() == tensor.data_ptr()
    assert files.read("x", torch.float32).dtype == torch.float32
    assert [piece.tolist() for _, piece in files.pieces("scalar")] == [[3.0]]
    assert (files.paths, files.bytes_read, files.sections()) == ((), 0, None)


def test_sections_are_united_and_contradictions_refused(tmp_path: Path) -> None:
    first = _save(tmp_path / "a.safetensors", "x", config=json.dumps({"vae": {"a": 1}}), format="pt")
    second = _save(tmp_path / "b.safetensors", "y", config=json.dumps({"vocoder": {}, "vae": {"a": 1}}))
    third = _save(tmp_path / "c.safetensors", "z", config=json.dumps({"vae": {"a": 2}}))
    assert WeightFiles([first, second]).sections() == {"vae": {"a": 1}, "vocoder": {}}
    assert WeightFiles([first, second]).metadata["format"] == "pt"
    with pytest.raises(CheckpointError, match="different configurations"):
        WeightFiles([first, third]).sections()
    assert WeightFiles([first, third]).holding(["z"]).sections() == {"vae": {"a": 2}}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="not "):
        WeightFiles(_save(tmp_path / "a.safetensors", "x", config=text)).sections()


def test_folder_with_an_index() -> None:
    files = WeightFiles(TINY / "gemma")
    assert [path.name for path in files.paths] == ["model-00001-of-00001.safetensors"]
    assert len(files.keys) == 64


def test_folder_that_lacks_shards(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _save(tmp_path / "model-00001-of-00002.safetensors", "x")
    with pytest.raises(CheckpointError, match=r"missing shards \['model-00002"):
        shard_files(tmp_path)
    _save(tmp_path / "model-00002-of-00002.safetensors", "y")
    assert WeightFiles(tmp_path).keys == ["x", "y"]
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no table of shards"):
        shard_files(tmp_path)


def test_folders_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        shard_files(tmp_path)
    alone = _save(tmp_path / "a.safetensors", "x")
    assert shard_files(tmp_path) == [alone]
    _save(tmp_path / "b.safetensors", "y")
    with pytest.raises(CheckpointError, match="name the file itself"):
        shard_files(tmp_path)
    _save(tmp_path / "diffusion_pytorch_model.safetensors", "z")
    with pytest.raises(CheckpointError, match="diffusers format") as raised:
        shard_files(tmp_path)
    assert "ltx-2-19b-dev.safetensors" in raised.value.hint
