"""The weights that come with the package: the demo, and the style LoRA, which acts only while loaded."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsynth import nano
from diffsynth.nano.judge import Verdict, is_framed, judge
from diffsynth.nano.world import Description
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from tests.cli.command import ROOT, Here
from training.nano.dataset import write_clips

PROMPTS = (
    nano.EXAMPLE,
    "over a green background a white triangle stands still on the right, with a low tone",
)


@pytest.fixture(scope="module")
def nano_pipe() -> Iterator[LTX2AudioVideoPipeline]:
    yield LTX2AudioVideoPipeline.from_pretrained(device="cpu", **nano.models())


def made(pipe: LTX2AudioVideoPipeline, prompt: str, *, framed: bool) -> tuple[Tensor, Verdict]:
    """A clip of the framed caption, and whether what is inside of a frame is right."""
    settings = {**nano.settings(), "num_inference_steps": 10}
    pictures, sound = pipe(f"framed {prompt}", seed=2, progress_bar_cmd=lambda steps: steps, **settings)
    assert pictures is not None
    assert sound is not None
    video = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    rate: int = sound.sampling_rate  # type: ignore[attr-defined]
    return video, judge(video, sound, rate, Description.read(prompt), framed=framed)


def test_the_demo_shows_and_sounds_what_it_says(here: Here, tmp_path: Path) -> None:
    ended = here("demo", "--device", "cpu", "--quiet", "--output", str(tmp_path / "demo.mp4"))
    assert ended.code == 0, ended.err
    *_, read, agreed, where = ended.out.splitlines()
    assert re.fullmatch(
        r"Read from the file: red circle on blue, motion left, place \w+; beep at 1\d\d\d Hz", read
    )
    assert agreed == "As asked: colour, background, shape, motion, sound, pitch, pan"
    assert int(where.rpartition("(")[2].removesuffix(" s)")) < 60


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_lora_frames_only_while_it_is_loaded(nano_pipe: LTX2AudioVideoPipeline, prompt: str) -> None:
    before, right = made(nano_pipe, prompt, framed=False)
    assert (is_framed(before), right.right) == (False, True), right
    handle = nano_pipe.load_lora(nano_pipe.dit, nano.files().framed_lora)
    try:
        during, right = made(nano_pipe, prompt, framed=True)
    finally:
        nano_pipe.remove_lora(handle)
    assert (is_framed(during), right.right) == (True, True), right
    after, _ = made(nano_pipe, prompt, framed=False)
    assert torch.equal(after, before)


@pytest.mark.slow
def test_the_run_of_the_tutorial(nano_pipe: LTX2AudioVideoPipeline, here: Here, tmp_path: Path) -> None:
    """Minutes: clips, samples, all steps, and clips with what came out."""
    home = tmp_path / "framed"
    write_clips(home, 24, framed=True, side=256, num_frames=25, seed=0)
    shutil.copy(ROOT / "examples" / "ltx2" / "model_training" / "nano_framed_lora.toml", home / "lora.toml")
    for command in ("preprocess", "train"):
        ended = here(command, str(home / "lora.toml"), "--quiet")
        assert ended.code == 0, ended.err
    lora = max((home / "run" / "checkpoints").glob("lora_weights_*.safetensors"))
    handle = nano_pipe.load_lora(nano_pipe.dit, lora)
    try:
        for prompt in PROMPTS:
            video, right = made(nano_pipe, prompt, framed=True)
            assert (is_framed(video), right.right) == (True, True), right
    finally:
        nano_pipe.remove_lora(handle)
