"""What the documentation shows works: its snippets and commands run, its links lead somewhere."""

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
from diffsynth.cli.reference import BEGIN, END, reference
from diffsynth.nano import bundle
from diffsynth.pipelines.limits import VRAMPreset
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.rescue import FinalLatents
from diffsynth.pipelines.storage import NAMES
from diffsynth.request import GenerateRequest
from diffsynth.utils.media_io_ltx2 import read_request
from diffsynth.vram.formats import StorageFormat, decode, encode, stored_bytes
from tests.cli.command import ROOT, Here
from tests.docs_pages import (
    EN,
    README,
    README_ZH,
    ZH,
    Shell,
    blocks,
    command_lines,
    lay_out,
    released,
    small,
    small_python,
    small_training,
)
from tests.pipelines.tiny import SMALL

EXAMPLES = ROOT / "examples" / "ltx2"
ENGLISH = [
    README,
    EXAMPLES / "README.md",
    EXAMPLES / "model_training" / "README.md",
    *sorted(EN.glob("*.md")),
]
DOCUMENTS = [*ENGLISH, README_ZH, *sorted(ZH.glob("*.md"))]
START = README.read_text(encoding="utf-8")
VRAM = (EN / "vram.md").read_text(encoding="utf-8")

REPLACED = {
    '"cuda"': '"cpu"',
    'torch.cuda.mem_get_info("cpu")[1] / (1024**3) - 0.5': "7.5",
    "height=512": "height=64",
    "width=768": "width=96",
    "num_frames=121": "num_frames=9",
}
"""Device and sizes; the places of files come from the environment."""


def snippets(text: str, language: str) -> list[str]:
    return [block for each, block in blocks(text) if each == language]


def test_quick_start(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = snippets(START, "python")
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
    (snippet,) = snippets(VRAM, "python")
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
    for document in ENGLISH:
        for block in snippets(document.read_text(encoding="utf-8"), "shell"):
            for words in command_lines(block):
                if words[0] == "diffsynth" and not words[1].startswith("-"):
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


def test_every_command_is_shown() -> None:
    group: Any = typer.main.get_command(app)
    assert {words[0] for words in commands()} == set(group.commands)


def test_options_and_arguments_in_the_text_exist() -> None:
    """``name=value`` in the tables and the prose are arguments of the public functions."""
    import inspect

    from diffsynth.pipelines.ltx2_audio_video import GuidanceParams, ModelConfig
    from diffsynth.training.trainer import train
    from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2

    known: set[str] = set()
    for function in (
        LTX2AudioVideoPipeline.__call__,
        LTX2AudioVideoPipeline.from_pretrained,
        LTX2AudioVideoPipeline.load_lora,
        write_video_audio_ltx2,
        ModelConfig,
        GuidanceParams,
        train,
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


def _anchors(page: Path) -> set[str]:
    """What a heading can be reached by: lower case, hyphens for spaces, nothing but letters and digits."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_into_pages_lead_to_headings() -> None:
    found = 0
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
            assert anchor in _anchors(document.parent / target if target else document), anchor
            found += 1
    assert found


def test_what_is_changed_before_a_command_runs() -> None:
    """Sizes, steps, device and what is free: nothing else."""
    typed = "generate 'a b' --height 512 --steps 30 --image a.png 0 -1 --vram-limit auto --output a.mp4"
    options = "--height, --width, --num-inference-steps, --device"
    assert shlex.join(small(shlex.split(typed), options)) == (
        "generate 'a b' --image a.png 0 -1 --vram-limit 8gb --output a.mp4 "
        "--height 128 --width 128 --num-inference-steps 2 --device cpu"
    )
    assert small(shlex.split(typed), "--height, --width") == shlex.split(typed)
    assert small_python("f(height=512, num_frames=121, stg_blocks=(29,), device='cpu')") == (
        "f(height=128, num_frames=121, stg_blocks=(1,), device='cpu')"
    )


@pytest.fixture(scope="module")
def named_files(tmp_path_factory: pytest.TempPathFactory, ltx_2_3: Path) -> Path:
    """What the pages name."""
    return lay_out(tmp_path_factory.mktemp("docs"), ltx_2_3)


@pytest.mark.parametrize("page", ENGLISH, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_that_is_shown_runs(
    page: Path,
    named_files: Path,
    untrained_nano: Path,
    pipe: LTX2AudioVideoPipeline,
    downloaded: Path,
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commands and Python blocks of a page in their order, as ``docs/en/index.md`` says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundle, "WEIGHTS", untrained_nano)
    for file in named_files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    shown = blocks(page.read_text(encoding="utf-8"))
    if any("diffsynth decode latents" in block for _, block in shown):
        FinalLatents.of(pipe.generate(GenerateRequest(prompt="a boat", seed=1, **SMALL))).save(
            tmp_path / "latents.safetensors"
        )
    shell, names = Shell(here), dict[str, Any]()
    for language, block in shown:
        if language == "shell":
            for words in command_lines(block):
                shell(words)
        elif language == "toml":
            (tmp_path / "run.toml").write_text(small_training(block), encoding="utf-8")
        elif language == "python" and page != README:  # its block runs above, with 9 frames
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(small_python(block), page.name, "exec"), names)
        else:
            assert language in {"python", "text"}, "a block of another language is never run"
    named = re.findall(r"(?:-path|--output|,) \"?([\w.-]+\.(?:mp4|wav))\b", "".join(b for _, b in shown))
    for result in {Path(name) for name in named} - {Path(file.name) for file in named_files.iterdir()}:
        assert result.stat().st_size > 0, result


@pytest.mark.parametrize("page", [*sorted(EN.glob("*.md")), README], ids=lambda path: path.name)
def test_both_languages_say_the_same(page: Path) -> None:
    """Same code blocks, same headings by level, same tables by size."""
    english = page.read_text(encoding="utf-8")
    chinese = (README_ZH if page == README else ZH / page.name).read_text(encoding="utf-8")
    assert blocks(chinese) == blocks(english)
    for line in (r"^#+ ", r"^\|"):
        assert re.findall(line, chinese, re.MULTILINE) == re.findall(line, english, re.MULTILINE)
    assert len(re.findall("[\u4e00-\u9fff]", chinese)) > 50


def test_both_languages_have_the_same_pages() -> None:
    pages = {page.name for page in EN.glob("*.md")}
    assert {page.name for page in ZH.glob("*.md")} == pages
    for folder in (EN, ZH):
        index = (folder / "index.md").read_text(encoding="utf-8")
        assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages - {"index.md"}


@pytest.mark.parametrize("folder", [EN, ZH], ids=lambda path: path.name)
def test_the_reference_is_that_of_the_code(folder: Path) -> None:
    page = (folder / "command_line.md").read_text(encoding="utf-8")
    committed = page[page.index(BEGIN) : page.index(END) + len(END)]
    assert committed == reference(), "python -m diffsynth.cli.reference prints the new one"


def test_model_files_are_the_released_ones() -> None:
    """Every file in the tables exists, and sizes are those that its tensors add up to."""
    page = (EN / "model_files.md").read_text(encoding="utf-8")
    sizes: dict[tuple[str, str], Any] = {}
    for repo in released():
        for file in repo["files"]:
            *owner, name = str(file["name"]).split(" : ")
            sizes[owner[0] if owner else str(repo["id"]), name] = file.get("bytes_computed")
    listed = re.findall(r"^\| ([\w./-]+/[\w.-]+) \| `([\w.-]+)` \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert len(listed) > 30
    for repository, name, gb in listed:
        size = sizes[repository, name]
        if size is not None:
            assert gb == f"{size / 1e9:.1f}", name
