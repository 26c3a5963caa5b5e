"""What files hold, told by their content; and files that are known and refused."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.errors import CheckpointError
from diffsynth.loader import NetworkKind, Storage, WeightFiles, describe, model_version, recognise
from diffsynth.loader.recognise import storage_of, unknown_keys
from tests.loader.headers import TINY, HeaderSource, manifest, single_file, single_file_metadata, write_sparse

LORAS = Path(__file__).parents[1] / "golden" / "sampling" / "lora"
DIT = "model.diffusion_model."
Entries = dict[str, tuple[str, tuple[int, ...]]]


def _files(entries: Mapping[str, tuple[str, tuple[int, ...]]], **metadata: str) -> WeightFiles:
    return WeightFiles.of([HeaderSource(entries, metadata, name="file.safetensors")])


def _block(dtype: str = "BF16", **extra: tuple[str, tuple[int, ...]]) -> Entries:
    """The keys by which a transformer is known, and ``extra`` ones beside its first linear."""
    linear = f"{DIT}transformer_blocks.0.attn1.to_q"
    entries: Entries = {
        f"{DIT}patchify_proj.weight": ("BF16", (8, 4)),
        f"{DIT}audio_patchify_proj.weight": ("BF16", (8, 4)),
        f"{linear}.weight": (dtype, (8, 8)),
    }
    return entries | {f"{linear}.{name}": entry for name, entry in extra.items()}


def test_tiny_checkpoint() -> None:
    report = describe(TINY / "ltx-2-tiny-dev.safetensors")
    assert [network.kind for network in report.networks] == list(NetworkKind)[:7]
    assert (report.version, report.has_config, report.problem, report.lora) == ("2.0", True, "", None)
    assert report.unknown_keys == ()
    assert report.metadata == {"model_version": "2.0.0"}
    transformer = report.networks[0]
    assert (transformer.tensors, transformer.parameters, transformer.bytes) == (270, 145_744, 291_488)
    assert (transformer.dtypes, transformer.storage) == ({"BF16": 270}, Storage.BF16)


@pytest.mark.parametrize(("version", "parameters"), [("2.0", 18_876_174_592), ("2.3", 18_988_838_144)])
def test_released_file_without_reading_it(tmp_path: Path, version: str, parameters: int) -> None:
    path = write_sparse(tmp_path / "a.safetensors", single_file(version), single_file_metadata(version))
    report = describe(path)
    path.unlink()
    assert report.version == version
    assert report.networks[0].parameters == parameters
    assert report.unknown_keys == ()


def test_upsampler_and_gemma() -> None:
    upsampler = describe(TINY / "ltx-2-tiny-spatial-upscaler-x2.safetensors")
    assert [network.kind for network in upsampler.networks] == [NetworkKind.UPSAMPLER]
    gemma = describe(TINY / "gemma")
    assert [(network.kind, network.tensors) for network in gemma.networks] == [
        (NetworkKind.GEMMA, 41),
        (NetworkKind.GEMMA_VISION, 23),
    ]
    assert gemma.unknown_keys == ()
    assert gemma.version is None


@pytest.mark.parametrize(
    ("name", "form", "alpha"),
    [
        ("official", "official", False),
        ("peft_bare", "bare peft", False),
        ("peft_default", "diffsynth", False),
        ("base_model_model", "peft", False),
        ("comfy_up_down", "comfyui", True),
        ("kohya", "kohya", True),
        ("diffusers", "diffusers", False),
    ],
)
def test_lora_formats(name: str, form: str, alpha: bool) -> None:
    report = describe(LORAS / f"lora_{name}.safetensors")
    assert report.lora == (form, (3,), 21, alpha)
    assert (report.networks, report.problem, report.unknown_keys) == ((), "", ())
    assert recognise(WeightFiles(LORAS / f"lora_{name}.safetensors")) == [NetworkKind.LORA]


def test_lora_of_the_video_stream_alone_is_not_taken_for_ltx_video() -> None:
    keys = ("patchify_proj.lora_A.weight", "patchify_proj.lora_B.weight")
    files = _files({f"diffusion_model.{key}": ("F32", (2, 2)) for key in keys})
    assert recognise(files) == [NetworkKind.LORA]


@pytest.mark.parametrize(
    ("dtypes", "storage"),
    [
        ({}, Storage.BF16),
        ({"a.weight": "BF16", "table": "F32"}, Storage.BF16),
        ({"a.weight": "F32", "b.weight": "F32", "c.weight": "BF16"}, Storage.F32),
        ({"a.weight": "F16"}, Storage.F16),
        ({"a.weight": "F8_E4M3", "b.weight": "BF16", "c.weight": "BF16"}, Storage.FP8_PLAIN),
        ({"a.weight": "F8_E5M2"}, Storage.FP8_PLAIN),
        ({"a.weight": "F8_E4M3", "a.weight_scale": "F32"}, Storage.FP8_SCALED),
        ({"a.weight": "U8", "a.weight_scale": "F8_E4M3", "a.weight_scale_2": "F32"}, Storage.NVFP4),
        ({"a.weight": "U8"}, Storage.PACKED),
        ({"a.weight._data": "I8", "a.weight._scale": "F32"}, Storage.PACKED),
    ],
)
def test_storage(dtypes: dict[str, str], storage: Storage) -> None:
    assert storage_of(dtypes) is storage


SCALE: tuple[str, tuple[int, ...]] = ("F32", ())
REFUSED: dict[str, tuple[Callable[[], WeightFiles], str, str]] = {
    "nvfp4": (
        lambda: _files(_block("U8", weight_scale=("F8_E4M3", (8,)), weight_scale_2=SCALE)),
        "nvfp4",
        "bf16",
    ),
    "packed": (lambda: _files(_block("U8")), "packed as integers", "bf16"),
    "quanto": (lambda: _files(_block("BF16", **{"weight._data": ("I8", (8, 8))})), "quanto", "bf16"),
    "ltx-2.5": (lambda: _files(_block(), model_version="2.5.0"), r"LTX-2\.5", "Lightricks/LTX-2.3"),
    "ltx-video": (
        lambda: _files({k: v for k, v in _block().items() if "audio" not in k}),
        "LTX-Video",
        "ltx-2-19b-dev",
    ),
    "ltx-video without prefix": (
        lambda: _files(
            {k.removeprefix(DIT): v for k, v in _block().items() if "audio" not in k},
        ),
        "LTX-Video",
        "ltx-2-19b-dev",
    ),
    "diffusers transformer": (
        lambda: _files({"proj_in.weight": ("BF16", (8, 4)), "time_embed.linear.weight": ("BF16", (8, 8))}),
        "diffusers",
        "ltx-2-19b-dev",
    ),
    "diffusers vae": (
        lambda: _files({"decoder.mid_block.resnets.0.conv1.conv.weight": ("BF16", (8, 8, 3, 3, 3))}),
        "diffusers",
        "ltx-2-19b-dev",
    ),
    "unknown": (lambda: _files({"some.weight": ("BF16", (2,))}), "holds nothing of LTX-2", "inspect"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_used_are_named(case: str) -> None:
    make, message, hint = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as raised:
        recognise(make())
    assert "file.safetensors" in raised.value.message
    assert hint in raised.value.hint


def test_inspection_reports_what_cannot_be_used(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "a.safetensors", _block("U8", weight_scale_2=SCALE), {"format": "pt"})
    report = describe(path)
    assert "nvfp4" in report.problem
    assert report.hint
    assert report.networks[0].storage is Storage.NVFP4


@pytest.mark.parametrize(
    ("stated", "version"),
    [("2.3.1", "2.3"), ("2.0.0", "2.0"), ("2.1", "2.0"), ("2.5.0", "2.5"), ("?", "2.0")],
)
def test_stated_version_counts_before_the_structure(stated: str, version: str) -> None:
    assert model_version(_files(_block(), model_version=stated)) == version


def test_gates_tell_the_newer_transformer() -> None:
    gate = {f"{DIT}transformer_blocks.0.attn1.to_gate_logits.weight": ("BF16", (4, 8))}
    assert model_version(_files({**_block(), **gate})) == "2.3"


def test_foreign_tensors_are_listed(tmp_path: Path) -> None:
    save_file({"spiece_model": torch.zeros(2)}, tmp_path / "a.safetensors")
    files = WeightFiles([TINY / "gemma", tmp_path / "a.safetensors"])
    assert unknown_keys(files) == ["spiece_model"]
    assert describe(files.paths).unknown_keys == ("spiece_model",)


def test_one_shard_of_gemma_is_known() -> None:
    shard = {k: v for k, v in manifest("gemma-3-12b-it").items() if ".layers.30." in k}
    assert recognise(_files(shard)) == [NetworkKind.GEMMA]
