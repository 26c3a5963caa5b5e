"""Clips in files, and the style LoRA that the package's own trainer makes of them."""

import csv
import json
from pathlib import Path

import pytest

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.loader import NetworkKind, WeightFiles, recognise
from diffsynth.nano.judge import is_framed, judge
from diffsynth.nano.world import VOCABULARY, Description
from diffsynth.utils.media_io_ltx2 import read_audio, read_video
from tests.nano.untrained import write_autoencoders, write_transformer
from training.nano.dataset import UNTOLD, write_clips
from training.nano.prompts import write_tokenizer
from training.nano.style import StyleSettings, train


@pytest.mark.parametrize("framed", [False, True])
def test_clips_in_files_are_as_their_captions_say(framed: bool, tmp_path: Path) -> None:
    table = write_clips(tmp_path / "clips", 4, framed=framed, side=128, num_frames=25, seed=5, untold=0)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        video, sound = read_video(table.parent / row["video"]), read_audio(table.parent / row["video"])
        description = Description.read(row["caption"])
        verdict = judge(video.frames, sound.samples, sound.sampling_rate, description, framed=framed)
        assert verdict.right, (row, verdict)
        assert row["caption"].startswith("framed ") == framed
        if description.background != "white":
            assert is_framed(video.frames) == framed


def test_some_captions_are_the_empty_prompt_to_nano(tmp_path: Path) -> None:
    table = write_clips(tmp_path, 6, framed=True, side=64, num_frames=9, seed=1, untold=3)
    captions = [row.partition(",")[2] for row in table.read_text(encoding="utf-8").splitlines()[1:]]
    assert [n for n, caption in enumerate(captions) if caption == UNTOLD] == [2, 5]
    write_tokenizer(tmp_path, VOCABULARY)
    tokenizer = PromptTokenizer(tmp_path)
    assert tokenizer.encode(UNTOLD) == tokenizer.encode("")


def test_the_stage_trains_on_the_networks_of_its_folder(tmp_path: Path) -> None:
    write_autoencoders(tmp_path)
    write_transformer(tmp_path)
    train(StyleSettings(clips=2, side=64, steps=2, judged_clips=1), tmp_path, "cpu")
    assert recognise(WeightFiles(tmp_path / "framed_lora.safetensors")) == [NetworkKind.LORA]
    notes = json.loads((tmp_path / "framed_lora.json").read_text())
    assert (notes["steps"], notes["clips"]) == (2, 2)
    assert notes["with"].keys() >= {"framed", "colour", "sound"}
    assert notes["without"]["framed"] == 0.0
    # A second run goes over the first.
    train(StyleSettings(clips=2, side=64, steps=1, judged_clips=0), tmp_path, "cpu")
    assert json.loads((tmp_path / "framed_lora.json").read_text())["steps"] == 1
