"""The packed file: written whole or not at all, and never read wrongly."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffsynth.errors import CheckpointError, OutputError
from diffsynth.vram.formats import StorageFormat
from diffsynth.vram.packed_file import PackedFile
from diffsynth.vram.packed_writer import write_packed
from tests.vram.packing import Network, make_source

ROOT = Path(__file__).parents[2]


@pytest.fixture
def network(tmp_path: Path) -> Network:
    make_source(tmp_path / "model.safetensors")
    return Network(tmp_path)


@pytest.fixture
def packed(network: Network, tmp_path: Path) -> Path:
    path = tmp_path / "packed.safetensors"
    network.write(path)
    return path


@pytest.mark.parametrize("format", list(StorageFormat))
def test_what_comes_out_is_what_went_in(tmp_path: Path, format: StorageFormat) -> None:
    make_source(tmp_path / "model.safetensors")
    network = Network(tmp_path, format)
    path = tmp_path / "packed.safetensors"
    network.write(path)
    with PackedFile.open(path, network.identity()) as file:
        assert file.layouts == network.blocks
        assert file.nbytes == sum(layout.nbytes for layout in network.blocks.values())
        network.check(file)
        network.check(file, mapped=True)


def test_any_safetensors_reader_can_look_into_it(network: Network, packed: Path) -> None:
    with safe_open(packed, framework="pt") as anything, PackedFile.open(packed, None) as file:
        metadata = anything.metadata()
        assert set(anything.keys()) == set(network.blocks)
        for name, layout in network.blocks.items():
            content = anything.get_tensor(name)
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
            file.read_into(name, buffer)
            assert torch.equal(content, buffer)
            pieces = buffer.split(int(metadata["piece_bytes"]))
            stated = json.loads(metadata["crc32"])[name]
            assert [int(value, 16) for value in stated] == [zlib.crc32(p.numpy().data) for p in pieces]
            assert json.loads(metadata["layouts"])[name] == layout.to_json()
    with packed.open("rb") as raw:
        assert (8 + int.from_bytes(raw.read(8), "little")) % 4096 == 0


def test_the_same_sources_give_the_same_file(network: Network, packed: Path, tmp_path: Path) -> None:
    network.write(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == packed.read_bytes()


def test_every_flipped_byte_is_noticed(network: Network, packed: Path, tmp_path: Path) -> None:
    """Header, padding of the header, metadata and payload."""
    good = packed.read_bytes()
    identity = network.identity()
    path = tmp_path / "flipped.safetensors"
    header = 8 + int.from_bytes(good[:8], "little")
    positions = [*range(40), *range(40, header, 37), header - 1, *range(header, len(good), 41), len(good) - 1]
    accepted = []
    for count, position in enumerate(positions):
        bad = bytearray(good)
        bad[position] ^= (0x01, 0x10, 0xFF)[count % 3]
        path.write_bytes(bad)
        try:
            with PackedFile.open(path, identity) as file:
                assert position >= header, f"byte {position} of the header was not checked"
                for name, layout in file.layouts.items():
                    if count % 2:
                        file.mapped(name)
                    else:
                        file.read_into(name, torch.empty(layout.nbytes, dtype=torch.uint8))
        except CheckpointError as error:
            assert str(path) in error.message
            continue
        accepted.append(position)
    assert not accepted


def test_files_of_another_length_are_refused(network: Network, packed: Path) -> None:
    good = packed.read_bytes()
    for length in (0, 1, 7, 8, 9, 500, 4096, 5000, len(good) - 1):
        packed.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            PackedFile.open(packed, network.identity())
    packed.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError, match="longer"):
        PackedFile.open(packed, None)
    shutil.copy(network.source, packed)
    with pytest.raises(CheckpointError, match="not a packed file"):
        PackedFile.open(packed, None)
    packed.unlink()
    for missing in (packed, network.source / packed.name):
        with pytest.raises(FileNotFoundError):
            PackedFile.open(missing, None)


def test_a_file_of_something_else_is_refused(network: Network, packed: Path, tmp_path: Path) -> None:
    before = network.identity()
    make_source(network.source, seed=1)
    with pytest.raises(CheckpointError, match="made of other files"):
        PackedFile.open(packed, network.identity())
    PackedFile.open(packed, before).close()


def test_cut_off_while_it_is_open(network: Network, packed: Path) -> None:
    file, other = (PackedFile.open(packed, network.identity()) for _ in range(2))
    os.truncate(packed, packed.stat().st_size - 256)
    last = list(file.layouts)[-1]
    with pytest.raises(CheckpointError, match=f"{last} ends 256 bytes early"):
        file.read_into(last, torch.empty(file.layouts[last].nbytes, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="cut off"):
        other.mapped(last)
    file.close()
    other.close()


def test_mapped_blocks_outlive_the_file(network: Network, packed: Path) -> None:
    file = PackedFile.open(packed, None)
    name = next(iter(file.layouts))
    buffer = torch.empty(file.layouts[name].nbytes, dtype=torch.uint8)
    file.read_into(name, buffer)
    mapped = file.mapped(name)
    assert mapped.data_ptr() % 256 == 0
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read_into(name, buffer)
    with pytest.raises(ValueError, match="closed"):
        file.mapped(name)
    file.close()
    del file
    gc.collect()
    packed.unlink()
    assert torch.equal(mapped, buffer)
    if Path("/proc/self/maps").exists():
        assert str(packed) in Path("/proc/self/maps").read_text()
        del mapped
        gc.collect()
        assert str(packed) not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_file_that_is_forgotten_is_closed(packed: Path) -> None:
    def is_open() -> bool:
        return any(link.resolve() == packed for link in Path("/proc/self/fd").iterdir())

    file = PackedFile.open(packed, None)
    assert is_open()
    del file
    gc.collect()
    assert not is_open()


def test_buffers_may_be_larger_and_not_smaller(network: Network, packed: Path) -> None:
    with PackedFile.open(packed, None) as file:
        name, layout = next(iter(file.layouts.items()))
        buffer = torch.full((layout.nbytes + 100,), 9, dtype=torch.uint8)
        file.read_into(name, buffer, keep_in_file_cache=False)
        assert torch.equal(buffer[: layout.nbytes], file.mapped(name))
        assert bool((buffer[layout.nbytes :] == 9).all())
        with pytest.raises(ValueError, match="flat uint8"):
            file.read_into(name, buffer[:100])


def test_threads_read_at_the_same_time(network: Network, packed: Path) -> None:
    with PackedFile.open(packed, None) as file:
        errors: list[BaseException] = []

        def read() -> None:
            try:
                for _ in range(20):
                    network.check(file)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


def test_nothing_is_left_when_writing_fails(network: Network, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "packed.safetensors"

    def stop(name: str) -> Tensor:
        if name == "blocks.1.linear.bias":
            raise KeyboardInterrupt
        return network.read(name)

    def infinite(name: str) -> Tensor:
        tensor = network.read(name)
        return tensor * torch.inf if name == "blocks.2.linear.weight" else tensor

    def source_changes(name: str) -> Tensor:
        os.utime(network.source, ns=(1, 1))
        return network.read(name)

    with pytest.raises(KeyboardInterrupt):
        network.write(path, stop)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.linear\.weight"):
        network.write(path, infinite)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        network.write(path, source_changes)
    assert not list(folder.iterdir())
    network.write(path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        network.write(path, stop)
    assert path.read_bytes() == before
    with pytest.raises(OutputError, match="could not be written: No such file"):
        network.write(tmp_path / "missing" / "packed.safetensors")


def test_progress_counts_bytes(network: Network, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = tmp_path / "packed.safetensors"
    write_packed(path, network.blocks, network.identity(), network.read, progress=lambda *n: told.append(n))
    total = sum(layout.nbytes for layout in network.blocks.values())
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total)


# -- disk full --------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own, where we may make one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_read(
    network: Network, tmp_path: Path
) -> None:
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return network.read(name)

    with small_disk(tmp_path / "disk", 2**20) as folder:
        with pytest.raises(OutputError, match=r"needs 0\.0 GB, .* free.*--no-cache"):
            network.write(folder / "packed.safetensors", read)
        assert not list(folder.iterdir())
    assert not asked


def test_a_disk_that_fills_up_meanwhile(network: Network, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 80 * 2**20) as folder:

        def read(name: str) -> Tensor:
            if name == "blocks.1.linear.bias":
                with (
                    (folder / "other").open("wb", buffering=0) as other,
                    pytest.raises(OSError, match="No space left"),
                ):
                    while True:
                        other.write(bytes(2**12))
            return network.read(name)

        with pytest.raises(OutputError, match=r"could not be written: No space left.*free space"):
            network.write(folder / "packed.safetensors", read)
        assert [p.name for p in folder.iterdir()] == ["other"]


_LIMITED = """
import resource, sys
from pathlib import Path
from diffsynth.errors import OutputError
from tests.vram.packing import Network
network = Network(Path(sys.argv[1]))
for limit in sys.argv[3:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        network.write(Path(sys.argv[2]))
    except OutputError as error:
        print(error)
"""


def child(code: str, *arguments: object) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_limit_on_file_sizes(network: Network, packed: Path, tmp_path: Path) -> None:
    """As quotas do, the system refuses a write in the middle although the disk has space."""
    size = packed.stat().st_size
    out = tmp_path / "out"
    out.mkdir()
    limits = (size // 10, size // 2, size - 1)
    printed = child(_LIMITED, network.source.parent, out / "packed.safetensors", *limits)
    assert printed.count("could not be written: File too large") == len(limits)
    assert not list(out.iterdir())


# -- memory -----------------------------------------------------------------------------------------------

_BIG = """
import json, sys
from pathlib import Path
import torch
from diffsynth.vram.blocks import TensorSpec, make_layout
from diffsynth.vram.formats import StorageFormat, encode
from diffsynth.vram.identity import identify
from diffsynth.vram.packed_writer import write_packed

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024

path, source = map(Path, sys.argv[1:])
rows, width, layers = 2048, 4096, 10
pattern = torch.linspace(-1, 1, width).bfloat16()

def pack(format):
    spec = TensorSpec((rows, width), torch.bfloat16, format)
    blocks = {str(b): make_layout({f"{b}.{i}": spec for i in range(layers)}) for b in range(2)}
    identity = identify("big", str(format), [source], blocks)
    encode(pattern[None], format)  # libraries and thread pools are there before
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    write_packed(path, blocks, identity, lambda name: pattern.expand(rows, width).contiguous())
    grown = status("VmHWM") - before
    block = max(layout.nbytes for layout in blocks.values())
    assert path.stat().st_size > 2 * block
    return {"grown": grown, "block": block, "tensor": rows * width * 2}

print(json.dumps({name: pack(StorageFormat(name)) for name in ("int4", "int8", "bf16")}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads VmHWM from /proc")
def test_writing_needs_one_block_and_one_tensor(network: Network, tmp_path: Path) -> None:
    """Packed from 320 MiB of bf16 in two blocks."""
    path = tmp_path / "big.safetensors"
    measured = json.loads(child(_BIG, path, network.source))
    path.unlink()
    assert len(measured) == 3
    for figures in measured.values():
        assert figures["grown"] < figures["block"] + figures["tensor"] + 100e6
        assert figures["grown"] > 0.5 * figures["block"]  # what is measured is this
