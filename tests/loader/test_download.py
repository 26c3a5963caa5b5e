"""Downloads against a hand-written hub: sizes first, never a partial file under its final name."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffsynth.errors import DownloadError
from diffsynth.loader.download import HUBS, RemoteFile, fetch, free_bytes, matches, modelscope_files
from tests.loader.fake_hub import FakeHub

MODEL = "owner/model"
GEMMA = {
    "config.json": b"{}",
    "tokenizer.json": b"tokens",
    "tokenizer.model": b"pieces",
    "README.md": b"read me",
    ".gitattributes": b"",
    "model-00001-of-00002.safetensors": b"first" * 100,
    "model-00002-of-00002.safetensors": b"second" * 100,
    "text_encoder/model-00001-of-00002.safetensors": b"other",
}


def _present(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_files_arrive_complete_and_nothing_else_stays(tmp_path: Path) -> None:
    fetched = fetch(FakeHub(GEMMA), MODEL, ["model-*.safetensors"], tmp_path)
    assert [file.name for file in fetched] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert fetched[1].read_bytes() == GEMMA["model-00002-of-00002.safetensors"]
    assert _present(tmp_path) == {file.name for file in fetched}


def test_total_size_is_told_before_the_first_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "diffsynth")
    hub = FakeHub({"a.safetensors": b"x"}, sizes={"a.safetensors": 43_284_455_114})
    with pytest.raises(DownloadError):
        fetch(hub, MODEL, ["a.safetensors"], tmp_path, free=lambda _: 10**15)
    assert "fetching 43.3 GB in 1 file(s) from modelscope: owner/model" in caplog.messages[0]


def test_full_disk_is_refused_with_figures_before_anything_is_fetched(tmp_path: Path) -> None:
    hub = FakeHub({"a.safetensors": b"x"}, sizes={"a.safetensors": 43_284_455_114})
    with pytest.raises(DownloadError, match=r"needs 43\.4 GB more, 20\.0 GB are free") as raised:
        fetch(hub, MODEL, ["a.safetensors"], tmp_path, free=lambda _: 20 * 10**9)
    assert "local_model_path" in raised.value.hint
    assert hub.downloads == []


def test_what_an_earlier_try_left_counts_as_room(tmp_path: Path) -> None:
    hub = FakeHub({"a.safetensors": b"x" * 10**6}, stops={"a.safetensors": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        fetch(hub, MODEL, ["a.safetensors"], tmp_path)
    needed = 64 * 2**20 + 500_000
    with pytest.raises(DownloadError):
        fetch(hub, MODEL, ["a.safetensors"], tmp_path, free=lambda _: needed - 1)
    assert fetch(hub, MODEL, ["a.safetensors"], tmp_path, free=lambda _: needed)


def test_free_space_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") > 0


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), ConnectionError("reset by peer")], ids=["ctrl-c", "network"]
)
def test_interrupted_download_leaves_no_file_and_is_taken_up_again(
    tmp_path: Path, stop: BaseException
) -> None:
    hub = FakeHub(GEMMA, stops={"model-00002-of-00002.safetensors": stop})
    expected = KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else DownloadError
    with pytest.raises(expected):
        fetch(hub, MODEL, ["model-*.safetensors"], tmp_path)
    assert not (tmp_path / "model-00002-of-00002.safetensors").exists()
    fetch(hub, MODEL, ["model-*.safetensors"], tmp_path)
    assert hub.downloads.count("model-00001-of-00002.safetensors") == 1
    assert hub.resumed[-1] == 300
    assert _present(tmp_path) == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert (tmp_path / "model-00002-of-00002.safetensors").read_bytes() == b"second" * 100


def test_size_mismatch_is_an_error_and_the_file_is_dropped(tmp_path: Path) -> None:
    hub = FakeHub({"a.safetensors": b"12345"}, sizes={"a.safetensors": 7})
    with pytest.raises(DownloadError, match="came with 5 bytes, the hub lists 7") as raised:
        fetch(hub, MODEL, ["a.safetensors"], tmp_path)
    assert raised.value.hint
    assert "a.safetensors" not in {Path(name).name for name in _present(tmp_path)}


def test_existing_files_are_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"mine")
    hub = FakeHub(GEMMA)
    fetch(hub, MODEL, ["model-*.safetensors"], tmp_path)
    assert hub.downloads == ["model-00002-of-00002.safetensors"]
    assert (tmp_path / "model-00001-of-00002.safetensors").read_bytes() == b"mine"
    assert fetch(hub, MODEL, ["model-*.safetensors"], tmp_path) == []


def test_files_in_folders(tmp_path: Path) -> None:
    fetch(FakeHub(GEMMA), MODEL, ["text_encoder/model-*.safetensors"], tmp_path)
    assert _present(tmp_path) == {"text_encoder/model-00001-of-00002.safetensors"}


def test_whole_folder_means_a_tokenizer_without_weights(tmp_path: Path) -> None:
    fetch(FakeHub(GEMMA), MODEL, [""], tmp_path)
    assert _present(tmp_path) == {"config.json", "tokenizer.json", "tokenizer.model"}


def test_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"no file that fits 'ltx-2-19b-dev\.safetensor'") as raised:
        fetch(FakeHub({"ltx-2-19b-dev.safetensors": b""}), MODEL, ["ltx-2-19b-dev.safetensor"], tmp_path)
    assert "ltx-2-19b-dev.safetensors" in raised.value.hint


def test_hub_that_does_not_answer_is_explained(tmp_path: Path) -> None:
    class Silent(FakeHub):
        def list_files(self, model_id: str) -> list[RemoteFile]:
            raise OSError("Name or service not known")

    with pytest.raises(DownloadError, match="cannot list the files of owner/model: OSError: Name") as raised:
        fetch(Silent({}), MODEL, ["a"], tmp_path)
    assert "download_source='huggingface'" in raised.value.hint
    assert isinstance(raised.value.__cause__, OSError)


@pytest.mark.parametrize(("path", "pattern"), [("../a.txt", "*/a.txt"), ("/a/b.txt", "/a/b.txt")])
def test_a_path_that_leaves_the_folder_is_not_listed(tmp_path: Path, path: str, pattern: str) -> None:
    with pytest.raises(DownloadError, match="no file that fits"):
        fetch(FakeHub({path: b"x"}), MODEL, [pattern], tmp_path / "inside")


def test_two_at_once_fetch_each_file_once(tmp_path: Path) -> None:
    """The second one waits for the first and then finds the file."""
    started, go_on = threading.Event(), threading.Event()

    class Slow(FakeHub):
        def download(self, model_id: str, path: str, into: Path) -> Path:
            started.set()
            assert go_on.wait(10)
            return super().download(model_id, path, into)

    first, second = Slow({"a.safetensors": b"data"}), FakeHub({"a.safetensors": b"data"})
    one = threading.Thread(target=fetch, args=(first, MODEL, ["a.safetensors"], tmp_path))
    two = threading.Thread(target=fetch, args=(second, MODEL, ["a.safetensors"], tmp_path))
    one.start()
    assert started.wait(10)
    two.start()
    two.join(0.2)
    assert two.is_alive()
    go_on.set()
    one.join(10)
    two.join(10)
    assert (first.downloads, second.downloads) == (["a.safetensors"], [])
    assert _present(tmp_path) == {"a.safetensors"}


def test_a_process_that_dies_does_not_block_the_next_one(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from diffsynth.loader.download import fetch\n"
        "from tests.loader.fake_hub import FakeHub\n"
        "class Dies(FakeHub):\n"
        "    def download(self, model_id, path, into):\n"
        "        (into / 'half').write_bytes(b'12'); os._exit(9)\n"
        "fetch(Dies({'a.safetensors': b'1234'}), 'o/m', ['a.safetensors'], Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False)
    assert died.returncode == 9
    assert not (tmp_path / "a.safetensors").exists()
    fetch(FakeHub({"a.safetensors": b"1234"}), MODEL, ["a.safetensors"], tmp_path)
    assert _present(tmp_path) == {"a.safetensors"}


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("model-1.safetensors", "model-*.safetensors", True),
        ("a/model-1.safetensors", "model-*.safetensors", False),
        ("a/model-1.safetensors", "a/model-*.safetensors", True),
        ("a/b/model-1.safetensors", "a/*.safetensors", False),
        (".cache/model-1.safetensors", "*/model-1.safetensors", False),
        ("tokenizer/tokenizer.json", "tokenizer/", True),
        ("tokenizer.json", "tokenizer/", False),
        ("tokenizer/model.safetensors", "tokenizer/", False),
        ("deep/tokenizer.model", "", True),
        ("model.safetensors", "", False),
    ],
)
def test_patterns_stay_inside_one_folder_level(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


def test_the_hubs_have_the_names_that_the_option_uses() -> None:
    assert {name: make().name for name, make in HUBS.items()} == {
        "modelscope": "modelscope",
        "huggingface": "huggingface",
    }


def test_folders_of_modelscope_are_no_files() -> None:
    older = [
        {"Path": "tokenizer", "Size": 0, "Type": "tree"},
        {"Path": "tokenizer/tokenizer.json", "Size": 33, "Type": "blob"},
        {"Path": "empty", "Size": 0, "Type": "tree"},
    ]
    newer = [{"Path": "tokenizer", "Size": 0}, {"Path": "tokenizer/tokenizer.json", "Size": 33}]
    assert modelscope_files(older) == modelscope_files(newer) == [("tokenizer/tokenizer.json", 33)]


def test_hub_libraries_take_the_arguments_that_are_used() -> None:
    """Their signatures, in a process of its own: importing them is slow and not free of warnings."""
    script = (
        "import inspect, json\n"
        "from huggingface_hub import HfApi, hf_hub_download\n"
        "from huggingface_hub.hf_api import RepoFile\n"
        "from modelscope.hub.api import HubApi\n"
        "from modelscope.hub.file_download import model_file_download\n"
        "calls = [HfApi.list_repo_tree, hf_hub_download, HubApi.get_model_files, model_file_download]\n"
        "print(json.dumps([list(inspect.signature(call).parameters) for call in calls]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tree, download, files, file_download = json.loads(done.stdout.splitlines()[-1])
    assert {"repo_id", "recursive"} <= set(tree)
    assert [*download[:2], "local_dir"] == ["repo_id", "filename", "local_dir"] and "local_dir" in download
    assert {"model_id", "recursive"} <= set(files)
    assert file_download[:2] == ["model_id", "file_path"] and "local_dir" in file_download
