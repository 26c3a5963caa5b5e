"""The command line has one option for each field of the request, and nothing is lost on the way."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from diffsynth.cli.app import app
from diffsynth.cli.options import PANELS, POSITIONAL, SHORT_NAMES, option_names, parse_request
from diffsynth.errors import RequestError
from diffsynth.request import GenerateRequest, GuidanceParams
from tests.cli.command import Here, environment, run

OWN = {
    *("output", "model", "checkpoint", "gemma", "upsampler", "distilled_lora", "lora"),
    *("device", "dtype", "vram_limit", "host_limit", "storage", "cache", "stats", "quiet"),
}
"""Options that do not belong to the request: which models run, where, and what becomes of the result."""
FIELDS = {field.name: field for field in fields(GenerateRequest)}


def parameters() -> dict[str, Any]:
    """The parameters of ``generate`` as the command line sees them."""
    command: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in command.commands["generate"].params}


def test_exactly_one_option_per_field() -> None:
    found = parameters()
    assert found.keys() - OWN - {"help"} == FIELDS.keys()
    for name, field in FIELDS.items():
        parameter = found[name]
        assert parameter.param_type_name == ("argument" if name in POSITIONAL else "option")
        if name not in POSITIONAL:
            assert f"--{name.replace('_', '-')}" in parameter.opts
            assert parameter.help == field.metadata["help"]
    every = [name for parameter in found.values() for name in (*parameter.opts, *parameter.secondary_opts)]
    assert len(every) == len(set(every)), "an option name is used twice"


def test_tables_name_fields_that_exist() -> None:
    named = {name for names in PANELS.values() for name in names} | SHORT_NAMES.keys() | POSITIONAL
    assert named <= FIELDS.keys()


def test_help_shows_every_field(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ended = here("generate", "--help")
    assert ended.code == 0
    shown = re.sub(r"\s+", "", ended.out)
    for name, field in FIELDS.items():
        if name not in POSITIONAL:
            assert all(option in shown for option in "/".join(option_names(field)).split("/"))
        assert re.sub(r"\s+", "", field.metadata["help"]) in shown, name


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['diffsynth', *sys.argv[1:]]\n"
        "from diffsynth.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    for given in (
        *(["--help"], ["--version"], ["cache", "list", "--help"]),
        *([name, "--help"] for name in ("generate", "demo", "decode", "inspect", "plan", "cache")),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *given],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_a_wrong_number_is_told_without_torch(tmp_path: Path) -> None:
    done = run("generate", "a boat", "--height", "65", cwd=tmp_path)
    assert done.code == 2
    assert "height=65 is not a multiple of 32" in done.err
    assert "Try: 64 or 96" in done.err
    assert "Traceback" not in done.err


def test_defaults_are_those_of_the_request() -> None:
    command: Any = typer.main.get_command(app)
    with command.commands["generate"].make_context("generate", ["a boat"]) as context:
        assert parse_request(context.params) == GenerateRequest(prompt="a boat")


def parsed(*given: str) -> GenerateRequest:
    command: Any = typer.main.get_command(app)
    with command.commands["generate"].make_context("generate", ["a boat", *given]) as context:
        return parse_request(context.params)


def test_values() -> None:
    request = parsed(
        *("--two-stage", "--no-tiled", "--image", "a.png", "--image", "b.png"),
        *("--image-index", "0", "--image-index", "-1", "--image-strength", "0.5", "--frames", "25"),
        *("--frame-rate", "25", "--cfg-scale", "2.5", "--seed", "-7"),
        *("--retake-video", "c.mp4", "--retake-video-regions", "0:0.25", "--retake-video-regions", "0.5:1"),
    )
    assert request == GenerateRequest(
        prompt="a boat",
        use_two_stage_pipeline=True,
        tiled=False,
        input_images=("a.png", "b.png"),
        input_images_indexes=(0, -1),
        input_images_strength=0.5,
        num_frames=25,
        frame_rate=25.0,
        cfg_scale=2.5,
        seed=-7,
        retake_video="c.mp4",
        retake_video_regions=((0.0, 0.25), (0.5, 1.0)),
    )
    assert request.validate()


def test_strength_of_each_picture() -> None:
    request = parsed("--image-strength", "0.5", "--image-strength", "1")
    assert request.input_images_strength == (0.5, 1.0)


def test_guidance() -> None:
    request = parsed("--video-guidance", '{"cfg_scale": 3, "stg_scale": 1, "stg_blocks": [29]}')
    assert request.video_guidance == GuidanceParams(cfg_scale=3, stg_scale=1, stg_blocks=(29,))


@pytest.mark.parametrize(
    "given",
    [
        ("--video-guidance", "{3}"),
        ("--video-guidance", "3"),
        ("--audio-guidance", '{"cfg": 3}'),
        ("--audio-guidance", "[3]"),
        ("--retake-video-regions", "1-2"),
        ("--retake-audio-regions", "one:two"),
    ],
)
def test_values_that_cannot_be_read(given: tuple[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(*given)
    assert str(caught.value).startswith(given[0])
    assert caught.value.hint
