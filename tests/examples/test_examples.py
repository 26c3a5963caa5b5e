"""The example scripts run as they are, against the tiny files under the names of the released ones."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import av
import pytest
from PIL import Image

from diffsynth.request import GenerateRequest
from diffsynth.utils.media_io_ltx2 import read_request

FOLDER = Path(__file__).parents[2] / "examples" / "ltx2"
NAMES = [
    f"LTX-2-{kind}-{mode}.py"
    for kind in ("T2AV", "I2AV")
    for mode in ("OneStage", "TwoStage", "DistilledPipeline")
]


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example", FOLDER / "model_inference" / name)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_all_scripts_are_there() -> None:
    assert sorted(path.name for path in (FOLDER / "model_inference").iterdir() if path.is_file()) == sorted(
        NAMES
    )
    listed = set(re.findall(r"`(LTX-2-[\w-]+\.py)`", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert listed == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_script(name: str, downloaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.mp4"
    module(name).main(height=64, width=128, num_frames=9, output_path=str(path))
    assert capsys.readouterr().out.strip() == str(path)
    with av.open(str(path)) as file:
        pictures, sound = file.streams.video[0], file.streams.audio[0]
        assert (pictures.width, pictures.height, pictures.frames) == (128, 64, 9)
        assert pictures.average_rate == 24
        assert sound.rate == 24000
    record = read_request(path)
    assert record is not None
    request = GenerateRequest.from_dict(record["request"])
    assert request.use_two_stage_pipeline == ("OneStage" not in name)
    assert request.use_distilled_pipeline == ("Distilled" in name)
    assert bool(request.input_images) == ("I2AV" in name)
    assert bool(request.negative_prompt) == ("Distilled" not in name)
    assert request.seed == 43
    assert record["loras"].keys() == (
        {"ltx-2-19b-distilled-lora-384.safetensors (stage 2)"} if "TwoStage" in name else set()
    )


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_public_sizes(name: str) -> None:
    defaults = {key: p.default for key, p in inspect.signature(module(name).main).parameters.items()}
    assert defaults.pop("output_path").endswith(".mp4")
    expected = (512, 768, 121) if "OneStage" in name else (1024, 1536, 121)
    assert (defaults["height"], defaults["width"], defaults["num_frames"]) == expected
    GenerateRequest(use_two_stage_pipeline="OneStage" not in name, **defaults).validate()


def test_the_picture() -> None:
    path = FOLDER / "first_frame.png"
    assert path.stat().st_size < 100_000
    with Image.open(path) as picture:
        assert (picture.mode, picture.size) == ("RGB", (768, 512))
