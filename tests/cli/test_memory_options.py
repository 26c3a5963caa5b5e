"""Options about memory, the cache on the disk, and the way out of a run that was stopped while decoding."""

import json
import os
import resource
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from diffsynth.cli.generate import LESS_MEMORY
from diffsynth.device import out_of_memory_told
from diffsynth.errors import MemoryBudgetError
from diffsynth.pipelines.rescue import FinalLatents
from diffsynth.vram.cache import FOLDER_VARIABLE
from tests.cli.command import MODELS, SMALL, Here, arguments, environment, run, same_video
from tests.pipelines.tiny import DEV

BOAT = ("generate", "a boat", *MODELS, *SMALL, "--seed", "43")
DECODE = ("--checkpoint", str(DEV), "--device", "cpu", "--dtype", "float32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test; not in the folder of the results."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def test_a_limit_that_cannot_work_ends_with_exit_code_4(output: Path) -> None:
    done = run(*BOAT, "--vram-limit", "0.0001", cwd=output)
    assert done.code == 4, done.err
    assert " of device memory, " in done.err
    assert "Try: " in done.err
    assert "Traceback" not in done.err
    assert not list(output.iterdir())


def test_plan_is_a_command(here: Here) -> None:
    done = here("plan", "--gpu", "RTX 1")
    assert done.code == 2
    assert "gpu='RTX 1' is not known" in done.err
    done = here("plan", "--vram", "0.4")
    assert done.code == 4
    assert "of device memory" in done.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--vram-limit", "-1"), "vram_limit=-1.0 is not a positive number of GB"),
        (("--vram-limit", "nan"), "vram_limit=nan is not a positive number of GB"),
        (("--vram-limit", "7gb"), "vram_limit='7gb' is not known"),
        (("--host-limit", "0"), "host_limit=0.0 is not a positive number of GB"),
        (("--storage", "q4"), "storage='q4' is not known"),
        (("--dtype", "int8"), "--dtype=int8 is not known"),
    ],
)
def test_wrong_values_are_named(here: Here, output: Path, given: tuple[str, ...], words: str) -> None:
    done = here(*BOAT, *given, "-o", str(output / "boat.mp4"))
    assert done.code == 2, done.err
    assert words in done.err
    assert "Try: " in done.err
    assert not list(output.iterdir())


def test_limits_take_effect_and_show(output: Path, cache: Path) -> None:
    """In processes of one thread: how many there are changes the last bits on the CPU."""
    everything = run(*BOAT, "-o", str(output / "a.mp4"), "--quiet", "--stats", cwd=output)
    assert everything.code == 0, everything.err
    assert "no figures: the weights lay on the device" in everything.out
    assert not cache.exists() or not list(cache.rglob("*.safetensors"))
    limited = run(
        *(*BOAT, "-o", str(output / "b.mp4"), "--quiet", "--stats"),
        *("--vram-limit", "8gb", "--host-limit", "16", "--storage", "f32"),
        cwd=output,
    )
    assert limited.code == 0, limited.err
    for words in ("text", "connectors", "denoise 1", "decode video", "decode audio", "stalls"):
        assert words in limited.out
    assert max(map(len, limited.out.splitlines())) <= 80
    assert same_video(output / "a.mp4", output / "b.mp4")
    assert list((cache / "packed").glob("*.safetensors"))
    assert len(list((cache / "prompts").glob("*.safetensors"))) == 2


def test_no_cache_writes_nothing_but_the_video(here: Here, output: Path, cache: Path) -> None:
    done = here(*BOAT, "-o", str(output / "a.mp4"), "--quiet", "--vram-limit", "4", "--no-cache")
    assert done.code == 0, done.err
    assert not list(cache.rglob("*.safetensors"))
    assert [path.name for path in output.iterdir()] == ["a.mp4"]


def test_a_first_start_shows_what_it_converts(here: Here, output: Path) -> None:
    done = here(*BOAT, "-o", str(output / "a.mp4"), "--vram-limit", "4")
    assert done.code == 0, done.err
    for part in ("text_encoder", "text_encoder_post_modules", "dit", "video_vae_decoder"):
        assert f"convert {part}: 100%" in done.err
    assert "B/s]" in done.err
    again = here(*BOAT, "-o", str(output / "a.mp4"), "--vram-limit", "4")
    assert "convert " not in again.err
    assert "denoise stage 1: 100%" in again.err


def test_the_cache_is_listed_and_cleared(here: Here, output: Path, cache: Path) -> None:
    assert here(*BOAT, "-o", str(output / "a.mp4"), "--quiet", "--vram-limit", "4").code == 0
    (cache / "latents").mkdir(exist_ok=True)
    undecoded = cache / "latents" / "a.safetensors"
    undecoded.write_bytes(b"latents")
    listed = here("cache", "list")
    assert listed.code == 0
    assert "dit int8" in listed.out
    assert "encoded prompts: 2 files" in listed.out
    assert f"latents that were never decoded: diffsynth decode {undecoded}" in listed.out
    report = json.loads(here("cache", "list", "--json").out)
    assert report["folder"] == str(cache)
    assert report["prompts"]["files"] == 2
    prompts = list((cache / "prompts").glob("*.safetensors"))
    assert report["prompts"]["bytes"] == sum(path.stat().st_size for path in prompts)
    assert report["latents"] == {"files": 1, "bytes": 7}
    packed = {entry["path"] for entry in report["entries"]}
    assert packed == {str(path) for path in (cache / "packed").glob("*.safetensors")}

    young = here("cache", "clear", "--older-than", "1h")
    assert "0 files of weights; 0.000 GB freed" in young.out
    past = time.time() - timedelta(hours=2).total_seconds()
    os.utime(prompts[0], (past, past))
    assert "deleted 1 files in" in here("cache", "clear", "--older-than", "1h").out
    assert not prompts[0].exists()
    cleared = here("cache", "clear")
    assert f"{len(packed)} files of weights" in cleared.out
    assert list(cache.rglob("*.safetensors")) == [undecoded]
    assert "deleted 1 files in" in here("cache", "clear", "--latents").out
    assert not list(cache.rglob("*.safetensors"))


def test_a_run_that_is_stopped_while_decoding_can_be_finished(here: Here, output: Path, cache: Path) -> None:
    """Stopped from outside, in a process of its own, as soon as its latents lie on the disk."""
    long = (*BOAT, "--frames", "65", "--tile-size-in-frames", "32", "--tile-overlap-in-frames", "24")
    whole = run(*long, "-o", str(output / "whole.mp4"), "--quiet", cwd=output)
    assert whole.code == 0, whole.err
    process = subprocess.Popen(
        [*arguments(), *long, "--output", str(output / "boat.mp4")],
        cwd=output,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not list((cache / "latents").glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (file,) = (cache / "latents").glob("*.safetensors")
    assert f"Try: diffsynth decode {file} --output video.mp4 --checkpoint {DEV}" in said
    assert [path.name for path in output.iterdir()] == ["whole.mp4"]

    # In processes of their own as well: the number of threads changes the last bits on the CPU.
    done = run("decode", str(file), *DECODE, "-o", str(output / "boat.mp4"), "--stats", cwd=output)
    assert done.code == 0, done.err
    assert "no figures" in done.out
    assert same_video(output / "boat.mp4", output / "whole.mp4")
    assert file.exists()
    limited = here(
        *("decode", str(file), *DECODE, "-o", str(output / "limited.mp4")),
        *("--quiet", "--stats", "--vram-limit", "2"),
    )
    assert limited.code == 0, limited.err
    assert "decode video" in limited.out
    assert "denoise" not in limited.out
    assert same_video(output / "limited.mp4", output / "whole.mp4")


def test_a_video_that_cannot_be_written_leaves_its_latents(here: Here, tmp_path: Path, cache: Path) -> None:
    """There is room for the latents, which are far smaller than the video, but not for that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        done = here(*BOAT, "-o", str(tmp_path / "boat.mp4"), "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 3
    (file,) = (cache / "latents").glob("*.safetensors")
    assert FinalLatents.load(file).request.seed == 43


def test_what_decode_refuses(here: Here, tmp_path: Path, ltx_2_3: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    done = here("decode", str(damaged), *DECODE, "-o", str(tmp_path / "a.mp4"))
    assert done.code == 3
    assert f"{damaged}: cannot be read" in done.err
    assert here("decode", str(tmp_path / "nowhere"), *DECODE).code == 3
    assert "Missing option '--checkpoint'" in here("decode", str(damaged)).err


def test_a_device_without_memory_ends_with_exit_code_4() -> None:
    with (
        pytest.raises(MemoryBudgetError, match="ran out of memory: tried 9 GB") as caught,
        out_of_memory_told(LESS_MEMORY),
    ):
        raise torch.OutOfMemoryError("tried 9 GB\nand more")
    assert caught.value.exit_code == 4
    assert "--vram-limit auto" in caught.value.hint
    with (
        pytest.raises(MemoryBudgetError, match="ran out of memory in training: tried 9 GB"),
        out_of_memory_told("smaller", "training"),
    ):
        raise torch.OutOfMemoryError("tried 9 GB")
    with pytest.raises(ZeroDivisionError), out_of_memory_told("smaller"):
        raise ZeroDivisionError
