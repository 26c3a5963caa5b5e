"""Every golden case of the repository, and the runner that runs them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffsynth.models.ltx2.rope import RopeLayout, interval_fractions, rope_table
from diffsynth.models.ltx2.transformer import KEY_PREFIXES, LTX2Transformer, TransformerConfig
from tests.golden.__main__ import main
from tests.runners import collect, run
from tests.runners.transformer import modality
from tests.runners.transformer_trace import as_recorded, from_recorded

FOLDER = Path(__file__).parent / "golden"
CASES = list(collect([FOLDER]))
PIPELINES = {
    *(
        "official_one_stage_t2v",
        "official_one_stage_i2v",
        "official_two_stages_t2v",
        "official_two_stages_hq",
    ),
    *("official_distilled_i2v", "official_keyframe_interpolation", "official_a2vid_two_stage"),
    *("official_retake_distilled", "official_retake_full_video_only", "official_ic_lora"),
    *("official_ic_lora_ds2_att", "official_contexts", "diffsynth_one_stage_t2v", "diffsynth_one_stage_i2v"),
    *("diffsynth_two_stage_t2v", "diffsynth_distilled_i2v", "diffsynth_retake"),
}
"""Runs of whole pipelines, without the versions of which they are."""


@pytest.mark.parametrize("path", CASES, ids=[str(case.relative_to(FOLDER)) for case in CASES])
def test_case(path: Path) -> None:
    outcome = run(path)
    assert outcome.status == "passed", f"{outcome.line()}\n{outcome.details(only_failures=True)}"
    assert outcome.comparisons


def test_no_case_is_forgotten() -> None:
    pipelines = {case.stem for case in CASES if case.parent.name == "expected"}
    assert {name.partition("__")[0] for name in pipelines} >= PIPELINES
    folders = {case.relative_to(FOLDER).parts[0] for case in CASES}
    assert folders >= {"transformer", "text", "video_vae", "audio", "upsampler", "sampling", "pipelines"}


def test_a_wrong_number_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = FOLDER / "sampling" / "euler.safetensors"
    with safe_open(good, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    name = next(key for key in tensors if key.startswith("out/") and tensors[key].is_floating_point())
    tensors[name].view(-1)[0] += 1e-2
    bad = tmp_path / "euler.safetensors"
    save_file(tensors, bad, metadata)
    assert main([str(good), str(bad)]) == 1
    printed = capsys.readouterr().out
    assert "1 passed, 1 failed, 0 later" in printed
    assert name in printed
    assert main([str(good)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed, 0 later"


def test_a_case_of_an_unknown_component_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "new.json"
    case.write_text('{"component": "something new"}', encoding="utf-8")
    assert main([str(case)]) == 1
    assert "no runner knows" in capsys.readouterr().out


def test_a_case_of_a_feature_to_come_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "schedules.json"
    case.write_text('{"component": "ltx-video scheduler"}', encoding="utf-8")
    assert main([str(case)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"later   {case}  [ltx-video scheduler]  LTX-Video is not built yet",
        "0 passed, 0 failed, 1 later",
    ]


def test_tables_of_both_layouts_are_read_as_recorded() -> None:
    fractions = interval_fractions(torch.rand(2, 3, 5, 2), (1, 1, 1))
    for layout, shape in ((RopeLayout.SPLIT, (2, 4, 5, 5)), (RopeLayout.INTERLEAVED, (2, 5, 40))):
        table = rope_table(fractions, width=40, heads=4, layout=layout).cos
        recorded = as_recorded(table, layout)
        assert recorded.shape == shape
        assert torch.equal(from_recorded(recorded, layout, 4), table)
    assert (recorded[..., :4] == 1).all(), "40 mod 6 entries pad the front"
    assert torch.equal(recorded[..., ::2], recorded[..., 1::2])


@torch.inference_mode()
def test_a_case_with_one_timestep_per_sample(tmp_path: Path) -> None:
    """Its modulations have one row, and other inputs that it brings need not agree in all modes."""
    with safe_open(FOLDER / "transformer" / "full_ltx23.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["case"])
    tensors = {key: value for key, value in tensors.items() if key.startswith(("weights/", "in/"))}
    for stream in ("video", "audio"):
        tensors[f"in/{stream}_timesteps"] = tensors[f"in/{stream}_sigma"][:, None, None].clone()
    tensors["in_louder/audio_sigma"] = tensors["in/audio_sigma"] / 2
    prefix = f"weights/{next(iter(KEY_PREFIXES))}"
    network = LTX2Transformer(TransformerConfig.from_sections(meta["config"]))
    network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    inputs = {key.removeprefix("in/"): value for key, value in tensors.items() if key.startswith("in/")}
    louder = inputs | {"audio_sigma": tensors["in_louder/audio_sigma"]}
    for tag, given in (("", inputs), ("louder/", louder)):
        video = network(modality(given, "video"), modality(given, "audio"))[0]
        assert video is not None
        tensors[f"out/{tag}video_velocity"] = video
        tensors[f"out/{tag}video_x0"] = given["video_latent"] - given["video_timesteps"] * video
    rows = network.adaln_single(inputs["video_sigma"] * 1000, torch.float32)[0]
    tensors["mid/video_adaln_modulation"] = rows.flatten(1)[:, None]
    case = tmp_path / "case.safetensors"
    save_file(tensors, case, {"case": json.dumps(meta)})
    outcome = run(case)
    assert outcome.status == "passed", f"{outcome.line()}\n{outcome.details(only_failures=True)}"
    assert len(outcome.comparisons) == 5
