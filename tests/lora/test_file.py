import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.lora import fuse, read_lora

LAYER = "transformer_blocks.0.attn1.to_q"
GATE = "transformer_blocks.0.attn1.to_gate_logits"
SHAPES = {LAYER: (4, 6), GATE: (3, 6), "patchify_proj": (8, 5)}


def pair(rank: int = 2, shape: tuple[int, int] = (4, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return (
        torch.randn(rank, shape[1], generator=generator),
        torch.randn(shape[0], rank, generator=generator),
    )


def official(rank: int = 2) -> dict[str, Tensor]:
    down, up = pair(rank)
    return {f"diffusion_model.{LAYER}.lora_A.weight": down, f"diffusion_model.{LAYER}.lora_B.weight": up}


def diffusers_metadata(**config: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


def test_alpha_is_divided_by_the_rank_of_its_own_layer() -> None:
    tensors: dict[str, Tensor] = {}
    for name, rank in ((LAYER, 2), ("patchify_proj", 4)):
        down, up = pair(rank, SHAPES[name])
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(8.0)
    lora = read_lora(tensors, SHAPES, SHAPES)
    assert {name: update.scale for name, update in lora.updates.items()} == {LAYER: 4.0, "patchify_proj": 2.0}
    assert (lora.report.ranks, lora.report.alpha, lora.report.format) == ((2, 4), "tensors", "ComfyUI")


def test_alpha_patterns_of_the_metadata_use_the_names_of_the_file() -> None:
    down, up = pair(2, SHAPES["patchify_proj"])
    tensors = {"transformer.proj_in.lora_A.weight": down, "transformer.proj_in.lora_B.weight": up}
    q_down, q_up = pair(2)
    tensors |= {f"transformer.{LAYER}.lora_A.weight": q_down, f"transformer.{LAYER}.lora_B.weight": q_up}
    metadata = diffusers_metadata(r=2, lora_alpha=4, alpha_pattern={"proj_in": 16, r"attn\d\.to_v": 1})
    lora = read_lora(tensors, SHAPES, SHAPES, metadata=metadata)
    assert (lora.updates["patchify_proj"].scale, lora.updates[LAYER].scale) == (8.0, 2.0)
    assert (lora.report.alpha, lora.report.format) == ("metadata", "diffusers")


def test_rank_stabilised_scale() -> None:
    metadata = diffusers_metadata(lora_alpha=8, use_rslora=True)
    lora = read_lora(official(rank=4), SHAPES, SHAPES, metadata=metadata)
    assert lora.updates[LAYER].scale == 4.0


def test_raw_peft_takes_alpha_from_the_configuration_beside_it(tmp_path: Path) -> None:
    down, up = pair(2)
    tensors = {f"base_model.model.{LAYER}.lora_A.weight": down, f"base_model.model.{LAYER}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert read_lora(tmp_path / "adapter_model.safetensors", SHAPES, SHAPES).updates[LAYER].scale == 1.0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    lora = read_lora(tmp_path / "adapter_model.safetensors", SHAPES, SHAPES)
    assert (lora.updates[LAYER].scale, lora.report.alpha) == (3.0, "adapter_config.json")


def test_a_configuration_beside_another_format_changes_nothing(tmp_path: Path) -> None:
    save_file(official(), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    lora = read_lora(tmp_path / "lora.safetensors", SHAPES, SHAPES)
    assert (lora.updates[LAYER].scale, lora.report.alpha) == (1.0, "none")


def test_full_differences_are_read_and_fused() -> None:
    tensors = {
        f"diffusion_model.{LAYER}.diff": torch.ones(4, 6),
        f"diffusion_model.{LAYER}.diff_b": torch.ones(4),
    }
    lora = read_lora(tensors, SHAPES, SHAPES)
    assert lora.report.rank == 0
    assert torch.equal(fuse(torch.zeros(4, 6), [(lora.updates[LAYER], 0.5)]), torch.full((4, 6), 0.5))


def test_unmatched_and_text_side_keys_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    down, up = pair()
    extra = {
        "diffusion_model.transformer_blocks.7.attn1.to_q.lora_A.weight": down,
        "diffusion_model.transformer_blocks.7.attn1.to_q.lora_B.weight": up,
        "text_embedding_projection.aggregate_embed.lora_A.weight": down,
        "diffusion_model.patchify_proj.lora_A.weight": torch.ones(2, 5),
    }
    with caplog.at_level(logging.INFO):
        lora = read_lora(official() | extra, SHAPES, SHAPES)
    report = lora.report
    assert list(lora.updates) == [LAYER]
    assert report.matched == 1
    assert len(report.unmatched) == 2
    assert report.incomplete == ("patchify_proj",)
    assert report.text_side == ("text_embedding_projection.aggregate_embed.lora_A.weight",)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "transformer_blocks.7" in warnings[0].getMessage()
    assert "aggregate_embed" not in warnings[0].getMessage()
    assert "text-side keys skipped" in str(report)


@pytest.mark.parametrize(
    "tensors",
    [
        {
            "diffusion_model.other.lora_A.weight": torch.ones(2, 6),
            "diffusion_model.other.lora_B.weight": pair()[1],
        },
        {"text_embedding_projection.aggregate_embed.lora_A.weight": torch.ones(2, 6)},
        {f"{LAYER}.lora_A.weight": torch.ones(2, 7), f"{LAYER}.lora_B.weight": torch.ones(4, 2)},
        {f"{LAYER}.lora_A.weight": torch.ones(2, 6), f"{LAYER}.lora_B.weight": torch.ones(4, 3)},
        {f"{LAYER}.lora_A.weight": torch.ones(2, 6, 1, 1), f"{LAYER}.lora_B.weight": torch.ones(4, 2, 1, 1)},
        {f"{LAYER}.lora_A.weight": torch.ones(0, 6), f"{LAYER}.lora_B.weight": torch.ones(4, 0)},
        {f"{LAYER}.lora_A.weight": torch.ones(2, 6)},
        {f"{LAYER}.alpha": torch.tensor(1.0)},
        {f"{LAYER}.diff": torch.tensor(1.0)},
        {},
    ],
)
def test_nothing_that_fits_is_an_error(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="nothing in it fits"):
        read_lora(tensors, SHAPES, SHAPES)


def test_shapes_are_checked_against_each_other_when_the_model_gives_none() -> None:
    wrong = {"patchify_proj.lora_A.weight": torch.ones(2, 6), "patchify_proj.lora_B.weight": torch.ones(4, 3)}
    lora = read_lora(official() | wrong, SHAPES)
    assert list(lora.updates) == [LAYER]
    assert lora.report.wrong_shape


def test_two_updates_of_one_layer_are_refused() -> None:
    down, up = pair()
    again = {f"{LAYER}.lora_A.second.weight": down, f"{LAYER}.lora_B.second.weight": up}
    with pytest.raises(CheckpointError, match="twice"):
        read_lora(official() | again, SHAPES, SHAPES)


def test_length_of_the_header_may_look_like_a_pickle(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.proj_out.lora_A.weight": torch.ones(1, 8),
        "diffusion_model.proj_out.lora_B.weight": torch.ones(5, 1),
    }
    path = tmp_path / "lora.safetensors"
    for padding in range(0, 512, 8):
        save_file(tensors, path, {"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("no header of such a length")
    assert read_lora(path, ["proj_out"]).report.matched == 1


def test_pickles_are_refused_by_content(tmp_path: Path) -> None:
    for name, content in (("zip", b"PK\x03\x04rest of it"), ("old", pickle.dumps({"a": 1}))):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="pickle"):
            read_lora(path, SHAPES)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    lengths = set()
    for padding in range(0, 256, 8):
        save_file(official(), path, {"note": "x" * padding})
        lengths.add(path.read_bytes()[0])
        assert read_lora(path, SHAPES, SHAPES).report.matched == 1
    assert 0x80 in lengths, "as a pickle begins"


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"\x05\x00\x00\x00\x00\x00\x00\x00{abc}", b"\xff" * 8 + b"{"]
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_lora(path, SHAPES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        read_lora(tmp_path / "nowhere.safetensors", SHAPES)


@pytest.mark.parametrize(
    ("name", "metadata", "factor", "source"),
    [
        ("x-ref0.5.safetensors", {"reference_downscale_factor": "4"}, 4, "metadata"),
        ("x.safetensors", {"reference_spatial_scale_factor": "2"}, 2, "metadata"),
        ("ltx-2-19b-ic-lora-union-control-ref0.5.safetensors", {}, 2, "file name"),
        ("x-ref0.33-v2.safetensors", {}, 3, "file name"),
        ("href0.5.safetensors", {}, 1, "default"),
        ("ic-lora.safetensors", {}, 1, "default"),
    ],
)
def test_the_reference_factor_says_where_it_comes_from(
    tmp_path: Path, name: str, metadata: dict[str, str], factor: int, source: str
) -> None:
    save_file(official(), tmp_path / name, metadata=metadata)
    reference = read_lora(tmp_path / name, SHAPES).reference
    assert (reference.factor, reference.source) == (factor, source)


@pytest.mark.parametrize("text", ["0", "1.5", "two", "-2"])
def test_a_reference_factor_that_is_no_factor_is_an_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="reference_downscale_factor"):
        read_lora(official(), SHAPES, metadata={"reference_downscale_factor": text})


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("ltx-2-19b-lora-camera-control-static.safetensors", True),
        ("ltx-2.3-22b-ic-lora-union-control-ref0.5.safetensors", False),
        ("my-style.safetensors", False),
    ],
)
def test_a_lora_of_another_generation_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, warned: bool
) -> None:
    save_file(official(), tmp_path / name)
    read_lora(tmp_path / name, SHAPES, SHAPES)
    assert ("was made for LTX-2, not for LTX-2.3" in caplog.text) is warned
    caplog.clear()
    without_gate = {name: shape for name, shape in SHAPES.items() if name != GATE}
    read_lora(tmp_path / name, without_gate, without_gate)
    assert ("was made for LTX-2.3, not for LTX-2" in caplog.text) is name.startswith("ltx-2.3")


def test_a_lora_of_another_generation_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    down, up = pair(2, (8, 9))
    wide = {
        "diffusion_model.patchify_proj.lora_A.weight": down,
        "diffusion_model.patchify_proj.lora_B.weight": up,
    }
    for name in ("ltx-2-19b-distilled-lora-384.safetensors", "my-style.safetensors"):
        save_file(official() | wide, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"made for LTX-2, the model is LTX-2\.3.*patchify_proj \(8, 5\)"
    ):
        read_lora(tmp_path / "ltx-2-19b-distilled-lora-384.safetensors", SHAPES, SHAPES)
    lora = read_lora(tmp_path / "my-style.safetensors", SHAPES, SHAPES)
    assert (lora.report.matched, len(lora.report.wrong_shape)) == (1, 1)
