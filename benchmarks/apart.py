"""Rows of a benchmark, each in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def measured_apart(module: str, row: "DataclassInstance", timeout_s: float) -> dict[str, Any]:
    """Run ``python -m MODULE JSON`` with a row; the last line that it writes is the result, as JSON.

    Returns: the result; where the process fails, the reason as ``failed``.
    """
    command = [sys.executable, "-m", module, json.dumps(asdict(row))]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout_s:.0f} s"}
    try:
        return dict(json.loads(ended.stdout.strip().rpartition("\n")[2]))
    except ValueError:
        return {"failed": f"exit code {ended.returncode}, see its messages"}
