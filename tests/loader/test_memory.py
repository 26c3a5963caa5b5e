"""Memory while loading: the header of a 43 GB file costs nothing, and a network needs its own size once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loader.headers import header_bytes, manifest, single_file, single_file_metadata, write_sparse

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc")

_CHILD = """
import json, sys, time
from pathlib import Path

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024

path, what = sys.argv[1:]
if what == "open":
    from diffsynth.loader import SafetensorsFile, describe, ModelConfig
    before = status("VmRSS")
    start = time.perf_counter()
    file = SafetensorsFile(path)
    seconds = time.perf_counter() - start
    print(json.dumps({"grown": status("VmHWM") - before, "seconds": seconds, "read": file.bytes_read}))
else:
    import torch
    from diffsynth.loader import NetworkKind, WeightFiles, find_network, load_network
    files = WeightFiles(path)
    find_network(NetworkKind.UPSAMPLER, files)
    before = status("VmRSS")
    module = load_network(NetworkKind.UPSAMPLER, files, dtype=getattr(torch, what))
    size = sum(t.nbytes for t in module.state_dict().values())
    print(json.dumps({"grown": status("VmHWM") - before, "size": size, "read": files.bytes_read}))
"""


def _child(path: Path, what: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), what], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout)
    return result


def test_opening_a_43_gb_checkpoint_reads_its_header_only(tmp_path: Path) -> None:
    entries, metadata = single_file("2.0"), single_file_metadata("2.0")
    path = write_sparse(tmp_path / "ltx-2-19b-dev.safetensors", entries, metadata)
    try:
        assert path.stat().st_size > 43_284_000_000
        assert path.stat().st_blocks * 512 < 10 * 2**20
        measured = _child(path, "open")
    finally:
        path.unlink()
    start, _ = header_bytes(entries, metadata)
    assert measured["read"] == len(start)
    assert measured["grown"] < 50e6
    assert measured["seconds"] < 0.5


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("ltx-2.3-spatial-upscaler-x1.5", "bfloat16", 1.09e9),
        ("ltx-2.3-temporal-upscaler-x2", "float32", 0.52e9),
    ],
)
def test_loading_needs_the_size_of_the_network_once(
    tmp_path: Path, name: str, dtype: str, size: float
) -> None:
    """As stored, and converted while it is read."""
    path = write_sparse(tmp_path / f"{name}.safetensors", manifest(name))
    try:
        measured = _child(path, dtype)
    finally:
        path.unlink()
    assert measured["size"] == pytest.approx(size, rel=0.01)
    assert measured["grown"] > 0.9 * measured["size"]
    assert measured["grown"] < 1.1 * measured["size"]
