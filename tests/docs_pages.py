"""The pages of the documentation, and how the tests run what they show.

``docs/en/index.md`` states the rule: commands and Python blocks run as they stand, but for the few options of
:data:`SMALL` and :data:`SMALL_PYTHON`.  Everything that they name lies in one folder, which :func:`lay_out`
makes: the tiny models under the names of the released ones, pictures, clips and sounds.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.cli.command import ROOT, Here
from tests.pipelines.float8 import write_float8
from tests.pipelines.tiny import DEV, GEMMA, LORA, PICTURES, UPSCALER, tensors, write_upscaler
from training.nano import dataset
from training.nano.__main__ import Stage

EN, ZH = ROOT / "docs" / "en", ROOT / "docs" / "zh"
README, README_ZH = ROOT / "README.md", ROOT / "README_zh.md"
SIZE_PX = 128
"""The smallest at which two stages and a reference of half the size work."""
FRAMES, FPS = 121, 24

SMALL: Mapping[str, str] = {
    "--height": str(SIZE_PX),
    "--width": str(SIZE_PX),
    "--num-inference-steps": "2",
    "--video-stg-blocks": "1",
    "--audio-stg-blocks": "1",
    "--device": "cpu",
}
"""Options that every command gets which has them, instead of what it says."""
ALIASES: Mapping[str, str] = {"--steps": "--num-inference-steps"}
SMALL_PYTHON: Mapping[str, str] = {
    r'"cuda"': '"cpu"',
    r"\b(height|width)=\d+": rf"\1={SIZE_PX}",
    r"\bnum_inference_steps=\d+": "num_inference_steps=2",
    r"\bstg_blocks=\(\d+,\)": "stg_blocks=(1,)",
}
"""The same for Python, as regular expressions."""

CLIPS = ("--count", "2")
"""How many are drawn, whatever a command says."""
SMALL_TRAINING: Mapping[str, str] = {
    r"^steps = \d+": "steps = 2",
    r"^batch_size = \d+": "batch_size = 1",
    r"^buckets = .*": f'buckets = ["{SIZE_PX}x{SIZE_PX}x25"]',
    r"^\[model\]": '[model]\ndevice = "cpu"',
    r"^(width|height) = \d+": rf"\1 = {SIZE_PX}",
    r"^frames = \d+": "frames = 25",
}
"""The same for the settings of a training."""
LAST_STEP = (r"_step_\d{5}\b", "_step_00002")
"""In names of what it leaves."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def command_lines(block: str) -> Iterator[list[str]]:
    """The words of every line of a shell block, comments taken off."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def small(words: list[str], options: str) -> list[str]:
    """A command as it is run.

    Args:
        words: of the command, without ``diffsynth``.
        options: the help of the command; one that has no device computes nothing and is left alone.
    """
    known = set(re.findall(r"--[\w-]+", options))
    words = [re.sub(*LAST_STEP, word) for word in words]
    if "--device" not in known:
        return words
    kept: list[str] = []
    replaced = False
    for word in words:
        if word.startswith("--"):
            replaced = ALIASES.get(word, word) in SMALL
        if not replaced:
            kept.append("8gb" if kept[-1:] == ["--vram-limit"] and word == "auto" else word)
    return [*kept, *(word for name, value in SMALL.items() if name in known for word in (name, value))]


def small_python(block: str) -> str:
    """A Python block as it is run."""
    for pattern, new in SMALL_PYTHON.items():
        block = re.sub(pattern, new, block)
    return block


def small_training(text: str) -> str:
    """The settings of a training as it is run."""
    for pattern, new in SMALL_TRAINING.items():
        text = re.sub(pattern, new, text, flags=re.MULTILINE)
    assert "\nsteps = 2\n" in text, "a training of the pages says how long it is"
    return text


class Shell:
    """Runs commands; those of other programs, which it does not run, have to be possible at least."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._help: dict[str, str] = {}
        self._others: Mapping[str, Callable[[list[str]], bool]] = {
            "make": _is_target,
            "pip": _is_installable,
            "hf": _is_released,
            "python": _is_example_or_clips,
            "cp": _copied,
        }

    def __call__(self, words: list[str]) -> None:
        if words[0] != "diffsynth":
            assert self._others[words[0]](words[1:]), words
            return
        given = words[1:]
        if given[0] not in self._help:
            self._help[given[0]] = self._here(given[0], "--help").out
        done = self._here(*small(given, self._help[given[0]]))
        assert done.code == 0, f"{shlex.join(words)}\n{done.err}"


def _is_target(words: list[str]) -> bool:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE) is not None


def _is_installable(words: list[str]) -> bool:
    return words in (["install", "torch"], ["install", "-e", "."])


def _is_released(words: list[str]) -> bool:
    """``download REPOSITORY [FILE] --local-dir FOLDER`` names files that exist."""
    repositories = {repo["id"]: [file["name"] for file in repo["files"]] for repo in released()}
    command, repository, *file = words[: words.index("--local-dir")]
    return command == "download" and set(file) <= set(repositories[repository])


def _is_example_or_clips(words: list[str]) -> bool:
    """Examples run in ``tests/examples``; clips are drawn."""
    if words[:2] == ["-m", "training.nano.dataset"]:
        app = typer.Typer()
        app.command()(dataset.main)
        typer.main.get_command(app)([*words[2:], *CLIPS], standalone_mode=False)
        return True
    if words[:2] == ["-m", "training.nano"]:
        return words[2] in list(Stage)
    return words[0].startswith("examples/") and (ROOT / words[0]).is_file()


def _copied(words: list[str]) -> bool:
    """A file of the repository goes into the working folder; that of a training with few steps."""
    source, target = words
    Path(target).write_text(small_training((ROOT / source).read_text(encoding="utf-8")), encoding="utf-8")
    return True


def released() -> list[dict[str, list[dict[str, object]]]]:
    """Repositories and files of the released models."""
    stated = json.loads((ROOT / "tests" / "manifest" / "files.json").read_text(encoding="utf-8"))
    return list(stated["repos"])


def lay_out(folder: Path, ltx_2_3: Path) -> Path:
    """A folder with everything that the pages name, but for what a command leaves for the next."""
    models = folder / "models"
    models.mkdir(parents=True)
    for name, file in {
        "ltx-2-19b-dev": DEV,
        "ltx-2-19b-distilled": DEV,
        "ltx-2-spatial-upscaler-x2-1.0": UPSCALER,
        "ltx-2-19b-distilled-lora-384": LORA,
        "ltx-2-19b-ic-lora-union-control-ref0.5": LORA,
        "ltx-2-19b-lora-camera-control-dolly-in": LORA,
        "ltx-2.3-22b-dev": ltx_2_3,
    }.items():
        (models / f"{name}.safetensors").symlink_to(file)
    (models / GEMMA_NAME).symlink_to(GEMMA)
    (folder / "model.safetensors").symlink_to(DEV)
    write_float8(models / "ltx-2-19b-dev-fp8.safetensors")
    write_upscaler(models / "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", rational_resampler=False)
    _write_lora(models / "ltx-2.3-22b-distilled-lora-384.safetensors", ltx_2_3)
    for name, picture in zip(("first", "middle", "last"), (*PICTURES, PICTURES[0]), strict=True):
        (folder / f"{name}.png").symlink_to(picture)
    frames = [Image.new("RGB", (SIZE_PX, SIZE_PX), (2 * i, 60, 255 - 2 * i)) for i in range(FRAMES)]
    seconds = torch.arange(48000 * FRAMES // FPS) / 48000
    tone = 0.3 * torch.sin(440 * 2 * torch.pi * seconds).expand(2, -1)
    for name in ("clip", "depth", "mask"):
        write_video_audio_ltx2(frames, tone, folder / f"{name}.mp4", FPS, 48000)
    (folder / "clips.csv").write_text("video,caption\nclip.mp4,a boat on a lake\n", encoding="utf-8")
    (folder / "speech.wav").symlink_to(folder / "clip.mp4")
    return folder


GEMMA_NAME = "gemma-3-12b-it-qat-q4_0-unquantized"


def _write_lora(file: Path, checkpoint: Path, rank: int = 2) -> None:
    """A LoRA in the official format for the first attention of a checkpoint."""
    weights = tensors(checkpoint)
    state: dict[str, torch.Tensor] = {}
    for name in ("to_q", "to_k", "to_v"):
        layer = f"diffusion_model.transformer_blocks.0.attn1.{name}"
        out, width = weights[f"model.{layer}.weight"].shape
        state[f"{layer}.lora_A.weight"] = torch.full((rank, width), 0.01, dtype=torch.bfloat16)
        state[f"{layer}.lora_B.weight"] = torch.full((out, rank), 0.01, dtype=torch.bfloat16)
    save_file(state, file)
