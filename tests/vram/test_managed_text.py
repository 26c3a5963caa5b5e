"""The text path, managed: text model, projection in slices and connectors, each on the device in pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.ltx2.connectors import Contexts, TextConnectors
from diffsynth.models.ltx2.feature_extractor import PromptFeatures, Slices, by_state
from diffsynth.vram.blocks import BlockLayout
from diffsynth.vram.file_source import FileSource
from diffsynth.vram.formats import AS_IS, StorageFormat, decode, encode
from diffsynth.vram.identity import identify
from diffsynth.vram.packed_file import PackedFile
from diffsynth.vram.packed_writer import write_packed
from diffsynth.vram.slices import StreamedSlices, slice_layouts
from diffsynth.vram.source import BlockSource, RamSource
from tests.runners.case import Case
from tests.runners.text import build_connectors, build_gemma
from tests.standin import StandIn
from tests.vram.networks import GOLDEN, SOURCES, Packed, pack_network, same, total
from tests.vram.support import reader_threads

FORMATS = ("f32", "bf16", "int8", "int4", "fp8")
CASES = ("path_ltx2", "path_ltx23")


@dataclass
class TextPath:
    gemma: Packed
    connectors: Packed
    slices: dict[str, BlockLayout]
    slice_tensors: dict[str, Tensor]
    slice_format: StorageFormat
    dtype: torch.dtype
    ids: list[Tensor]
    length: int

    def slice_source(self, device: StandIn) -> BlockSource:
        each = dict.fromkeys(self.slices, self.slice_tensors)
        return RamSource.pack(self.slices, each, device.backend)

    def decoded_slices(self) -> Slices:
        """The slices that went through their storage format on the CPU."""

        def of(index: int) -> list[Tensor]:
            found = [t for name, t in self.slice_tensors.items() if name.endswith(f":{index}")]
            format = self.slice_format
            stored = [encode(t, format) for t in found]
            return [
                decode(s, format, t.shape, self.dtype).clone() for s, t in zip(stored, found, strict=True)
            ]

        return of


def text_path(case_name: str, name: str) -> TextPath:
    case, format = Case.load(GOLDEN / "text" / f"{case_name}.safetensors"), StorageFormat(name)
    weights = case.weights()
    gemma = build_gemma(case.meta["gemma_config"], weights)
    connectors = build_connectors(case.meta["config"], weights)
    layers = [f"layers.{index}" for index in range(len(gemma.layers))]
    extractor = connectors.text_embedding_projection
    projections = {
        f"text_embedding_projection.{child}.weight": projection
        for child, projection in extractor.named_children()
        if projection in extractor.projections()
    }
    blocks = [
        f"{stream}_embeddings_connector.transformer_1d_blocks.{index}"
        for stream in ("video", "audio")
        for index in range(getattr(connectors.config, stream).num_layers)
    ]
    dtype = AS_IS.get(format, torch.bfloat16)
    num_states, width = extractor.config.num_states, extractor.config.hidden_size
    layouts = slice_layouts(
        {key: (p.out_features, width) for key, p in projections.items()},
        num_states,
        per_block=2,
        dtype=dtype,
        format=format,
    )
    tensors = {
        f"{key}:{index}": by_state(p.weight.detach().to(dtype), num_states)[index].clone()
        for key, p in projections.items()
        for index in range(num_states)
    }
    ids, mask = case["in/input_ids"], case["in/attention_mask"].bool()
    return TextPath(
        gemma=pack_network(gemma.requires_grad_(False), layers, format, host=["embed_tokens"]),
        connectors=pack_network(
            connectors.requires_grad_(False), blocks, format, left_out=tuple(projections)
        ),
        slices=layouts,
        slice_tensors=tensors,
        slice_format=format,
        dtype=dtype,
        ids=[row[valid] for row, valid in zip(ids, mask, strict=True)],
        length=ids.shape[1],
    )


def ordinary(path: TextPath) -> list[Tensor]:
    """Contexts from ordinary modules on the CPU with the decoded weights."""
    gemma, connectors = path.gemma.decoded(), path.connectors.decoded()
    assert isinstance(gemma, Gemma3TextModel) and isinstance(connectors, TextConnectors)
    with torch.inference_mode():
        sums = connectors.text_embedding_projection.begin(len(path.ids), slices=path.decoded_slices())
        gemma.hidden_states(path.ids, sums.add, length=path.length)
        return flat(connectors(in_dtype(sums.finish(), path.dtype), path.length))


def in_dtype(features: Sequence[PromptFeatures], dtype: torch.dtype) -> list[PromptFeatures]:
    return [PromptFeatures(row.video.to(dtype), row.audio.to(dtype)) for row in features]


def flat(contexts: Sequence[Contexts]) -> list[Tensor]:
    return [tensor.cpu() for context in contexts for tensor in context]


@pytest.fixture
def device() -> Iterator[StandIn]:
    with StandIn(seed=3) as device:
        yield device


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_streamed_text_path_gives_the_bits_of_ordinary_modules(
    device: StandIn, tmp_path: Path, case: str, name: str
) -> None:
    path = text_path(case, name)
    wanted = ordinary(path)
    path.gemma.write(tmp_path, "gemma")
    path.connectors.write(tmp_path, "connectors")
    gemma, connectors = (
        path.gemma.manage(device.backend, "file"),
        path.connectors.manage(device.backend, "mixed"),
    )
    module, text = gemma.module, connectors.module
    assert isinstance(module, Gemma3TextModel) and isinstance(text, TextConnectors)
    num_weights = len(text.text_embedding_projection.projections())
    for residents, slots in (((), 1), (path.gemma.blocks[1:2], 2)):
        with (
            torch.inference_mode(),
            gemma.active(residents=residents, slots=slots),
            connectors.active(slots=0),
            StreamedSlices(
                device.backend,
                path.slice_source(device),
                tuple(path.slices),
                num_weights=num_weights,
                slots=slots,
            ) as slices,
        ):
            sums = text.text_embedding_projection.begin(len(path.ids), slices=slices)
            module.hidden_states(path.ids, sums.add, length=path.length)
            features = in_dtype(sums.finish(), path.dtype)
            del sums
        with torch.inference_mode(), connectors.active(slots=1):
            assert same(flat(text(features, path.length)), wanted)
        del features
        assert device.current_bytes == 0
    assert reader_threads() == []


@pytest.mark.parametrize("kind", SOURCES)
def test_the_embedding_table_never_reaches_the_device(device: StandIn, tmp_path: Path, kind: str) -> None:
    path = text_path("path_ltx23", "bf16")
    path.gemma.write(tmp_path, "gemma")
    gemma = path.gemma.manage(device.backend, kind)
    module, states = gemma.module, []
    assert isinstance(module, Gemma3TextModel)
    with torch.inference_mode(), gemma.active(slots=1):
        assert module.embed_tokens.weight.device.type == "cpu"
        module.hidden_states(path.ids[:1], lambda *args: states.append(args[2].cpu()), length=path.length)
        ahead = path.gemma.blocks[:1]  # fetched for the next traversal, if it was there already
        once = total(path.gemma.block_bytes, path.gemma.blocks) + path.gemma.layouts["rest"].nbytes
        moved = gemma.traffic.bytes_to_device
        assert moved in (once, once + total(path.gemma.block_bytes, ahead))
        slot = max(path.gemma.block_bytes.values())
        assert gemma.device_bytes == slot + path.gemma.layouts["rest"].nbytes
    assert module.embed_tokens.weight.is_meta
    assert len(states) == module.config.num_hidden_states


def test_slices_stream_in_small_pieces(device: StandIn, tmp_path: Path) -> None:
    path = text_path("path_ltx23", "bf16")
    names = {key.partition(":")[0] for key in path.slice_tensors}
    whole = sum(tensor.nbytes for tensor in path.slice_tensors.values())
    num_states = len(path.slice_tensors) // len(names)
    identity = identify("slices", "bf16", [], path.slices)
    write_packed(tmp_path / "slices.safetensors", path.slices, identity, path.slice_tensors.__getitem__)
    file = PackedFile.open(tmp_path / "slices.safetensors", identity)
    for source in (path.slice_source(device), FileSource(file, device.backend)):
        slices = StreamedSlices(device.backend, source, tuple(path.slices), num_weights=2, slots=1)
        assert slices.device_bytes == device.current_bytes < whole
        for index in (*range(num_states), 1, *range(num_states)):
            for name, tensor in zip(sorted(names, reverse=True), slices(index), strict=True):
                assert torch.equal(tensor.cpu(), path.slice_tensors[f"{name}:{index}"])
        before = slices.traffic
        for index in range(num_states):
            slices(index)
        assert (slices.traffic - before).bytes_to_device == sum(b.nbytes for b in path.slices.values())
        slices.close()
        slices.close()
        del tensor
        assert device.current_bytes == 0


def test_quantised_slices_need_one_buffer_per_weight(device: StandIn) -> None:
    path = text_path("path_ltx23", "int8")
    slices = StreamedSlices(
        device.backend,
        path.slice_source(device),
        tuple(path.slices),
        num_weights=2,
        residents=tuple(path.slices),
    )
    expected = path.decoded_slices()(3)
    assert same([tensor.cpu() for tensor in slices(3)], expected)
    layout = next(iter(path.slices.values()))
    decoded = sum(2 * entry.shape[0] * entry.shape[1] for entry in layout.entries[:2])
    assert slices.device_bytes == sum(b.nbytes for b in path.slices.values()) + decoded
    slices.close()


def test_slices_of_another_number_of_weights_are_refused(device: StandIn) -> None:
    path = text_path("path_ltx2", "bf16")
    last = tuple(path.slices)[-1]
    with pytest.raises(ValueError, match=rf"{last}.* holds 1 slices of 2 weights"):
        StreamedSlices(device.backend, path.slice_source(device), (last,), num_weights=2)
    assert device.current_bytes == 0


def test_a_block_that_stays_on_the_host_must_be_there(device: StandIn) -> None:
    path = text_path("path_ltx2", "bf16")
    path.gemma.host = ()
    with pytest.raises(CheckpointError, match=r"missing \['embed_tokens\.weight'\]"):
        path.gemma.manage(device.backend)
