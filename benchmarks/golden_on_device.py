"""How far the golden cases depart on a device and in a dtype.

    python -m benchmarks.golden_on_device --device cuda --dtype float32 --dtype bfloat16

Prints one line per case and writes benchmarks/results/golden_DEVICE.json.  In float32 the tolerance of the
case applies; in bfloat16 the relative RMS error of every output is recorded, without a verdict.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from diffsynth.device import exact_float32, resolve_device
from tests.runners.case import Case
from tests.runners.registry import RUNNERS, collect, identify

COMPONENTS = (
    "transformer",
    "transformer.block",
    "transformer.video_only",
    "transformer.perturbations",
    "video_vae_encoder",
    "video_vae_decoder",
    "audio_encoder",
    "audio_decoder",
    "vocoder_ltx2",
    "vocoder_bwe_ltx2.3",
    "latent_upsampler",
)
RESULTS = Path(__file__).parent / "results"


def measure(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Run one case and report its worst tensor."""
    case = Case.load(path, device=device, dtype=None if dtype is torch.float32 else dtype)
    module, _, function = RUNNERS[case.component].partition(":")
    row: dict[str, Any] = {"case": str(path.relative_to(path.parents[1])), "dtype": str(dtype)}
    try:
        with torch.inference_mode(), exact_float32():
            getattr(import_module(f"tests.runners.{module}"), function)(case)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}"}
    outputs = [c for c in case.comparisons if c.name.startswith("out/") and "bf16" not in c.name]
    worst = max(outputs, key=lambda c: c.share)
    return row | {
        "outputs": len(outputs),
        "worst": worst.name,
        "max_abs_error": worst.error,
        "share_of_float32_tolerance": round(worst.share, 4),
        "relative_rms_error": max(c.relative_rms for c in outputs),
    }


def main() -> None:
    """Measure every case of the rooms on one device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golden_on_device", description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    device = resolve_device(options.device)
    golden = Path(__file__).parents[1] / "tests" / "golden"
    rows = []
    for name in options.dtype or ("float32", "bfloat16"):
        for path in collect([golden]):
            if identify(path) in COMPONENTS:
                row = measure(path, device, getattr(torch, name))
                rows.append(row)
                print(json.dumps(row))
    output = options.output or RESULTS / f"golden_{device.type}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": describe_machine(device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
