"""The data of the transformer, and samples, with untrained autoencoders."""

from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.conditioning.tokens import patchify
from diffsynth.loader import NetworkKind
from tests.nano.untrained import write_autoencoders, write_transformer
from training.nano.clips import Scenes
from training.nano.dit import GEMMA, NanoTransformer
from training.nano.latents import FOLDER, Clips, LatentSettings, encode, sides
from training.nano.parts import load_part
from training.nano.samples import Course, judged, sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    write_autoencoders(folder)
    return folder


def test_latents_are_those_of_the_encoders(folder: Path) -> None:
    settings = LatentSettings(counts={64: 3, 96: 2}, batch=2)
    encode(settings, folder, "cpu")
    assert sides(folder / FOLDER) == [64, 96]
    clips = Clips.load(folder / FOLDER, 64, "cpu")
    assert clips.video.shape == (3, 4 * 2 * 2, 8)
    assert clips.audio.shape == (3, 26, 128)
    scenes = Scenes.draw(2, seed=1000 * 1_000_003 + 64 * 100_003)
    encoder = load_part(folder, NetworkKind.VIDEO_ENCODER, "cpu", torch.float32)
    expected = patchify(encoder(scenes.video(64)))
    torch.testing.assert_close(clips.video[:2].float(), expected, atol=0.02, rtol=0.02)
    tokenizer = PromptTokenizer(folder / GEMMA)
    assert tokenizer.decode(clips.ids[1, 2].tolist()) == scenes.descriptions[1].caption(2).replace(",", "")


def test_the_transformer_is_read_as_it_was_written(folder: Path) -> None:
    network = write_transformer(folder).bfloat16()
    again = NanoTransformer.load(folder, "cpu", torch.bfloat16)
    own = network.state_dict()
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in again.state_dict().items())


def test_samples_are_judged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = write_transformer(folder)
    courses = [Course(side=64, steps=2), Course(side=64, distilled=True)]
    found = judged(network, folder, "cpu", count=2, courses=courses)
    assert list(found) == ["64 px, 2 steps", "64 px, distilled"]
    assert set(found["64 px, 2 steps"]) >= {"colour", "shape", "sound"}
    assert "distilled: colour" in capsys.readouterr().out


def test_samples_of_a_batch_are_those_alone(folder: Path) -> None:
    network, tokenizer = write_transformer(folder), PromptTokenizer(folder / GEMMA)
    prompts = ["a red circle bounces over a blue background, silence", "a low tone"]
    course = Course(side=64, steps=2)
    video, audio = sample(network, tokenizer, prompts, course, 16)
    (alone, sound) = sample(network, tokenizer, prompts[:1], course, 16)
    torch.testing.assert_close(video[:1], alone)
    torch.testing.assert_close(audio[:1], sound)
    assert not torch.allclose(video[0], video[1], atol=0.1)
