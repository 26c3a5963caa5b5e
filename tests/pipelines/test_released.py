"""The configurations that travel with the package are those of the released files."""

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from diffsynth.models.ltx2.upsampler import UpsamplerConfig
from diffsynth.pipelines.released import GEMMA, released_config, released_parts

MANIFEST = Path(__file__).parents[1] / "manifest"
CHECKPOINTS = {"ltx-2": "ltx-2-19b", "ltx-2.3": "ltx-2.3-22b"}
UPSAMPLERS = (
    *("ltx-2-spatial-upscaler-x2", "ltx-2.3-spatial-upscaler-x2"),
    *("ltx-2.3-spatial-upscaler-x1.5", "ltx-2.3-temporal-upscaler-x2"),
)


def manifest(name: str) -> Any:
    return json.loads((MANIFEST / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sections_are_those_of_the_checkpoint(name: str) -> None:
    config = released_config(name)
    stated: dict[str, dict[str, Any]] = {}
    for part in ("transformer", "text", "vae", "audio_vae", "vocoder"):
        for section, values in manifest(f"config.{CHECKPOINTS[name]}.{part}").items():
            stated.setdefault(section, {}).update(values)
    assert config == stated


def test_the_text_model_is_the_one_that_both_read() -> None:
    assert released_config(GEMMA) == manifest("config.gemma-3-12b-it")


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_upsamplers_agree_with_the_shapes_of_their_weights(name: str) -> None:
    shapes = {key: tuple(shape) for key, (_, shape) in manifest(name).items()}
    assert UpsamplerConfig.from_sections(released_config(name)) == UpsamplerConfig.infer(shapes)


@pytest.mark.parametrize(
    ("version", "checkpoint", "block"),
    [("2.0", "ltx-2-19b", 386_074_624), ("2.3", "ltx-2.3-22b", 386_695_360)],
)
def test_parameters_are_counted_exactly(version: Any, checkpoint: str, block: int) -> None:
    parts = released_parts(version)
    assert parts.dit is not None
    counts = [sum(p.numel() for p in b.parameters()) for b in parts.dit.transformer_blocks]
    assert counts == [block] * 48
    held = {
        key.removeprefix("model.diffusion_model."): tuple(shape)
        for key, (_, shape) in manifest(f"{checkpoint}.transformer").items()
        if "embeddings_connector" not in key
    }
    assert {key: tuple(tensor.shape) for key, tensor in parts.dit.state_dict().items()} == held
    assert all(tensor.is_meta for tensor in parts.dit.state_dict().values())


def test_the_files_are_packaged() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["diffsynth.models.ltx2"]
    folder = resources.files("diffsynth.models.ltx2")
    found = {path.name for pattern in patterns for path in Path(str(folder)).glob(pattern)}
    assert found == {f"{name}.json" for name in (*CHECKPOINTS, GEMMA, *UPSAMPLERS)}
