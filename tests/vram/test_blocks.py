"""Layouts and packed blocks."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.vram.blocks import (
    BLOCK_ALIGNMENT,
    PART_ALIGNMENT,
    BlockLayout,
    TensorSpec,
    make_layout,
    pack,
    pack_entry,
    unpack,
)
from diffsynth.vram.formats import SCALE, StorageFormat, decode, encode, stored_bytes
from tests.standin import StandIn

F = StorageFormat


def spec(format: StorageFormat, *shape: int, dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
    return TensorSpec(shape, dtype, format)


def every_format() -> dict[str, TensorSpec]:
    """A 2-D weight in each format, of sizes that need padding, and other tensors."""
    specs = {f"{format}.weight": spec(format, 5, 64) for format in F}
    specs["odd.weight"] = spec(F.INT4, 3, 33)
    specs["norm.weight"] = spec(F.BF16, 7)
    specs["table"] = spec(F.F32, 2, 3, dtype=torch.float32)
    specs["number"] = spec(F.F32, dtype=torch.float32)
    specs["nothing"] = spec(F.BF16, 0)
    return specs


def random_tensors(specs: dict[str, TensorSpec], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s.shape, generator=generator, dtype=torch.float32) for n, s in specs.items()}


def packed(specs: dict[str, TensorSpec], fill: int = 77) -> tuple[BlockLayout, dict[str, Tensor], Tensor]:
    layout, tensors = make_layout(specs), random_tensors(specs)
    return layout, tensors, pack(layout, tensors, torch.full((layout.nbytes,), fill, dtype=torch.uint8))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(F)), st.integers(1, 40), st.integers(1, 70)), max_size=8).map(
        lambda items: {f"t{i}": spec(format, *shape) for i, (format, *shape) in enumerate(items)}
    )
)
def test_parts_are_aligned_and_apart(specs: dict[str, TensorSpec]) -> None:
    layout = make_layout(specs)
    end = 0
    for part in layout.parts:
        assert part.offset % PART_ALIGNMENT == 0
        assert end <= part.offset < end + PART_ALIGNMENT
        end = part.end
    assert end <= layout.nbytes < end + BLOCK_ALIGNMENT
    assert layout.nbytes % BLOCK_ALIGNMENT == 0
    assert sum(part.nbytes for part in layout.parts) == sum(
        stored_bytes(entry.format, entry.shape) for entry in layout.entries
    )
    assert BlockLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("float8_cast", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_what_comes_out_is_what_went_in(float8_cast: bool, dtype: torch.dtype | None) -> None:
    layout, tensors, buffer = packed(every_format())
    assert layout.by_name["odd.weight"].format is F.INT8
    for entry in layout.entries:
        expected_dtype = dtype or entry.dtype
        alone = encode(tensors[entry.name], entry.format)
        expected = decode(alone, entry.format, entry.shape, expected_dtype)
        found = unpack(layout, buffer, entry.name, dtype, float8_cast=float8_cast)
        assert found.dtype == expected_dtype
        assert found.shape == entry.shape
        assert torch.equal(found, expected)
        out = torch.empty(entry.shape, dtype=expected_dtype)
        assert unpack(layout, buffer, entry.name, dtype, out=out) is out
        assert torch.equal(out, expected)


def test_views_are_windows_on_the_buffer() -> None:
    layout, _, buffer = packed(every_format())
    larger = torch.cat([buffer, torch.zeros(512, dtype=torch.uint8)])
    views = layout.views(larger)
    assert list(views) == list(every_format())
    for entry in layout.entries:
        for part in entry.parts:
            view = views[entry.name][part.suffix]
            assert (view.dtype, tuple(view.shape)) == (part.dtype, part.shape)
            assert view.numel() == 0 or view.data_ptr() == larger.data_ptr() + part.offset
    views["norm.weight"][""].fill_(3)
    assert bool((unpack(layout, larger, "norm.weight") == 3).all())
    plain = layout.views(buffer, float8=False)
    for format in (F.E4M3, F.E5M2, F.FP8, F.FP8_TENSOR):
        assert plain[f"{format}.weight"][""].dtype == torch.uint8


def test_equal_content_gives_equal_bytes() -> None:
    assert torch.equal(packed(every_format(), fill=0)[2], packed(every_format(), fill=255)[2])


def test_blocks_on_a_device() -> None:
    layout, _, buffer = packed(every_format())
    with StandIn() as device, torch.inference_mode():
        slot = device.backend.empty(layout.nbytes + 256)
        slot[: layout.nbytes].copy_(buffer)
        for entry in layout.entries:
            there = unpack(layout, slot, entry.name, float8_cast=False)
            assert torch.equal(there.cpu(), unpack(layout, buffer, entry.name))


def test_stored_parts_are_taken_over() -> None:
    w = torch.randn(5, 64)
    specs = {format: spec(F(format), 5, 64) for format in ("fp8_tensor", "fp8", "int8", "int4", "bf16")}
    layout = make_layout({str(name): s for name, s in specs.items()})
    stored = {name: encode(w, s.format) for name, s in specs.items()}
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    given = {**stored, "fp8_tensor": {**stored["fp8_tensor"], SCALE: stored["fp8_tensor"][SCALE].view(1)}}
    pack(layout, given, buffer)
    for name, parts in layout.views(buffer).items():
        for suffix, part in parts.items():
            assert torch.equal(part.float(), stored[name][suffix].float())


def test_tensors_that_do_not_belong() -> None:
    layout = make_layout({"a.weight": spec(F.INT8, 4, 8), "b.weight": spec(F.FP8_TENSOR, 4, 8)})
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    good = {"a.weight": torch.ones(4, 8), "b.weight": torch.ones(4, 8)}
    parts = encode(torch.ones(4, 8), F.FP8_TENSOR)
    nan = {**parts, "": torch.full((4, 8), torch.nan).to(torch.float8_e4m3fn)}
    bad: list[tuple[str, object]] = [
        ("a.weight", torch.ones(8, 4)),
        ("a.weight", torch.full((4, 8), torch.inf)),
        ("a.weight", {"": torch.ones(4, 8, dtype=torch.int8)}),
        ("a.weight", {"": torch.ones(4, 8), SCALE: torch.ones(4)}),
        ("a.weight", {"": torch.ones(4, 8, dtype=torch.int8), SCALE: torch.ones(3)}),
        ("b.weight", {**parts, SCALE: torch.ones(4)}),
        ("b.weight", {**parts, SCALE: torch.tensor(torch.nan)}),
        ("b.weight", nan),
    ]
    for name, value in bad:
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            pack(layout, {**good, name: value}, buffer)  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"b\.weight: missing"):
        pack(layout, {"a.weight": good["a.weight"]}, buffer)
    before = pack(layout, good, buffer).clone()
    pack_entry(layout, "a.weight", torch.zeros(4, 8), buffer)
    assert torch.equal(layout.views(buffer)["b.weight"][""], layout.views(before)["b.weight"][""])
    assert not unpack(layout, buffer, "a.weight").any()


def test_buffers_that_do_not_fit() -> None:
    layout = make_layout({"a": spec(F.BF16, 200)})
    for buffer in (
        torch.empty(layout.nbytes - 1, dtype=torch.uint8),
        torch.empty(layout.nbytes, dtype=torch.int8),
        torch.empty(layout.nbytes, 1, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="flat uint8"):
            layout.views(buffer)
    with pytest.raises(ValueError, match="2-D"):
        make_layout({"bias": spec(F.INT8, 4)})


def test_damaged_layouts_are_refused() -> None:
    text = make_layout(every_format()).to_json()
    good = json.loads(text)

    def changed(*path: str | int, value: object) -> str:
        data = json.loads(text)
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return json.dumps(data)

    second = good["entries"][1]["parts"][0]["offset"]
    bad = [
        "",
        "[]",
        "{}",
        text[:-3],
        changed("nbytes", value=good["nbytes"] + 1),
        changed("nbytes", value=0),
        changed("nbytes", value="256"),
        changed("entries", 0, "name", value="f16.weight"),
        changed("entries", 0, "format", value="q4_0"),
        changed("entries", 0, "format", value="f16"),
        changed("entries", 0, "shape", value=[5, 65]),
        changed("entries", 0, "shape", value=[-5, -64]),
        changed("entries", 0, "shape", value=5),
        changed("entries", 0, "dtype", value="complex64"),
        changed("entries", 0, "parts", value=[]),
        changed("entries", 0, "parts", 0, "dtype", value="float16"),
        changed("entries", 0, "parts", 0, "suffix", value="x"),
        changed("entries", 1, "parts", 0, "offset", value=second - 64),
        changed("entries", 1, "parts", 0, "offset", value=second + 1),
        changed("entries", 1, "parts", 0, "offset", value=10**9),
    ]
    assert BlockLayout.from_json(text).to_json() == text
    for wrong in bad:
        with pytest.raises(CheckpointError, match="damaged block layout"):
            BlockLayout.from_json(wrong)
