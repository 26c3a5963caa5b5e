import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.errors import OutputError
from diffsynth.utils.files import atomic_file, check_writable, write_file


def test_the_name_appears_when_the_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_file(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    write_file(path, "old")
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_utf8_and_bytes_as_they_are(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "\u00e9")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9"
    write_file(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").read_bytes() == b"\x00"


@pytest.mark.skipif(sys.platform == "win32", reason="access rights of POSIX")
def test_access_rights_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", "x")
        with atomic_file(tmp_path / "b") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o640, 0o640]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_keeps_pointing_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "file")
    write_file(link, "x")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "x"


def test_a_missing_folder_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(OutputError, match=r"a\.txt could not be written") as caught:
        check_writable(path)
    assert "create the folder" in caught.value.hint
    with pytest.raises(OutputError):
        write_file(path, "x")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(OutputError, match="could not be written"):
        check_writable("/proc/self/a.txt")


def test_other_obstacles(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="could not be written"):
        check_writable(tmp_path / "file" / "a.txt")
    with pytest.raises(OutputError, match="could not be written"):
        check_writable(tmp_path / ("n" * 300))


def test_the_check_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a.txt") == tmp_path / "a.txt"
    assert list(tmp_path.iterdir()) == []
    write_file(tmp_path / "a.txt", "old")
    check_writable(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_full_disk_is_an_output_error_and_a_failed_read_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OutputError, match=r"a\.txt") as caught, atomic_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "free space" in caught.value.hint
    with pytest.raises(FileNotFoundError), atomic_file(path):
        (tmp_path / "input").read_bytes()
    assert list(tmp_path.iterdir()) == []
