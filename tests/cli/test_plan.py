"""``diffsynth plan``: predictions as a table and as JSON, and the committed predictions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.plan_table import BEGIN, END, table
from diffsynth.cli.plan import plan
from diffsynth.errors import DiffSynthError, MemoryBudgetError, RequestError
from diffsynth.loader import ModelConfig
from diffsynth.pipelines.assemble import open_models
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.pipelines.sizes import model_sizes
from tests.loader.headers import single_file, single_file_metadata, write_sparse
from tests.pipelines.float8 import official_float8

ROOT = Path(__file__).parents[2]
GB = 2**30

app = typer.Typer(rich_markup_mode=None)
app.command()(plan)


def run(*given: str) -> str:
    """What the command prints; errors come as they are raised."""
    result = CliRunner().invoke(app, list(given), env={"COLUMNS": "200"})
    if isinstance(result.exception, DiffSynthError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def as_json(*given: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*given, "--json"))
    return found


def test_a_table_names_every_phase_and_the_totals() -> None:
    printed = run("--gpu", "RTX 4060 8GB", "--mode", "two-stage", "--model", "ltx-2", "--host-limit", "32")
    assert "ltx-2 two-stage 768x512x121, int8, RTX 4060 8GB: predicted" in printed
    for phase in ("text", "connectors", "denoise 1", "upsample", "denoise 2", "decode video", "decode audio"):
        assert f"\n{phase} " in printed
    assert all(len(line) <= 80 for line in printed.splitlines()[1:9])
    assert "decode video: tiles 512/128 px, 128/24 frames" in printed
    assert "GB of device memory and" in printed
    assert "the first start converts the weights: 4.7 GB of host memory" in printed


def test_json_holds_the_question_and_the_plan() -> None:
    found = as_json("--gpu", "rtx 4060", "--host-limit", "16", "--storage", "int4", "--frames", "97")
    assert (found["gpu"], found["model"], found["mode"]) == ("RTX 4060 8GB", "ltx-2.3", "one-stage")
    assert (found["height"], found["width"], found["num_frames"]) == (512, 768, 97)
    assert found["vram_limit_bytes"] == pytest.approx(7.2 * GB, rel=1e-6)
    assert found["peak_vram_bytes"] <= found["vram_limit_bytes"]
    assert found["conversion_host_bytes"] <= found["peak_host_bytes"] <= found["host_limit_bytes"] == 16 * GB
    denoise = next(phase for phase in found["phases"] if phase["name"] == "denoise 1")
    assert denoise["num_blocks"] == 48
    assert denoise["residents"][0] == "transformer_blocks.0"
    assert found["seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"]))


def test_a_card_of_figures_is_that_card() -> None:
    named = as_json("--gpu", "RTX 4060 8GB")
    figures = as_json("--vram", "8", "--tflops", "30.2", "--link", "12.5")
    assert {**figures, "gpu": named["gpu"]} == named
    changed = as_json("--gpu", "RTX 4060 8GB", "--tflops", "60.4", "--disk", "0.5")
    assert 1.4 < named["seconds"] / changed["seconds"] < 2.0
    assert changed["load_s"] > named["load_s"]


def test_the_plan_of_a_checkpoint_is_that_of_its_header(tmp_path: Path) -> None:
    """An official fp8 file of real size: 42 blocks in fp8, six in bf16."""
    entries = official_float8(single_file("2.0"))
    path = write_sparse(tmp_path / "ltx-2-19b-dev-fp8.safetensors", entries, single_file_metadata("2.0"))
    try:
        given = ("--gpu", "RTX 4060 8GB", "--host-limit", "32", "--checkpoint", str(path))
        found = as_json(*given)
        int8 = as_json(*given, "--storage", "int8")
        opened = open_models([ModelConfig(path=path)])
        policy = MemoryLimits(vram_limit="8gb").storage_policy(opened.configs, opened.networks)
        sizes = model_sizes(opened.outline(torch.device("meta"), torch.bfloat16).parts, policy)
        with pytest.raises(RequestError, match=r"--model=ltx-2.3, but the files are of another"):
            run(*given, "--model", "ltx-2.3")
        assert "ltx-2 one-stage 768x512x121, fp8 as in the file, RTX 4060 8GB" in run(*given)
    finally:
        path.unlink()
    assert (found["model"], found["storage"]) == ("ltx-2", "fp8 as in the file")
    blocks = {block.name: block.nbytes for block in sizes.parts["dit"].blocks}
    large = [f"transformer_blocks.{number}" for number in (0, *range(43, 48))]
    assert {blocks[name] for name in large} == {772_149_248}
    assert sum(blocks.values()) == pytest.approx(42 * 0.387e9 + 6 * 0.772e9, rel=2e-3)
    denoise = next(phase for phase in found["phases"] if phase["name"] == "denoise 1")
    assert denoise["bytes_per_traversal"] == sum(blocks.values()) - sum(map(blocks.get, denoise["residents"]))  # type: ignore[arg-type]
    released = as_json("--gpu", "RTX 4060 8GB", "--host-limit", "32", "--model", "ltx-2")
    assert int8 == released


def test_host_memory_for_phases_alone_is_refused() -> None:
    with pytest.raises(MemoryBudgetError, match=r"converts the text_encoder, which needs 4.7") as refused:
        run("--gpu", "RTX 4090 24GB", "--host-limit", "4.5")
    assert "later starts need " in refused.value.hint


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(
        MemoryBudgetError, match="height=1024, width=1536, num_frames=121: denoise 1"
    ) as refused:
        run("--vram", "4", "--height", "1024", "--width", "1536")
    assert refused.value.exit_code == 4
    hint = refused.value.hint.split(", or ")[0]
    changed = dict(part.split("=") for part in hint.split(" and "))
    size = {"height": "1024", "width": "1536", "num_frames": "121"} | changed
    run("--vram", "4", *(f"--{name.replace('_', '-')}={value}" for name, value in size.items()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--gpu and --vram are both missing"),
        (("--gpu", "4060", "--vram", "8"), "both given"),
        (("--gpu", "RTX 1"), "gpu='RTX 1' is not known"),
        (("--vram", "-1"), "--vram=-1 is not a positive number"),
        (("--gpu", "4060", "--disk", "0"), "--disk=0"),
        (("--gpu", "4060", "--host-limit", "nan"), "--host-limit=nan"),
        (("--gpu", "4060", "--model", "ltx-3"), "--model=ltx-3 is not known"),
        (("--gpu", "4060", "--mode", "three"), "--mode=three is not known"),
        (("--gpu", "4060", "--storage", "q4"), "storage='q4' is not known"),
        (("--gpu", "4060", "--frames", "120"), "num_frames=120 is not 8k\\+1"),
        (("--gpu", "4060", "--mode", "two-stage", "--height", "544"), "height=544 is not a multiple of 64"),
    ],
)
def test_wrong_arguments_are_named(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        run(*given)
    assert refused.value.hint


def test_the_command_is_known_without_torch() -> None:
    code = "import sys, diffsynth.cli.plan; sys.exit(any(n in sys.modules for n in ('torch', 'rich.table')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_committed_predictions_are_those_of_the_planner() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    committed = page[page.index(BEGIN) : page.index(END) + len(END)]
    assert committed == table(), "python -m benchmarks.plan_table prints the new ones"
