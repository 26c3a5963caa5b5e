"""The benchmark itself, with the tiny model: every way runs, placements agree in every bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import benchmarks.meaning as meaning
from benchmarks.meaning_rows import (
    FORMATS,
    MODES,
    PLACEMENTS,
    Settings,
    Way,
    descriptions,
    files,
    generate,
    measure,
    opened,
)
from diffsynth.errors import RequestError
from diffsynth.nano.judge import ATTRIBUTES
from tests.pipelines.tiny import DEV, LORA, TINY, UPSCALER

SETTINGS = Settings(model=str(TINY), prompts=1, side=64, num_frames=9, steps=1, device="cpu")


def way(name: str) -> Way:
    format, mode, placement = name.split()
    return Way(format=format, mode=mode, placement=placement)


def test_one_thing_changes_at_a_time_unless_all_are_wanted() -> None:
    every = [name for each in meaning.ways(full=True) for name in each.names()]
    assert len(set(every)) == len(every) == len(FORMATS) * len(MODES) * len(PLACEMENTS) * 2
    usual = [name for each in meaning.ways(full=False) for name in each.names()]
    assert meaning.BASELINE in usual
    assert {f"{format} one-stage resident tiled" for format in FORMATS} <= set(usual)
    assert {f"bf16 {mode} resident whole" for mode in MODES} <= set(usual)
    assert {f"int8 one-stage {placement} whole" for placement in PLACEMENTS} <= set(usual)
    assert len(usual) < len(every) / 3
    chosen = meaning.ways(full=True, only=["fp8 two-stage disk tiled", "int4 image resident"])
    assert [name for each in chosen for name in each.names()] == [
        "fp8 two-stage disk tiled",
        "int4 image resident whole",
        "int4 image resident tiled",
    ]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_complete_rows(mode: str) -> None:
    whole, tiled = measure(way(f"bf16 {mode} resident"), SETTINGS)
    assert whole["row"] == f"bf16 {mode} resident whole"
    assert tiled["row"] == f"bf16 {mode} resident tiled"
    for row in (whole, tiled):
        assert "failed" not in row
        assert row["repeats"] is True
        assert len(row["latent_crc32"]) == 1
        assert set(row["percent"]) <= set(ATTRIBUTES)
        assert row["judged"]["colour"] == 1
        assert ("first_frame_psnr" in row) == (mode == "image")
    json.dumps([whole, tiled])


def test_placements_move_blocks_and_change_no_bit() -> None:
    made = {name: measure(way(f"int8 one-stage {name}"), SETTINGS)[0] for name in PLACEMENTS}
    assert len({tuple(row["latent_crc32"]) for row in made.values()}) == 1
    others = measure(way("int4 one-stage resident"), SETTINGS)[0]
    assert others["latent_crc32"] != made["resident"]["latent_crc32"]
    for name in ("streamed", "disk"):
        each = way(f"int8 one-stage {name}")
        with opened(each, SETTINGS) as pipe:
            generate(pipe, each, SETTINGS, 0, descriptions(SETTINGS)[0])
            report = pipe.memory_report()
        plan = next(p for p in report["plan"]["phases"] if p["name"] == "denoise 1")
        moved = next(p for p in report["phases"] if p["phase"] == "denoise 1")
        assert not plan["residents"]
        assert moved["bytes_to_device"] > 0
        assert (moved["bytes_from_disk"] > 0) == (name == "disk")


def test_a_way_that_the_model_cannot_go_says_why(tmp_path: Path) -> None:
    for file in (DEV, UPSCALER, TINY / "gemma"):
        (tmp_path / file.name).symlink_to(file)
    settings = Settings(model=str(tmp_path), prompts=1, side=64, num_frames=9, steps=1, device="cpu")
    for row in measure(way("bf16 two-stage resident"), settings):
        assert "LoRA" in row["failed"]


def test_a_distilled_checkpoint_is_used_where_there_is_one(tmp_path: Path) -> None:
    one, distilled = way("bf16 one-stage resident"), way("bf16 distilled resident")
    for name in (DEV.name, UPSCALER.name, LORA.name, "style-lora.safetensors"):
        (tmp_path / name).touch()
    models = [tmp_path / DEV.name, tmp_path / UPSCALER.name]
    assert files(tmp_path, one) == files(tmp_path, distilled) == (models, tmp_path / LORA.name)
    (tmp_path / "model-distilled.safetensors").touch()
    assert files(tmp_path, one) == (models, tmp_path / LORA.name)
    upscaler = tmp_path / UPSCALER.name
    assert files(tmp_path, distilled) == ([upscaler, tmp_path / "model-distilled.safetensors"], None)


def row(name: str, crc: str = "a", repeats: bool = True, **percent: float) -> dict[str, Any]:
    full = dict.fromkeys(ATTRIBUTES, 100.0) | percent
    return {"row": name, "percent": full, "latent_crc32": [crc], "repeats": repeats}


def short(*rows: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(gate["row"], gate["figures"]) for gate in meaning.gates(rows) if not gate["passed"]]


def test_what_is_demanded() -> None:
    base, tiled = row(meaning.BASELINE, shape=91, colour=97), "bf16 one-stage resident tiled"
    assert short(base, row(tiled, colour=96.5, shape=90)) == []
    assert short(row(meaning.BASELINE, shape=89, pitch=96)) == [
        (meaning.BASELINE, {"shape": 89, "pitch": 96})
    ]
    assert short(base, row(tiled, colour=95)) == [(tiled, {"colour": 2.0})]
    distilled, eight = "bf16 distilled resident whole", "int8 one-stage resident whole"
    assert short(base, row(distilled, motion=95), row(eight, motion=98)) == []
    assert short(base, row(distilled, motion=94)) == [(distilled, {"motion": 6.0})]
    assert short(base, row(eight, motion=97)) == [(eight, {"motion": 3.0})]
    streamed = "bf16 one-stage streamed whole"
    assert short(base, row(streamed, crc="b")) == [(streamed, {"other clips": [0]})]
    assert short(base, row(streamed, repeats=False)) == [(streamed, {})]
    image = row("bf16 image resident whole") | {"first_frame_psnr": {"mean": 30.0, "min": 24.0}}
    assert short(image) == [("bf16 image resident whole", {"min": 24.0})]


def test_prompts_with_a_word() -> None:
    asked = descriptions(replace(SETTINGS, prompts=5, word="ping"))
    assert [description.sound for description in asked] == ["ping"] * 5
    with pytest.raises(RequestError, match="0 prompts have the word 'dragon'"):
        descriptions(replace(SETTINGS, word="dragon"))


def test_the_command_goes_on_where_it_ended(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(meaning.main)
    out = tmp_path / "results.json"
    arguments = (
        f"--model {TINY} --prompts 1 --side 64 --num-frames 9 --steps 1 --device cpu --out {out}".split()
    )
    chosen = ["--only", "bf16 one-stage resident"]
    first = CliRunner().invoke(app, [*arguments, *chosen])
    assert first.exit_code == 0, first.output
    assert "1/1 bf16 one-stage resident tiled" in first.output
    data = json.loads(out.read_text())
    assert [made["row"] for made in data["rows"]] == way("bf16 one-stage resident").names()
    assert data["gates"][0] == {
        "row": meaning.BASELINE,
        "demand": "enough",
        "passed": False,
        "figures": data["gates"][0]["figures"],
    }
    again = CliRunner().invoke(app, [*arguments, *chosen])
    assert again.exit_code == 0
    assert "1/1" not in again.output
    assert "short of: bf16 one-stage resident whole" in again.output
