"""The cache of packed files: killed, damaged, stale, two writers; and its commands."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffsynth.cli.cache import cache_app, parse_age
from diffsynth.errors import CheckpointError, OutputError, RequestError
from diffsynth.vram.cache import FOLDER_VARIABLE, CacheEntry, EntryState, PackedCache, default_folder
from diffsynth.vram.formats import StorageFormat
from diffsynth.vram.identity import SourceFile, identify
from diffsynth.vram.packed_file import PackedFile
from tests.vram.packing import Network, make_source

ROOT = Path(__file__).parents[2]


@pytest.fixture
def network(tmp_path: Path) -> Network:
    make_source(tmp_path / "model.safetensors")
    return Network(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "cache" / "packed")


def get(cache: PackedCache, network: Network) -> tuple[PackedFile, bool]:
    """The file, and whether it was made now; its content is checked both ways."""
    made = []

    def build(path: Path) -> None:
        made.append(path)
        network.write(path)

    file = cache.get_or_build(network.identity(), build)
    network.check(file)
    network.check(file, mapped=True)
    return file, bool(made)


def use(cache: PackedCache, network: Network) -> bool:
    """Whether the file had to be made."""
    file, made = get(cache, network)
    file.close()
    return made


def names(cache: PackedCache) -> list[str]:
    """Files in the folder, without locks."""
    return sorted(p.name for p in cache.folder.iterdir() if p.suffix != ".lock")


def test_made_once_and_found_again(network: Network, cache: PackedCache) -> None:
    assert not cache.folder.exists()
    assert use(cache, network)
    assert not use(cache, network)
    assert not use(PackedCache(cache.folder), Network(network.source.parent))
    assert names(cache) == [network.identity().file_name]
    assert names(cache)[0].startswith("tiny-int8-")


def test_formats_have_files_of_their_own(network: Network, cache: PackedCache) -> None:
    other = Network(network.source.parent, StorageFormat.INT4)
    assert use(cache, network)
    assert use(cache, other)
    assert not use(cache, network)
    assert not use(cache, other)
    assert len(names(cache)) == 2
    # The same name for another division into blocks is another file, too.
    same_name = identify("tiny", "int8", [network.source], other.blocks)
    assert same_name.file_name not in names(cache)


# -- stale ------------------------------------------------------------------------------------------------


def test_a_changed_source_is_converted_anew(network: Network, cache: PackedCache) -> None:
    assert use(cache, network)
    (old,) = names(cache)
    make_source(network.source, seed=1)
    changed = Network(network.source.parent)
    assert [entry.state for entry in cache.entries()] == [EntryState.STALE]
    assert use(cache, changed)
    (new,) = names(cache)
    assert new != old
    assert [entry.state for entry in cache.entries()] == [EntryState.READY]


def test_a_touched_source_is_converted_anew(network: Network, cache: PackedCache) -> None:
    assert use(cache, network)
    os.utime(network.source, ns=(1, 1))
    assert use(cache, network)


def test_a_source_of_equal_size_and_times_is_told_apart(network: Network, cache: PackedCache) -> None:
    """As in archives that set all times alike: another checkpoint of the same layout."""
    os.utime(network.source, ns=(5, 5))
    size = network.source.stat().st_size
    assert use(cache, network)
    make_source(network.source, seed=1)
    os.utime(network.source, ns=(5, 5))
    assert network.source.stat().st_size == size
    assert use(cache, Network(network.source.parent))


def test_a_changed_header_is_told_apart(network: Network) -> None:
    before = SourceFile.of(network.source)
    content = bytearray(network.source.read_bytes())
    content[content.index(b"table")] = ord("T")
    network.source.write_bytes(content)
    os.utime(network.source, ns=(before.mtime_ns, before.mtime_ns))
    after = SourceFile.of(network.source)
    assert (after.size, after.mtime_ns) == (before.size, before.mtime_ns)
    assert after != before
    assert not before.changed()
    with pytest.raises(CheckpointError, match="changed"):
        network.identity().__class__(
            network="tiny", policy="int8", sources=(before,), layout=""
        ).check_current()


def test_sources_of_any_kind_can_be_identified(tmp_path: Path) -> None:
    for content in (b"", b"x", b"\xff" * 5000, (10**6).to_bytes(8, "little") + b"{}"):
        path = tmp_path / "file"
        path.write_bytes(content)
        first = SourceFile.of(path)
        assert first == SourceFile.of(path)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(path)
        assert SourceFile.of(tmp_path / "link") == first
    with pytest.raises(CheckpointError, match="cannot be read"):
        SourceFile.of(tmp_path / "missing")


def test_a_file_of_another_identity_under_the_right_name(network: Network, cache: PackedCache) -> None:
    assert use(cache, network)
    (name,) = names(cache)
    content = (cache.folder / name).read_bytes()
    make_source(network.source, seed=1)
    changed = Network(network.source.parent)
    (cache.folder / name).unlink()
    (cache.folder / changed.identity().file_name).write_bytes(content)
    assert use(cache, changed)


def test_a_source_that_changes_while_it_is_converted(network: Network, cache: PackedCache) -> None:
    def build(path: Path) -> None:
        def read(name: str) -> torch.Tensor:
            make_source(network.source, seed=1)
            return network.read(name)

        network.write(path, read)

    with pytest.raises(CheckpointError, match="changed while it was in use"):
        cache.get_or_build(network.identity(), build)
    assert names(cache) == []
    assert use(cache, Network(network.source.parent))


# -- damaged ----------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("position", [3, 100, 3000])
def test_a_damaged_header_is_made_anew(
    network: Network, cache: PackedCache, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert use(cache, network)
    path = cache.folder / names(cache)[0]
    flip(path, position)
    assert [entry.state for entry in cache.entries()] == [EntryState.DAMAGED]
    assert use(cache, network)
    assert "It is made anew" in caplog.text
    assert not use(cache, network)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_damaged_block_is_an_error_now_and_made_anew_later(
    network: Network, cache: PackedCache, mapped: bool
) -> None:
    assert use(cache, network)
    path = cache.folder / names(cache)[0]
    flip(path, path.stat().st_size - 1000)
    with (
        cache.get_or_build(network.identity(), network.write) as file,
        pytest.raises(CheckpointError, match=r"does not have its checksum.*start again"),
    ):
        network.check(file, mapped=mapped)
    assert use(cache, network)


def test_a_good_file_is_not_deleted_for_a_damaged_one(network: Network, cache: PackedCache) -> None:
    """Another process has already replaced the file that this one finds damaged."""
    assert use(cache, network)
    path = cache.folder / names(cache)[0]
    flip(path, path.stat().st_size - 1000)
    with cache.get_or_build(network.identity(), network.write) as file:
        network.write(path)
        with pytest.raises(CheckpointError, match="does not have its checksum"):
            network.check(file)
    assert not use(cache, network)


# -- killed, two writers ----------------------------------------------------------------------------------


@contextmanager
def child(network: Network, cache: PackedCache, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that makes the packed file, see :mod:`tests.vram.packing`."""
    command = [sys.executable, "-m", "tests.vram.packing"]
    command += [*map(str, (network.source.parent, cache.folder, *arguments))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def asleep(processes: list[subprocess.Popen[str]], folder: Path) -> list[subprocess.Popen[str]]:
    """Wait until one of the processes sleeps in the middle of its work."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [p for p in processes if (folder / f"asleep.{p.pid}").exists()]
        if found:
            return found
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    raise AssertionError("no process got to the point where it sleeps")


def test_killed_in_the_middle(network: Network, cache: PackedCache) -> None:
    """Two processes: one writes and is killed; the other one waits, goes on, and is killed as well."""
    folder = network.source.parent
    with child(network, cache, 0) as first, child(network, cache, 5) as second:
        (writer,) = asleep([first, second], folder)
        (left,) = names(cache)
        assert left.endswith(".part")
        assert [entry.state for entry in cache.entries()] == [EntryState.UNFINISHED]
        assert cache.clear() == []
        assert names(cache) == [left]
        writer.kill()
        writer.wait()
        (waiting,) = {first, second} - {writer}
        assert asleep([waiting], folder) == [waiting]
        (other,) = names(cache)
        assert other != left
        waiting.kill()
        waiting.wait()
    assert names(cache) == [other]
    assert use(cache, network)
    assert names(cache) == [network.identity().file_name]


def test_leftovers_can_be_cleared(network: Network, cache: PackedCache) -> None:
    cache.folder.mkdir(parents=True)
    left = cache.folder / f".{network.identity().file_name}.0123abcd.part"
    left.write_bytes(bytes(100))
    assert [entry.path for entry in cache.clear()] == [left]
    assert names(cache) == []


def test_two_processes_at_once(network: Network, cache: PackedCache) -> None:
    with child(network, cache) as first, child(network, cache) as second:
        outputs = [process.communicate(timeout=60) for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0), outputs
    said = sorted(out.split()[0] for out, _ in outputs)
    assert said == ["found", "made"]
    assert not use(cache, network)
    assert len(names(cache)) == 1


def test_two_threads_at_once(network: Network, cache: PackedCache) -> None:
    made: list[bool] = []
    threads = [threading.Thread(target=lambda: made.append(use(cache, network))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, False, True]


def test_two_writers_without_locks(network: Network, cache: PackedCache) -> None:
    """Both write; whichever file stays is right."""
    assert use(cache, network)
    path = cache.folder / names(cache)[0]
    threads = [threading.Thread(target=network.write, args=(path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not use(cache, network)
    assert len(names(cache)) == 1


# -- folder, listing, clearing ----------------------------------------------------------------------------


def test_entries_describe_the_files(network: Network, cache: PackedCache) -> None:
    assert cache.entries() == []
    assert use(cache, network)
    (cache.folder / "notes.txt").write_text("not ours")
    (cache.folder / "other.safetensors").write_bytes(network.source.read_bytes())
    entries = {entry.path.name: entry for entry in cache.entries()}
    assert entries.keys() == {network.identity().file_name, "other.safetensors"}
    entry = entries[network.identity().file_name]
    assert entry == CacheEntry(
        path=entry.path,
        network="tiny",
        sources=(str(network.source.resolve()),),
        format="int8",
        nbytes=entry.path.stat().st_size,
        created=entry.created,
        state=EntryState.READY,
    )
    assert abs(datetime.now(UTC) - entry.created) < timedelta(minutes=1)
    assert entries["other.safetensors"].state is EntryState.DAMAGED
    network.source.unlink()
    assert {e.state for e in cache.entries() if e.network} == {EntryState.READY}


def test_clearing_by_age(network: Network, cache: PackedCache) -> None:
    other = Network(network.source.parent, StorageFormat.FP8)
    assert use(cache, network)
    assert use(cache, other)
    old = cache.folder / network.identity().file_name
    long_ago = (datetime.now(UTC) - timedelta(days=10)).timestamp()
    os.utime(old, (long_ago, long_ago))
    assert cache.entries()[0].path == old
    assert cache.clear(older_than=timedelta(days=11)) == []
    assert [entry.path for entry in cache.clear(older_than=timedelta(days=9))] == [old]
    assert not use(cache, other)
    assert len(cache.clear()) == 1
    assert names(cache) == []


def test_what_is_in_use_survives_clearing(network: Network, cache: PackedCache) -> None:
    file, _ = get(cache, network)
    with file:
        cache.clear()
        network.check(file)


def test_weights_without_a_file_are_not_cached(network: Network, cache: PackedCache) -> None:
    with pytest.raises(ValueError, match="no file"):
        cache.get_or_build(replace(network.identity(), sources=()), network.write)


def test_a_folder_that_cannot_be_made(network: Network, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"could not be made.*--no-cache"):
        PackedCache(tmp_path / "file" / "packed").get_or_build(network.identity(), network.write)


def test_a_builder_that_does_nothing(network: Network, cache: PackedCache) -> None:
    with pytest.raises(CheckpointError, match="deleted"):
        cache.get_or_build(network.identity(), lambda path: None)


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert PackedCache().folder == tmp_path / "packed"
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert default_folder() == tmp_path / "xdg" / "diffsynth" / "packed"


def test_waiting_is_said_once(network: Network, cache: PackedCache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    started, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        started.set()
        go_on.wait(10)
        network.write(path)

    first = threading.Thread(target=lambda: cache.get_or_build(network.identity(), slow).close())
    first.start()
    started.wait(10)
    second = threading.Thread(target=lambda: use(cache, network))
    second.start()
    second.join(0.35)
    go_on.set()
    first.join()
    second.join()
    assert caplog.text.count("waiting for it") == 1
    assert caplog.text.count("converting the tiny to int8") == 1


# -- commands ---------------------------------------------------------------------------------------------


def test_list_and_clear(network: Network, cache: PackedCache) -> None:
    runner = CliRunner()
    assert use(cache, network)
    size = sum(entry.nbytes for entry in cache.entries())
    folder = ["--folder", str(cache.folder.parent)]
    listed = runner.invoke(cache_app, ["list", *folder])
    assert listed.exit_code == 0
    assert f"tiny int8: {size / 1e9:.3f} GB" in listed.stdout
    assert str(network.source) in listed.stdout
    assert "1 files" in listed.stdout
    as_json = json.loads(runner.invoke(cache_app, ["list", "--json", *folder]).stdout)
    assert as_json["folder"] == str(cache.folder.parent)
    (entry,) = as_json["entries"]
    assert (entry["network"], entry["format"], entry["bytes"]) == ("tiny", "int8", size)
    assert entry["state"] == "ready"
    kept = runner.invoke(cache_app, ["clear", "--older-than", "1d", *folder])
    assert "0 files" in kept.stdout
    cleared = runner.invoke(cache_app, ["clear", *folder])
    assert cleared.exit_code == 0
    assert "1 files" in cleared.stdout
    assert names(cache) == []


def test_ages() -> None:
    assert parse_age("12h") == timedelta(hours=12)
    assert parse_age("1.5d") == timedelta(hours=36)
    assert parse_age("2w") == timedelta(days=14)
    for wrong in ("", "30", "d", "-1d", "1 month"):
        with pytest.raises(RequestError, match="older-than"):
            parse_age(wrong)


def test_the_commands_do_not_import_torch() -> None:
    code = "import sys, diffsynth.cli.cache; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
