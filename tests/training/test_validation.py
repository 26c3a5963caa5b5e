"""Clips made on the way: right, repeatable, and without a trace in the run."""

import gc
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth.device import resolve_device
from diffsynth.errors import Cancelled, CheckpointError, MemoryBudgetError, RequestError
from diffsynth.loader import ModelConfig
from diffsynth.models.ltx2.video_vae import VideoDecoder
from diffsynth.pipelines.assemble import open_models
from diffsynth.training.base import StreamedBase, open_base
from diffsynth.training.clip_plans import plan_clip
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.samples import read_index
from diffsynth.training.state import Checkpoints
from diffsynth.training.trainer import TrainingStep, train
from diffsynth.training.validation import Validator
from diffsynth.utils.audio import read_audio
from diffsynth.utils.media_io_ltx2 import read_request, read_video, write_video_audio_ltx2
from tests.pipelines.placed import smallest_of
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


def test_stopped_before_the_first_step(folder: Path) -> None:
    """No step is made for it, and the clips of the beginning are made when the run goes on."""
    config, seen = configured(folder, training="steps = 2"), list[TrainingStep]()
    with pytest.raises(Cancelled, match=r"after step 0 of 2"):
        train(config, on_step=seen.append, should_stop=lambda: True)
    assert [step.step for step in seen] == [0]
    assert files(config) == []
    train(config, resume=True)
    assert files(config) == ["step_00000_1.mp4", "step_00002_1.mp4"]


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


LARGE = "width = 192\nheight = 192\nframes = 17\nsteps = 2\ncfg_scale = 2.0\nevery = 2"


def limited(folder: Path, run: str, limit: int | None = None, **sections: str) -> TrainConfig:
    """On the stand-in with a clip that is much larger than the samples, under a limit in bytes."""
    model = f'checkpoint = "{DEV}"\ngemma = "{GEMMA}"\ndevice = "standin"\ndtype = "float32"'
    memory = 'storage = "f32"' + ("" if limit is None else f"\nvram_limit = {limit / 2**30:.15f}")
    clip = f'[[validation.clips]]\nprompt = "{PROMPT}"'
    how = {
        "training": "steps = 1\nlearning_rate = 1e-2",
        "lora": "rank = 2",
        "validation": f"{LARGE}\n{clip}",
    }
    return configured(folder, run, **{"model": model, "memory": memory, **how, **sections})


def base_of(config: TrainConfig) -> StreamedBase:
    opened = open_models([ModelConfig(path=DEV)]).only(["dit"])
    base = open_base(config, opened, read_index(config.data.folder))
    assert isinstance(base, StreamedBase)
    return base


def enough(folder: Path, low: int, **sections: str) -> int:
    """Nearly the smallest limit under which the clip and the training are planned."""
    validator, high = Validator(limited(folder, "planned", **sections), resolve_device("standin")), 2**25
    while high - low > 2**15:
        middle = (low + high) // 2
        try:
            validator.share(base_of(limited(folder, "planned", middle, **sections)).room)
            high = middle
        except MemoryBudgetError:
            low = middle
    return high


def test_a_clip_is_planned_with_the_training(folder: Path) -> None:
    """Under a limit that keeps only the training it is refused before any step, with one that fits; under one
    that is accepted, the whole run stays below it."""
    with StandIn():
        base = base_of(limited(folder, "none"))
        training = smallest_of([base.demand], base.budget)
        limit = enough(folder, training)
    low = limit - limit // 16
    assert low > training
    with StandIn(), pytest.raises(MemoryBudgetError, match=r"\[validation\] .* needs .* of device") as no:
        train(limited(folder, "refused", low))
    assert not (folder / "refused" / "metrics.csv").exists()
    smaller = LARGE
    for name, value in re.findall(r"(\w+) = (\d+)", no.value.hint):
        smaller = re.sub(rf"\b{name} = \d+", f"{name} = {value}", smaller)
    assert smaller != LARGE
    clip = f'[[validation.clips]]\nprompt = "{PROMPT}"'
    for config, capacity in (
        (limited(folder, "smaller", low, validation=f"{smaller}\n{clip}"), low),
        (limited(folder, "run", limit), limit),
    ):
        with StandIn(capacity_bytes=capacity) as device:
            train(config)
            assert device.peak_bytes <= capacity
        assert files(config) == ["step_00000_1.mp4"]


def test_denoising_takes_blocks_off_the_device(folder: Path) -> None:
    """Where they have to make room for a clip, it comes out as without a limit, and so does the training."""
    alone = {"strategy": 'video = "none"'}
    with StandIn():
        free = limited(folder, "free", **alone)
        without = load_file(train(free))
        base = base_of(free)
        config = limited(
            folder,
            "tight",
            limit := enough(folder, smallest_of([base.demand], base.budget), **alone),
            **alone,
        )
        validator, placed = Validator(config, resolve_device("standin")), base_of(config)
        (request,) = validator.missing(0).values()
        plans = plan_clip(request, load(stage2_lora=None).parts, placed.room)
    print(
        {k: (v.num_blocks, v.residents, v.slots, v.peak_vram_bytes) for k, v in plans.items()},
        placed.room,
        limit,
    )
    assert len(plans["denoise 1"].residents) < len(placed.plan.residents)
    with StandIn(capacity_bytes=limit):
        tight = load_file(train(config))
    assert all(torch.equal(without[key], tight[key]) for key in without)
    first, second = (
        read_audio(each.output.folder / "validation" / "step_00000_1.wav") for each in (free, config)
    )
    assert torch.equal(first.samples, second.samples)


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
