"""Sources: what is held where, errors of reading, threads that end, interrupts."""

import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.device import Event, backend_for
from diffsynth.device.host import CpuBackend, ReachedEvent
from diffsynth.errors import CheckpointError
from diffsynth.vram.blocks import BlockLayout
from diffsynth.vram.file_source import FileSource, MappedSource, MixedSource
from diffsynth.vram.identity import identify
from diffsynth.vram.packed_file import PackedFile
from diffsynth.vram.packed_writer import write_packed
from diffsynth.vram.source import BlockSource, RamSource, TensorSource
from diffsynth.vram.streamer import Streamer
from tests.standin import StandIn
from tests.vram.support import FakeFile, expected, raw_blocks, reader_threads, tensor_of

SIZES = (1024, 512, 2048, 512, 1024, 256)
BLOCKS = raw_blocks(SIZES)
NAMES = tuple(BLOCKS)
CPU = backend_for("cpu")


def staged(source: BlockSource, name: str) -> Tensor:
    """The values of a block as a device would copy them."""
    layout = source.layout(name)
    values = tensor_of(layout, layout.views(source.stage(name))).clone()
    source.copied(name, None)
    return values


def wait_until(true: object) -> None:
    """Give other threads time; fails after ten seconds."""
    assert callable(true)
    for _ in range(10_000):
        if true():
            return
        time.sleep(0.001)
    pytest.fail("waited in vain")


def real_file(folder: Path) -> PackedFile:
    layouts: dict[str, BlockLayout] = {}
    content: dict[str, Tensor] = {}
    for name, (layout, _) in BLOCKS.items():
        (entry,) = layout.entries
        layouts[name] = BlockLayout((entry._replace(name=f"{name}.x"),), layout.nbytes)
        content[f"{name}.x"] = expected(BLOCKS, name)
    identity = identify("raw", "f32", [], layouts)
    write_packed(folder / "raw.safetensors", layouts, identity, content.__getitem__)
    return PackedFile.open(folder / "raw.safetensors", identity)


# -- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_come_in_order_and_out_of_order(buffers: int, threads: int) -> None:
    source = FileSource(FakeFile(BLOCKS), CPU, ring_buffers=buffers, reader_threads=threads)
    source.start(NAMES, repeat=True)
    for name in (*NAMES, *NAMES, "b4", "b1", "b2", "b2", *NAMES):
        assert torch.equal(staged(source, name), expected(BLOCKS, name)), name
    source.stop()
    assert reader_threads() == []


def test_what_is_staged_stays_until_it_is_copied() -> None:
    source = FileSource(FakeFile(BLOCKS), CPU, ring_buffers=1, reader_threads=2)
    source.start(NAMES, repeat=True)
    first, again = source.stage("b0"), source.stage("b0")
    assert first.data_ptr() == again.data_ptr()
    assert source.poll("b0") is not None
    source.copied("b0", None)
    assert torch.equal(staged(source, "b1"), expected(BLOCKS, "b1"))
    source.stop()


def test_reading_ahead_ends_with_the_ring_and_with_the_order() -> None:
    file = FakeFile(BLOCKS)
    source = FileSource(file, CPU, ring_buffers=2, reader_threads=2)
    source.start(NAMES, repeat=True)
    wait_until(lambda: len(file.reads) == 2)
    staged(source, "b0")
    wait_until(lambda: len(file.reads) == 3)
    assert sorted(file.reads) == ["b0", "b1", "b2"]
    source.start(NAMES[:2], repeat=False)
    for name in NAMES[:2]:
        staged(source, name)
    source.stop()
    assert len(file.reads) == 5


def test_poll_does_not_wait() -> None:
    file = FakeFile(BLOCKS)
    file.going.clear()
    source = FileSource(file, CPU)
    source.start(NAMES, repeat=True)
    assert source.poll("b0") is None
    file.going.set()
    wait_until(lambda: source.poll("b0") is not None)
    source.stop()


# -- memory -----------------------------------------------------------------------------------------------


def test_host_bytes_are_what_is_held() -> None:
    sizes = {name: layout.nbytes for name, (layout, _) in BLOCKS.items()}
    assert RamSource(BLOCKS, CPU).host_bytes == sum(sizes.values())
    file = FileSource(FakeFile(BLOCKS), CPU, ring_buffers=3)
    assert file.host_bytes == 0
    file.start(NAMES, repeat=True)
    assert file.host_bytes == 3 * 2048
    file.start(("b1", "b0"), repeat=False)
    assert file.host_bytes == 2 * 1024
    file.stop()
    assert file.host_bytes == 0
    mapped = MappedSource(FakeFile(BLOCKS), CPU)
    mapped.start(NAMES, repeat=True)
    assert mapped.host_bytes == 0


def test_a_fixed_share_stays_in_memory_and_is_read_once() -> None:
    file, sizes = FakeFile(BLOCKS), {name: layout.nbytes for name, (layout, _) in BLOCKS.items()}
    kept = ("b0", "b3", "b4")
    source = MixedSource(file, CPU, in_ram=kept, ring_buffers=2)
    source.start(NAMES, repeat=True)
    for _ in range(3):
        for name in NAMES:
            assert torch.equal(staged(source, name), expected(BLOCKS, name))
    assert source.host_bytes == 2 * 2048 + sum(sizes[name] for name in kept)
    source.stop()
    assert source.host_bytes == 0
    assert [file.reads.count(name) for name in kept] == [1, 1, 1]
    assert all(file.reads.count(name) >= 3 for name in set(NAMES) - set(kept))
    assert source.bytes_from_disk == sum(sizes[name] for name in file.reads)


def test_blocks_resident_on_the_device_take_no_memory_on_the_host() -> None:
    file, residents = FakeFile(BLOCKS), ("b0", "b2")
    source = MixedSource(file, CPU, in_ram=NAMES)
    with Streamer(CPU, source, NAMES, slots=1, residents=residents, prepare=tensor_of) as streamer:
        streamed = [layout.nbytes for name, (layout, _) in BLOCKS.items() if name not in residents]

        def all_in_memory() -> bool:
            for name in NAMES:
                assert torch.equal(streamer.acquire(name), expected(BLOCKS, name))
                streamer.release(name)
            return source.host_bytes == sum(streamed)

        wait_until(all_in_memory)  # and the ring is gone, since nothing is left to read
        assert reader_threads() == []
        assert [file.reads.count(name) for name in NAMES] == [1] * len(NAMES)


def test_page_locked_memory_is_given_back() -> None:
    with StandIn() as device:
        for share, locked in (((), False), (NAMES, True), (NAMES, False)):
            source = MixedSource(FakeFile(BLOCKS), device.backend, in_ram=share, page_locked=locked)
            source.start(NAMES, repeat=True)
            source.stage("b0")
            kept = sum(layout.nbytes for layout, _ in BLOCKS.values()) if locked else 0
            assert 3 * 2048 <= device.pinned.used <= 3 * 2048 + kept
            source.stop()
            gc.collect()
            assert device.pinned.used == 0


def test_without_page_locked_memory_everything_works() -> None:
    with StandIn(pin_limit_bytes=0) as device:
        into = torch.empty(2048 // 4, device=device.torch_device)
        sources = (FileSource(FakeFile(BLOCKS), device.backend), RamSource(BLOCKS, device.backend))
        for source in sources:
            with Streamer(device.backend, source, ("b2",), slots=1, prepare=tensor_of) as streamer:
                into.copy_(streamer.acquire("b2"))
            assert torch.equal(into.cpu(), expected(BLOCKS, "b2"))


# -- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), CheckpointError("b1 is damaged")])
def test_errors_of_reader_threads_are_raised_where_the_block_is_asked_for(error: Exception) -> None:
    file = FakeFile(BLOCKS)
    file.fails["b1"] = error
    source = FileSource(file, CPU)
    source.start(NAMES, repeat=True)
    staged(source, "b0")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"b1.*(Input/output error|damaged)"):
            source.stage("b1")
    assert source.poll("b1") is None
    for name in NAMES[2:]:
        staged(source, name)
    file.fails.clear()
    source.start(NAMES, repeat=True)  # what was read ahead has failed already
    for name in NAMES:
        assert torch.equal(staged(source, name), expected(BLOCKS, name))
    source.stop()


def test_a_damaged_file_is_an_error_in_every_source(tmp_path: Path) -> None:
    path = real_file(tmp_path).path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for kind in (FileSource, MappedSource):
        source = kind(PackedFile.open(path, None), CPU)
        with Streamer(CPU, source, NAMES, slots=2, prepare=tensor_of_any) as streamer:
            for name in NAMES[:-1]:
                assert torch.equal(streamer.acquire(name), expected(BLOCKS, name))
                streamer.release(name)
            with pytest.raises(CheckpointError, match="b5 does not have its checksum"):
                streamer.acquire("b5")
    assert reader_threads() == []


def tensor_of_any(layout: BlockLayout, views: dict[str, dict[str, Tensor]]) -> Tensor:
    return views[layout.entries[0].name][""]


def test_a_real_file_gives_its_blocks(tmp_path: Path) -> None:
    for source in (
        FileSource(real_file(tmp_path), CPU),
        FileSource(real_file(tmp_path), CPU, keep_in_file_cache=False),
        MappedSource(real_file(tmp_path), CPU),
        MixedSource(real_file(tmp_path), CPU, in_ram=NAMES[:3]),
    ):
        with Streamer(CPU, source, NAMES, slots=2, prepare=tensor_of_any) as streamer:
            for name in (*NAMES, *NAMES):
                assert torch.equal(streamer.acquire(name), expected(BLOCKS, name))
                streamer.release(name)
            assert streamer.traffic.bytes_from_disk > 0
        assert torch.equal(source.host_view("b3")[:512].view(torch.float32), expected(BLOCKS, "b3"))


# -- threads ----------------------------------------------------------------------------------------------


def test_stop_ends_all_threads_whatever_they_do() -> None:
    file = FakeFile(BLOCKS)
    source = FileSource(file, CPU, reader_threads=4)
    source.start(NAMES, repeat=True)
    assert len(reader_threads()) == 4
    source.stop()
    source.stop()
    assert reader_threads() == []
    file.going.clear()
    source.start(NAMES, repeat=True)
    threading.Timer(0.05, file.going.set).start()
    source.stop()
    assert reader_threads() == []


class _Unreached(ReachedEvent):
    recorded = False

    def query(self) -> bool:
        return not self.recorded


class Stuck(CpuBackend):
    """A device whose copies never end."""

    def event(self) -> Event:
        return _Unreached()

    def record(self, event: Event, stream: object) -> None:
        assert isinstance(event, _Unreached)
        event.recorded = True


def test_threads_that_wait_for_a_copy_can_be_stopped_and_do_not_touch_the_buffer() -> None:
    file = FakeFile(BLOCKS)
    source = FileSource(file, Stuck(torch.device("cpu")), ring_buffers=1, reader_threads=1)
    source.start(NAMES, repeat=True)
    staged(source, "b0")
    time.sleep(0.02)
    assert source.poll("b1") is None
    assert file.reads == ["b0"]
    source.stop()
    assert reader_threads() == []


@pytest.mark.skipif(os.name == "nt", reason="signals of the keyboard cannot be sent there")
def test_an_interrupt_while_waiting_for_the_disk_leaves_a_source_that_works() -> None:
    file = FakeFile(BLOCKS)
    file.going.clear()
    source = FileSource(file, CPU)
    source.start(NAMES, repeat=True)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        source.stage("b0")
    file.going.set()
    for name in NAMES:
        assert torch.equal(staged(source, name), expected(BLOCKS, name))
    source.stop()
    assert reader_threads() == []


# -- loose tensors ----------------------------------------------------------------------------------------


def test_loose_tensors_are_packed_when_they_are_wanted() -> None:
    layouts, tensors = {}, {}
    for name, (layout, _) in BLOCKS.items():
        (entry,) = layout.entries
        layouts[name] = BlockLayout((entry._replace(name=f"{name}.x"),), layout.nbytes)
        tensors[f"{name}.x"] = expected(BLOCKS, name).to(torch.float64)
    source = TensorSource(layouts, tensors.__getitem__, CPU)
    with Streamer(CPU, source, NAMES, slots=2, prepare=tensor_of_any) as streamer:
        for name in (*NAMES, *NAMES):
            assert torch.equal(streamer.acquire(name), expected(BLOCKS, name))
            streamer.release(name)
        tensors["b3.x"] = torch.zeros(1)
        with pytest.raises(CheckpointError, match=r"b3\.x: shape \(1,\)"):
            for name in (*NAMES, *NAMES):
                streamer.acquire(name)
                streamer.release(name)
    assert torch.equal(source.host_view("b2").view(torch.float32), expected(BLOCKS, "b2"))
