"""Clips made on the way: right, repeatable, and without a trace in the run."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth.device import resolve_device
from diffsynth.errors import Cancelled, CheckpointError, RequestError
from diffsynth.loader import ModelConfig
from diffsynth.models.ltx2.video_vae import VideoDecoder
from diffsynth.pipelines.assemble import open_models
from diffsynth.training.base import open_base
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.samples import read_index
from diffsynth.training.state import Checkpoints
from diffsynth.training.trainer import TrainingStep, train
from diffsynth.training.validation import Validator
from diffsynth.utils.media_io_ltx2 import read_request, read_video, write_video_audio_ltx2
from tests.pipelines.tiny import DEV, GEMMA, PICTURES, load
from tests.standin import StandIn
from tests.training.clips import write_clip, write_config, write_data_set
from tests.training.test_trainer import equal

PROMPT = "a red square moves right 0"
SMALL = "width = 64\nheight = 64\nframes = 9\nsteps = 2\ncfg_scale = 2.0\nevery = 2"
TRAINING = "steps = 4\nlearning_rate = 1e-2\nema_decay = 0.5"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set that is encoded."""
    write_data_set(tmp_path)
    preprocess(read_config(write_config(tmp_path)))
    return tmp_path


def configured(folder: Path, run: str = "run", clips: str = "", **sections: str) -> TrainConfig:
    clips = clips or f'[[validation.clips]]\nprompt = "{PROMPT}"'
    given = {
        "output": f'folder = "{run}"\nsave_every = 2\ndtype = "float32"',
        "training": TRAINING,
        "validation": f"{SMALL}\n{clips}",
    }
    return read_config(write_config(folder, **{**given, **sections}))


def files(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in (config.output.folder / "validation").glob("*"))


def difference(one: TrainConfig, name: str, two: TrainConfig, other: str) -> float:
    """Mean of the levels of 255 by which two clips differ: the encoder of the mp4 may round otherwise."""
    first, second = (
        read_video(config.output.folder / "validation" / file, argument="clip").frames.float()
        for config, file in ((one, name), (two, other))
    )
    return float((first - second).abs().mean())


def test_rounds_leave_no_trace_in_the_run(folder: Path) -> None:
    plain = configured(folder, "plain", validation=SMALL)
    train(plain)
    state = torch.get_rng_state()
    shown = configured(folder, "shown")
    train(shown)
    assert torch.equal(torch.get_rng_state(), state)
    assert files(plain) == []
    assert files(shown) == [f"step_0000{step}_1.mp4" for step in (0, 2, 4)]
    one, two = Checkpoints(plain.output.folder), Checkpoints(shown.output.folder)
    assert equal(one.state(4), two.state(4))
    for mean in (False, True):
        assert equal(one.result("lora", 4, mean=mean), two.result("lora", 4, mean=mean))


def test_a_clip_is_what_the_pipeline_makes_with_the_mean(folder: Path) -> None:
    """It equals a generation with the file of the running mean; the record says what made it."""
    config = configured(folder, training="steps = 2\nlearning_rate = 1e-1\nema_decay = 0.5")
    train(config)
    record = read_request(config.output.folder / "validation" / "step_00002_1.mp4")
    assert record is not None
    assert record["training"] == {"output": "run", "mean": True, "step": 2}
    assert (record["request"]["prompt"], record["request"]["seed"]) == (PROMPT, 42)
    pipe = load(stage2_lora=None)
    pipe.load_lora(pipe.dit, Checkpoints(config.output.folder).result("lora", 2, mean=True))
    (request,) = config.validation.requests("2.0", audio_only=False, reference_scale=1)
    made = pipe.generate(request)
    write_video_audio_ltx2(made.frames, made.waveform, config.output.folder / "validation" / "own.mp4")
    assert difference(config, "own.mp4", config, "step_00002_1.mp4") < 0.5
    assert difference(config, "own.mp4", config, "step_00000_1.mp4") > 5


def test_stopped_in_a_round_and_resumed(folder: Path) -> None:
    """The state of the step is there, and the resumed run makes the clips that are missing."""
    unbroken = configured(folder, "unbroken")
    train(unbroken)
    broken, seen, asked = configured(folder, "broken"), list[TrainingStep](), 0

    def stop() -> bool:
        """In the middle of the round after step 2."""
        nonlocal asked
        asked += bool(seen) and seen[-1].step == 2
        return asked > 3

    with pytest.raises(Cancelled, match=r"after step 2 of 4"):
        train(broken, on_step=seen.append, should_stop=stop)
    assert files(broken) == ["step_00000_1.mp4"]
    train(broken, resume=True)
    assert files(broken) == files(unbroken)
    for name in files(broken):
        assert difference(broken, name, unbroken, name) < 0.5
    one, two = Checkpoints(unbroken.output.folder), Checkpoints(broken.output.folder)
    assert equal(one.state(4), two.state(4))


def test_every_kind_of_input(folder: Path) -> None:
    write_clip(folder / "reference.mp4")
    clips = "\n".join(
        f'[[validation.clips]]\nprompt = "{PROMPT}"\n{given}'
        for given in (f'image = "{PICTURES[0]}"', 'sound = "reference.mp4"', 'video = "reference.mp4"')
    )
    config = configured(folder, clips=clips, training="steps = 1")
    train(config)
    assert files(config) == [f"step_00000_{number}.mp4" for number in (1, 2, 3)]


def test_sound_alone(folder: Path) -> None:
    config = configured(folder, training="steps = 1", strategy='video = "none"')
    train(config)
    assert files(config) == ["step_00000_1.wav"]


def test_memory_is_given_back(folder: Path) -> None:
    """The decoders of a round exist no more after it."""

    def decoders() -> int:
        return sum(type(each) is VideoDecoder for each in gc.get_objects())

    network = load(stage2_lora=None).dit
    gc.collect()
    before = decoders()
    validator = Validator(configured(folder), resolve_device("cpu"))
    assert decoders() == before + 1, "its outline"
    validator.run(network, 0, record={}, should_stop=lambda: False)
    assert decoders() == before + 1


def test_streamed_base_makes_room_and_comes_back(folder: Path) -> None:
    """On a device of its own: blocks that come and go give the clip of weights that stay, and no bit of the
    run changes."""
    model = f'checkpoint = "{DEV}"\ngemma = "{GEMMA}"\ndevice = "standin"\ndtype = "float32"'
    how = {"model": model, "memory": 'storage = "f32"', "training": "steps = 2\nlearning_rate = 1e-2"}
    with StandIn() as device:
        plain = load_file(train(configured(folder, "plain", validation=SMALL, **how)))
        shown = configured(folder, "shown", **how)
        opened = open_models([ModelConfig(path=DEV)]).only(["dit"])
        base = open_base(shown, opened, read_index(shown.data.folder))
        with base.entered():
            held = device.current_bytes
            with base.aside():
                assert device.current_bytes == 0
            assert device.current_bytes == held > 0
        again = load_file(train(shown))
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    resident = configured(folder, "resident", training=how["training"])
    train(resident)
    assert files(shown) == files(resident)
    for name in files(shown):
        assert difference(shown, name, resident, name) < 0.5


def test_mistakes_are_named_before_any_step(folder: Path) -> None:
    def refused(match: str, **sections: str) -> None:
        with pytest.raises((RequestError, CheckpointError), match=match):
            train(configured(folder, **sections))

    refused(r"run\.toml:\d+: unknown key 'wdith' in \[validation\].*width", validation="wdith = 64")
    refused(r"\[validation\] height=65", validation='height = 65\n[[validation.clips]]\nprompt = "a"')
    refused(
        r"run\.toml:\d+: unknown key 'promt' in \[validation\.clips\].*prompt",
        validation='[[validation.clips]]\npromt = "a"',
    )
    refused(r"\[validation\] every=0", validation="every = 0")
    refused("nowhere.png", validation=f'{SMALL}\n[[validation.clips]]\nprompt = "a"\nimage = "nowhere.png"')
    refused("stg_blocks|block", validation='frames = 9\n[[validation.clips]]\nprompt = "a"')
    assert not (folder / "run" / "metrics.csv").exists()
