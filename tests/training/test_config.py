"""The configuration file, right and wrong."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from diffsynth.errors import RequestError
from diffsynth.training.config import Bucket, DataSection, ModelSection, OutputSection, TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.schedule import ScheduleConfig
from tests.cli.command import ROOT
from tests.training.clips import write_config


def test_everything_that_can_be_stated(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    config = read_config(
        write_config(
            tmp_path,
            model='checkpoint = ["model.safetensors", "Lightricks/LTX-2:vae.safetensors"]',
            strategy='audio = "given"\n[[strategy.conditions]]\ntype = "first_frame"\nprobability = 0.5\n'
            '[[strategy.conditions]]\ntype = "spatial_crop"\ncrop = [0, 0, 32, 32]',
            sigmas="shared = true",
            lora='rank = 8\ntargets = ["attn1.to_q"]',
            training="steps = 7\nbetas = [0.9, 0.95]",
            schedule='name = "cosine"\nwarmup_steps = 2',
        )
    )
    assert config.model.checkpoint == (
        str(tmp_path / "model.safetensors"),
        "Lightricks/LTX-2:vae.safetensors",
    )
    assert config.data.source == tmp_path / "clips"
    assert config.data.sizes == (Bucket(64, 64, 9),)
    assert [c.type for c in config.strategy.conditions] == ["first_frame", "spatial_crop"]
    assert config.strategy.conditions[1].crop == (0, 0, 32, 32)
    assert (config.lora.targets, config.training.betas) == (("attn1.to_q",), (0.9, 0.95))


def test_page_shows_the_defaults(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "en" / "training.md").read_text(encoding="utf-8")
    *_, shown = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "run.toml").write_text(shown)
    config = read_config(tmp_path / "run.toml")
    data, folder = config.data, config.output.folder
    assert config == TrainConfig(
        model=ModelSection(checkpoint=config.model.checkpoint),
        data=DataSection(source=data.source, folder=data.folder, buckets=data.buckets),
        output=OutputSection(folder=folder),
    )
    for section in ("data", "strategy", "sigmas", "lora", "training", "schedule", "validation"):
        for name in asdict(getattr(config, section)):
            assert re.search(rf"\b{name}\b", page), f"[{section}] {name}"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": "steps = 7\nlerning_rate = 1"},
            r"run.toml:19: unknown key 'lerning_rate'.*learning_rate$",
        ),
        ({"trainig": "steps = 7"}, r"run.toml:17: unknown section \[trainig\].*training$"),
        ({"lora": 'rank = "8"'}, r"run.toml:18: rank='8' is of the wrong type"),
        ({"training": "betas = [0.9]"}, r"run.toml:18: betas"),
        ({"data": 'folder = "x"\nsource = "y"'}, r"run.toml:7: \[data\] buckets is missing"),
        (
            {"strategy": '[[strategy.conditions]]\ntype = "prefix"\ncuont = 2'},
            r"run.toml:20: unknown key 'cuont' in \[strategy.conditions\].*count$",
        ),
        ({"strategy": "audio_reference_probability = 1.0"}, r"without \[data\] audio_reference"),
        (
            {"strategy": '[[strategy.conditions]]\ntype = "first_frame"\nmodality = "audio"'},
            r"run.toml:18: condition first_frame is one of the video.*mask$",
        ),
        (
            {"data": 'source = "y"\nfolder = "x"\nbuckets = ["64x64x9"]\nvideo_mask = "m"'},
            r"run.toml:11: unknown key 'video_mask'.*video_masks$",
        ),
        ({"output": "folder = 3"}, r"run.toml:13: folder=3 is no path"),
        ({"training": "steps = 0"}, r"run.toml:18: \[training\] steps=0"),
        ({"validation": "\nevery = 0"}, r"run.toml:19: \[validation\] every=0"),
        (
            {"validation": 'fps = 0.0\n[[validation.clips]]\nprompt = "a"'},
            r"run.toml:18: \[validation\] fps=0.0",
        ),
        ({"training": 'mode = "loar"'}, r"\[training\] mode='loar'"),
        (
            {
                "model": 'checkpoint = "x"\ndtype = "bfloat16"',
                "training": 'mode = "full"',
            },
            r"mode='full' with .*float32",
        ),
        ({"schedule": 'name = "step"'}, r"\[schedule\] name='step'"),
        (
            {"data": 'source = "y"\nfolder = "x"\nbuckets = ["60x64x9"]'},
            r"run.toml:10: \[data\] buckets='60x64x9'",
        ),
        (
            {
                "strategy": '[[strategy.conditions]]\ntype = "first_frame"\n'
                '[[strategy.conditions]]\ntype = "suffix"\nprobability = 2.0'
            },
            r"run.toml:22: condition probability=2.0",
        ),
        ({"lora": "rank = 2\ntargets = []"}, r"run.toml:19: \[lora\] targets=\[\]"),
        ({"lora": "rank = 2\nalpha = 0.0"}, r"run.toml:19: \[lora\] alpha=0.0"),
        ({"training": "steps = 2\nema_decay = 1.0"}, r"run.toml:19: \[training\] ema_decay=1.0"),
        ({"model": "checkpoint = []"}, r"run.toml:2: \[model\] checkpoint=\[\]"),
        (
            {"data": 'source = "y"\nfolder = "x"\nbuckets = ["64x64x9"]\nvideo = false\naudio = false'},
            r"run.toml:11: \[data\] video=False and audio=False",
        ),
        ({"training": "steps = "}, r"line 18"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, sections: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_config(write_config(tmp_path, **sections))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no\.toml cannot be read"):
        read_config(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        (ScheduleConfig(name="constant", warmup_steps=2), [0.5, 1, 1, 1, 1]),
        (ScheduleConfig(name="linear", final=0.0), [1, 0.8, 0.6, 0.4, 0.2]),
        (ScheduleConfig(name="linear"), [1, 0.82, 0.64, 0.46, 0.28]),
        (ScheduleConfig(name="cosine", warmup_steps=1, final=0.0), [1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(config: ScheduleConfig, factors: list[float]) -> None:
    config.check(5)
    assert [config.factor(step, 5) for step in range(5)] == pytest.approx(factors, abs=1e-6)
