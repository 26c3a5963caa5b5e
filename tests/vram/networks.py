"""Real networks at tiny sizes for the tests of managed modules, and every way to place them."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsynth.device import Backend
from diffsynth.models.ltx2.transformer import LTX2Transformer, Pass, TransformerConfig
from diffsynth.vram.binding import module_layouts
from diffsynth.vram.blocks import BlockLayout, pack_entry, unpack
from diffsynth.vram.file_source import BlockFile, FileSource, MappedSource, MixedSource
from diffsynth.vram.formats import AS_IS, StorageFormat
from diffsynth.vram.identity import identify
from diffsynth.vram.managed import ManagedModule
from diffsynth.vram.packed_file import PackedFile
from diffsynth.vram.packed_writer import write_packed
from diffsynth.vram.source import BlockSource, RamSource
from tests.runners.case import Case
from tests.runners.transformer import build, modality

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCES = ("ram", "pageable", "mapped", "file", "mixed")


@dataclass
class Packed:
    """A network, its blocks in one storage format, and the file that holds them."""

    module: nn.Module
    blocks: tuple[str, ...]
    layouts: dict[str, BlockLayout]
    tensors: dict[str, Tensor]
    host: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    file: BlockFile | None = None

    def write(self, folder: Path, name: str) -> "Packed":
        path = folder / f"{name}.safetensors"
        identity = identify(name, "test", [], self.layouts)
        write_packed(path, self.layouts, identity, lambda entry: self.tensors[entry])
        self.file = PackedFile.open(path, identity)
        return self

    def source(self, kind: str, backend: Backend) -> BlockSource:
        if kind in ("ram", "pageable"):
            each = dict.fromkeys(self.layouts, self.tensors)
            return RamSource.pack(self.layouts, each, backend, page_locked=kind == "ram")
        assert self.file is not None
        if kind == "mapped":
            return MappedSource(self.file, backend)
        if kind == "file":
            return FileSource(self.file, backend)
        return MixedSource(self.file, backend, in_ram=self.blocks[::2], page_locked=True)

    def manage(self, backend: Backend, kind: str = "ram") -> ManagedModule:
        module = copy.deepcopy(self.module).to("meta")
        return ManagedModule(
            module,
            self.source(kind, backend),
            backend,
            blocks=self.blocks,
            host=self.host,
            left_out=self.left_out,
        )

    def decoded(self) -> nn.Module:
        """An ordinary module whose weights went through the storage format on the CPU."""
        module = copy.deepcopy(self.module)
        tensors = dict(self.tensors)
        for layout in self.layouts.values():
            memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
            for entry in layout.entries:
                pack_entry(layout, entry.name, self.tensors[entry.name], memory)
                # A copy of its own: products on the CPU depend on how memory is aligned.
                tensors[entry.name] = unpack(layout, memory, entry.name).clone()
        module.load_state_dict(tensors, strict=True, assign=True)
        return module.requires_grad_(False)

    @property
    def block_bytes(self) -> dict[str, int]:
        return {block: self.layouts[block].nbytes for block in self.blocks}


def pack_network(
    module: nn.Module,
    blocks: Sequence[str],
    format: StorageFormat,
    *,
    host: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> Packed:
    """Linear weights inside the blocks in ``format``, all other tensors as they are.

    A format that keeps tensors as they are also decides the dtype of all of them; with others it is bf16.
    """
    dtype = AS_IS.get(format, torch.bfloat16)
    module = module.to(dtype)
    inside = tuple(f"{block}." for block in blocks)
    layouts = module_layouts(
        module,
        blocks=blocks,
        host=host,
        left_out=left_out,
        dtype_of=lambda name: dtype,
        format_of=lambda name: format if name.startswith(inside) else None,
    )
    # Copies of their own: products on the CPU depend on how memory is aligned.
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    return Packed(module, tuple(blocks), layouts, tensors, tuple(host), tuple(left_out))


@cache
def _case(name: str) -> Case:
    return Case.load(GOLDEN / "transformer" / f"{name}.safetensors")


VIDEO_ONLY = "video_only_ltx23"
BOTH_STREAMS = "full_ltx2"


def transformer(format: StorageFormat, case: str = VIDEO_ONLY, num_blocks: int = 4) -> Packed:
    """The transformer of a golden case with more blocks: copies of its own, all different."""
    small = build(_case(case))
    weights = small.state_dict()
    generator = torch.Generator().manual_seed(0)
    for index in range(num_blocks):
        for name, tensor in list(weights.items()):
            if name.startswith("transformer_blocks.0."):
                other = name.replace(".0.", f".{index}.", 1)
                noise = torch.randn(tensor.shape, generator=generator)
                weights[other] = tensor + 0.05 * noise
    config: TransformerConfig = replace(small.config, num_layers=num_blocks)
    with torch.device("meta"):
        network = LTX2Transformer(config)
    network.load_state_dict(weights, strict=True, assign=True)
    blocks = [f"transformer_blocks.{index}" for index in range(num_blocks)]
    return pack_network(network.requires_grad_(False), blocks, format)


def passes(count: int, device: torch.device | str, dtype: torch.dtype, case: str = VIDEO_ONLY) -> list[Pass]:
    """Guidance passes over the inputs of the golden case, all different."""
    inputs = {name: tensor[:1].to(device) for name, tensor in _case(case).group("in/").items()}
    made = []
    for number in range(count):
        changed = {
            name: tensor * (1 - 0.1 * number) if name.endswith("_context") else tensor
            for name, tensor in inputs.items()
        }
        made.append(Pass(video=modality(changed, "video", dtype), audio=modality(changed, "audio", dtype)))
    return made


def on_host(velocities: Iterable[tuple[Tensor | None, Tensor | None]]) -> list[Tensor]:
    """All velocities of all passes on the CPU."""
    return [tensor.cpu() for pair in velocities for tensor in pair if tensor is not None]


def same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal in number, shapes, dtypes and every value; NaN is never equal."""
    return len(actual) == len(expected) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(actual, expected, strict=True)
    )


def total(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    """Bytes of the named blocks."""
    return sum(sizes[name] for name in names)
