"""Runs a script of ``../model_inference`` within limits, as its own options would:

    python ../model_inference/LTX-2-T2AV-OneStage.py --vram-limit 8gb --host-limit 24

Options given to the script here come after these and win.
"""

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "model_inference"


def run(script: str, **limits: float | str) -> None:
    """Run the script of the same name; limits are ``vram_limit``, ``host_limit`` (GB) and ``storage``."""
    for name, value in limits.items():
        sys.argv[1:1] = [f"--{name.replace('_', '-')}", str(value)]
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(str(FOLDER / Path(script).name), run_name="__main__")
