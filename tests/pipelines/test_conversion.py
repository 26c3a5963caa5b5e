"""Conversion as a user meets it: announced, counted, stopped without a trace."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.errors import Cancelled
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import Progress
from diffsynth.vram.cache import FOLDER_VARIABLE
from tests.pipelines.placed import make, manager, same
from tests.pipelines.tiny import SMALL, Log, load

NETWORKS = ("text_encoder", "text_encoder_post_modules", "dit", "video_vae_decoder")
NETWORKS += ("audio_vae_decoder", "audio_vocoder")
"""What a plain request needs, in the order in which it is needed."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path / "packed"


def managed(storage: str = "int8", **arguments: Any) -> LTX2AudioVideoPipeline:
    return load(dtype=torch.bfloat16, storage=storage, **arguments)


def conversions(log: Log) -> list[str]:
    return [phase for phase in log.phases() if phase.startswith("convert")]


@pytest.mark.parametrize("cached", [True, False])
def test_every_network_is_counted_to_its_end_once(cached: bool, cache: Path) -> None:
    log = Log()
    pipe = managed(cache=cached)
    make(pipe, log)
    assert conversions(log) == [f"convert {part}" for part in NETWORKS]
    for part in NETWORKS:
        blocks = manager(pipe)._weights.blocks(part)
        done = [0]
        for layout in blocks.values():
            done.append(done[-1] + layout.nbytes)
        reports = log.phases()[f"convert {part}"]
        assert reports[0] == (0, done[-1])
        assert reports[-1] == (done[-1], done[-1])
        assert set(done) <= {each for each, _ in reports}
    assert {event.unit for event in log.events if event.phase.startswith("convert")} == {"byte"}
    assert list(cache.glob("*.safetensors")) if cached else not cache.exists()
    # Phases follow one another: none is announced before another has come to its end.
    open_phase = None
    for event in log.events:
        assert open_phase in (None, event.phase)
        open_phase = None if event.done == event.total else event.phase
    again = Log()
    make(managed(), again) if cached else make(pipe, again)
    assert conversions(again) == []


def test_what_is_not_needed_is_not_converted(cache: Path) -> None:
    alone = Log()
    make(managed(), alone, audio_only=True)
    assert "convert video_vae_decoder" not in conversions(alone)
    assert "convert dit" in conversions(alone)
    for packed in cache.glob("text_encoder*"):
        packed.unlink()
    known = Log()
    make(managed(), known, audio_only=True)
    assert conversions(known) == [], "the prompts are known"


@pytest.mark.parametrize("error", [Cancelled("enough"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["text_encoder", "dit"])
def test_stopped_in_the_middle_nothing_is_left(part: str, error: BaseException, cache: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.phase == f"convert {part}" and 0 < progress.done < progress.total:
            assert list(cache.glob(f".{part}-*.part")), "it is being written now"
            raise error

    pipe = managed()
    with pytest.raises(type(error)):
        make(pipe, stop)
    assert not list(cache.glob("*.part"))
    assert not list(cache.glob(f"{part}-*.safetensors"))
    log = Log()
    made = make(pipe, log)
    assert f"convert {part}" in conversions(log)
    assert same(made, make(managed()))


def test_the_public_bar_shows_conversions(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = managed()
    pipe("a boat", seed=1, **SMALL)
    printed = capsys.readouterr().err
    for part in NETWORKS:
        assert f"convert {part}: 100%" in printed
    assert "2/2" in printed
    managed(storage="bf16")("a boat", seed=1, **SMALL, progress_bar_cmd=lambda items: items)
    assert capsys.readouterr().err == ""
