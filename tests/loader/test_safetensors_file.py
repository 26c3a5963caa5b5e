"""The reader: equal to the safetensors library, header only on opening, clear about what it cannot read."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth.errors import CheckpointError
from diffsynth.loader.safetensors_file import SafetensorsFile, safetensors_dtype, torch_dtype
from tests.loader.headers import TINY, header_bytes

CHECKPOINT = TINY / "ltx-2-tiny-dev.safetensors"
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def _sample(dtype: torch.dtype) -> torch.Tensor:
    values = torch.linspace(-3, 3, 30).reshape(5, 3, 2)
    return (values > 0) if dtype == torch.bool else values.abs().to(dtype)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    tensors = {str(dtype): _sample(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.empty(0, 4), "vector": torch.arange(7.0)}
    save_file(tensors, tmp_path / "mixed.safetensors", metadata={"model_version": "2.0.0"})
    return tmp_path / "mixed.safetensors"


def test_opening_reads_the_header_only() -> None:
    file = SafetensorsFile(CHECKPOINT)
    (length,) = struct.unpack("<Q", CHECKPOINT.read_bytes()[:8])
    assert file.bytes_read == 8 + length
    assert len(file.keys) == 629
    assert file.metadata["model_version"] == "2.0.0"
    assert file.shapes["vae.per_channel_statistics.mean-of-means"] == (128,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_stored(mixed: Path, dtype: torch.dtype) -> None:
    file = SafetensorsFile(mixed)
    tensor = file.read(str(dtype))
    assert tensor.dtype == dtype == torch_dtype(file.dtypes[str(dtype)])
    assert safetensors_dtype(dtype) == file.dtypes[str(dtype)]
    expected = load_file(mixed)[str(dtype)]
    assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_scalars_and_empty_tensors(mixed: Path) -> None:
    file = SafetensorsFile(mixed)
    for dtype in (None, torch.bfloat16):
        assert file.read("scalar", dtype).shape == ()
        assert file.read("scalar", dtype).item() == 1.5
        assert file.read("none", dtype).shape == (0, 4)
    assert [(rows, piece.tolist()) for rows, piece in file.pieces("scalar")] == [(slice(0, 1), [1.5])]


def test_whole_checkpoint_equals_the_library() -> None:
    file, expected = SafetensorsFile(CHECKPOINT), load_file(CHECKPOINT)
    assert file.keys and set(file.keys) == set(expected)
    assert all(torch.equal(file.read(key), value) for key, value in expected.items())
    assert file.bytes_read == CHECKPOINT.stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_conversion_while_reading(mixed: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    assert torch.equal(
        SafetensorsFile(mixed).read(str(stored), dtype), load_file(mixed)[str(stored)].to(dtype)
    )


def test_reading_to_another_device_fills_nothing_but_pieces(mixed: Path) -> None:
    tensor = SafetensorsFile(mixed).read("vector", device="meta")
    assert tensor.device.type == "meta"
    assert tensor.shape == (7,)


def test_pieces_are_whole_rows_of_bounded_size(mixed: Path) -> None:
    expected = load_file(mixed)[str(torch.float32)]
    parts = [
        (rows, piece.clone())
        for rows, piece in SafetensorsFile(mixed).pieces(str(torch.float32), piece_bytes=2 * 6 * 4)
    ]
    assert [rows for rows, _ in parts] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert torch.equal(torch.cat([piece for _, piece in parts]), expected)


def test_tensors_own_their_memory(mixed: Path) -> None:
    file = SafetensorsFile(mixed)
    first, second = file.read("vector"), file.read("vector")
    first.zero_()
    assert torch.equal(second, torch.arange(7.0))
    assert first.untyped_storage().nbytes() == 28


def _damaged(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def _entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"\x08\0\0", "cut off in its header", id="3 bytes"),
        pytest.param(b"noise" * 100, "not a safetensors file", id="noise"),
        pytest.param(struct.pack("<Q", 1000) + b"{", "cut off in its header", id="cut header"),
        pytest.param(_damaged(b"{not json"), "damaged header", id="no JSON"),
        pytest.param(_damaged([1]), "not a table", id="list"),
        pytest.param(_damaged({"a": _entry()}, b"\0" * 7), "cut off: ", id="cut data"),
        pytest.param(_damaged({"a": _entry()}, b"\0" * 9), "longer", id="extra data"),
        pytest.param(_damaged({"a": _entry(data_offsets=[4, 12])}, b"\0" * 12), "hole", id="hole"),
        pytest.param(_damaged({"a": _entry(), "b": _entry(data_offsets=[4, 12])}), "overlap", id="overlap"),
        pytest.param(_damaged({"a": _entry(shape=[3])}), "entry of 'a'", id="size and shape differ"),
        pytest.param(_damaged({"a": _entry(shape=[-2])}), "entry of 'a'", id="negative"),
        pytest.param(_damaged({"a": _entry(dtype="F33")}), "entry of 'a'", id="dtype"),
        pytest.param(_damaged({"a": 3}), "entry of 'a'", id="no entry"),
        pytest.param(_damaged({"__metadata__": {"a": 1}}, b""), "metadata", id="metadata"),
        pytest.param(b"PK\x03\x04" + b"\0" * 100, "pickle", id="zip"),
        pytest.param(pickle.dumps({"a": 1}) + b"\0" * 100, "pickle", id="pickle"),
        pytest.param(b"GGUF" + b"\0" * 100, "GGUF", id="gguf"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", id="lfs pointer"),
        pytest.param(b"<!DOCTYPE html><html>", "web page", id="web page"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_a_way_out(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        SafetensorsFile(path)
    assert str(path) in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.gguf"])
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CHECKPOINT.read_bytes())
    with pytest.raises(CheckpointError, match=r"pickle|GGUF") as raised:
        SafetensorsFile(tmp_path / name)
    assert ".safetensors" in raised.value.hint


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """A length of 0x280 begins with the bytes of a protocol-2 pickle."""
    start, _ = header_bytes({"a": ("F32", (2,))})
    text = start[8:].ljust(0x280)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    assert SafetensorsFile(tmp_path / "a.safetensors").keys == ["a"]


def test_missing_file_folder_and_key(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        SafetensorsFile(CHECKPOINT).read("nothing")


def test_a_file_that_changes_in_use_is_noticed(mixed: Path) -> None:
    file = SafetensorsFile(mixed)
    mixed.write_bytes(mixed.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="changed"):
        file.read("vector")


def test_a_dtype_that_torch_lacks_is_listed_and_not_read(tmp_path: Path) -> None:
    start, size = header_bytes({"a": ("F4", (4,))})
    (tmp_path / "a.safetensors").write_bytes(start + b"\0" * size)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.dtypes == {"a": "F4"}
    with pytest.raises(CheckpointError, match="dtype F4"):
        file.read("a")
