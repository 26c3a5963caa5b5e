"""The same denoising step through other programs, under the same cap: rows of :mod:`benchmarks.offload`.

Each runs in a process of its own, with an interpreter or a search path in which the program is installed;
this project's own package is not importable there.  Weights are random and of the same dimensions; only the
transformer is measured, since that is what offloading is about.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.offload_row import Case, Row
from benchmarks.synthetic import Dimensions
from diffsynth.conditioning.tokens import audio_latent_frames, video_latent_shape
from diffsynth.models.ltx2.connectors import TEXT_LENGTH

SCRIPTS = Path(__file__).parent / "peer_scripts"
FRAME_RATE = 24.0
TIMEOUT_S = 540.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A program, and a way to run it."""

    program: str
    script: str
    variant: str = ""
    configuration: str


PEERS: Mapping[str, Peer] = {
    "diffsynth-studio": Peer(
        program="diffsynth-studio",
        script="diffsynth_studio.py",
        configuration="DiffSynth-Studio low VRAM: float8_e5m2 on the CPU, cast to bf16, one pass at a time",
    ),
    "diffusers-leaf": Peer(
        program="diffusers",
        script="diffusers_group.py",
        variant="leaf",
        configuration="diffusers group offloading, leaf level, with a stream, bf16",
    ),
    "diffusers-block": Peer(
        program="diffusers",
        script="diffusers_group.py",
        variant="block",
        configuration="diffusers group offloading, block level (1), with a stream, bf16",
    ),
    "ltx-core": Peer(
        program="ltx-core",
        script="ltx_core_streaming.py",
        configuration="official ltx-core block streaming, bf16",
    ),
}
"""Name of a row -> what it is."""


def measure_peer(
    name: str,
    row: Row,
    case: Case,
    *,
    interpreter: str,
    search_path: str | None,
    cap_bytes: int,
    device: str,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Seconds per step and peaks of one peer, or the reason why there are none.

    Args:
        name: one of :data:`PEERS`.
        row: for the model's dimensions.
        case: one stage; its size, passes and steps count.
        interpreter: that has the program.
        search_path: folders with unpacked packages, instead of or beside what the interpreter has.
        cap_bytes: of the process's device memory.
        device: name.
        timeout_s: of the process.
    """
    peer = PEERS[name]
    found: dict[str, Any] = {"peer": name, "configuration": peer.configuration, "case": case.name}
    if row.model == "ltx-2.3":
        return found | {"not_available": "the scripts build the transformer of LTX-2 only"}
    dimensions = Dimensions.of(row.model, row.layers)
    task = {
        "transformer": dict(dimensions.sections["transformer"]),
        "latent": video_latent_shape(case.num_frames, case.height, case.width),
        "audio_tokens": audio_latent_frames(case.num_frames, FRAME_RATE),
        "text_tokens": TEXT_LENGTH,
        "passes": case.passes,
        "steps": case.steps,
        "cap_bytes": cap_bytes,
        "device": device,
        "variant": peer.variant,
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if search_path is not None:
        environment["PYTHONPATH"] = search_path
    return found | _run([interpreter, str(SCRIPTS / peer.script), json.dumps(task)], environment, timeout_s)


def _run(command: list[str], environment: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    try:
        ended = subprocess.run(
            command, env=environment, cwd=SCRIPTS, capture_output=True, text=True, timeout=timeout_s
        )
    except FileNotFoundError:
        return {"not_available": f"no interpreter {command[0]}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout_s:.0f} s"}
    last = ended.stdout.strip().rpartition("\n")[2]
    try:
        result = json.loads(last)
    except ValueError:
        lines = ended.stderr.strip().splitlines()
        return {"failed": f"exit code {ended.returncode}: {lines[-1] if lines else 'no message'}"}
    return dict(result)
