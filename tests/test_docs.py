"""What the README shows works: its snippet runs, its commands exist, its links lead somewhere."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import typer

from diffsynth.cli.app import app
from diffsynth.cli.options import parse_request
from diffsynth.pipelines.limits import VRAMPreset
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.storage import NAMES
from diffsynth.utils.media_io_ltx2 import read_request
from diffsynth.vram.formats import StorageFormat, decode, encode, stored_bytes

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "ltx2" / "README.md", ROOT / "docs" / "vram.md"]
DOCUMENTS.append(ROOT / "docs" / "prompt_enhancement.md")
README = DOCUMENTS[0].read_text(encoding="utf-8")
VRAM = DOCUMENTS[2].read_text(encoding="utf-8")

REPLACED = {
    '"cuda"': '"cpu"',
    'torch.cuda.mem_get_info("cpu")[1] / (1024**3) - 0.5': "7.5",
    "height=512": "height=64",
    "width=768": "width=96",
    "num_frames=121": "num_frames=9",
}
"""Device and sizes; the places of files come from the environment."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_quick_start(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = blocks(README, "python")
    for old, new in REPLACED.items():
        assert old in snippet, f"the quick start no longer says {old}"
        snippet = snippet.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(names["video"]) == 9
    assert names["audio"].shape[0] == 2
    assert names["audio"].dtype == torch.float32
    with av.open(str(tmp_path / "ltx2_onestage.mp4")) as file:
        pictures, sound = file.streams.video[0], file.streams.audio[0]
        assert (pictures.width, pictures.height, pictures.frames) == (96, 64, 9)
        assert (pictures.average_rate, sound.rate) == (24, 24000)
    record = read_request(tmp_path / "ltx2_onestage.mp4")
    assert record is not None
    assert record["request"]["seed"] == 43


def test_memory_snippet(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = blocks(VRAM, "python")
    for old, new in REPLACED.items():
        snippet = snippet.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(snippet, "vram.md", "exec"), names)
    assert len(names["video"]) == 9
    shown = capsys.readouterr().out
    for phase in ("text", "connectors", "denoise 1", "decode video", "decode audio"):
        assert phase in shown
    assert not list(tmp_path.iterdir())


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table that begins with ``header``, without its first two lines."""
    table = text[text.index(header) :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_presets_are_those_of_the_code() -> None:
    shown = {cells[0].strip("`"): cells[1:] for cells in rows(VRAM, "| preset |")}
    assert shown == {preset.value: [f"{preset.limit_gb:.1f} GB", preset.storage] for preset in VRAMPreset}


def test_storage_formats_are_those_of_the_code() -> None:
    """Names and bits; errors as the benchmark measured them, to a tenth of their size."""
    shown = {cells[0]: cells[1:4] for cells in rows(VRAM, "| format |")}
    assert shown.keys() == set(NAMES) - {"f32"}
    weight = torch.randn(256, 2048, generator=torch.Generator().manual_seed(3)) * 0.01
    for name, (bits, gaussian, _) in shown.items():
        format = StorageFormat(name)
        assert f"{8 * stored_bytes(format, (2048, 2048)) / 2048**2:.2f}" == bits
        if "to" not in gaussian:
            stored = decode(encode(weight, format), format, weight.shape, torch.float32)
            error = (stored - weight).norm() / weight.norm()
            assert 100 * float(error) == pytest.approx(float(gaussian.removesuffix(" %")), rel=0.1, abs=0.006)


def commands() -> Iterator[list[str]]:
    """Every call of ``diffsynth`` in the documents, comments taken off."""
    for document in DOCUMENTS:
        for block in blocks(document.read_text(encoding="utf-8"), "shell"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["diffsynth"]:
                    yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_shell_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    with command.make_context(words[0], list(words[1:])) as context:
        if words[0] == "generate":
            assert parse_request(context.params).validate()
    assert not list(tmp_path.iterdir())


def test_there_are_shell_commands() -> None:
    assert {words[0] for words in commands()} == {"cache", "decode", "generate", "inspect", "plan"}


def test_options_and_arguments_in_the_text_exist() -> None:
    """``name=value`` in the tables and the prose are arguments of the public functions."""
    import inspect

    from diffsynth.loader import ModelConfig
    from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2

    known: set[str] = set()
    for function in (
        LTX2AudioVideoPipeline.__call__,
        LTX2AudioVideoPipeline.from_pretrained,
        LTX2AudioVideoPipeline.load_lora,
        write_video_audio_ltx2,
        ModelConfig,
    ):
        known |= inspect.signature(function).parameters.keys()
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            for name in re.findall(r"\b([a-z_0-9]+)=", code):
                assert name in known, f"{document.name}: {code}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks(README, "shell"):
        for target in re.findall(r"^make (\w+)", block, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
