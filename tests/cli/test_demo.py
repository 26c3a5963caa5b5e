"""``diffsynth demo``: what it says about its clip is what is in the file."""

from pathlib import Path

import pytest

from diffsynth.cli.demo import look_at, report
from diffsynth.nano import EXAMPLE, bundle
from diffsynth.nano.world import Description
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.cli.command import Here
from training.nano.clips import Scenes, as_uint8

RATE = 24000


def drawn(prompt: str, file: Path) -> Description:
    """A clip of this prompt as the world draws it."""
    description = Description.read(prompt)
    scene = Scenes.of([description], seed=3)
    video, sound = as_uint8(scene.video(256))[0], scene.sound(RATE * 25 // 24, RATE)[0]
    write_video_audio_ltx2(video, sound, file, 24, RATE)
    return description


@pytest.mark.parametrize(
    ("prompt", "lines"),
    [
        (
            EXAMPLE,
            [
                "Look for:   a red circle moves left over a blue background",
                "Listen for: a beep, 125 ms on and 125 ms off, at 1200 Hz, from where the circle is",
                "Read from the file: red circle on blue, motion left, place center; beep at 1200 Hz",
                "As asked: colour, background, shape, motion, sound, pitch, pan",
            ],
        ),
        (
            "an orange square bounces on the left over a black background, a low ping",
            [
                "Look for:   an orange square bounces on the left over a black background",
                "Listen for: a ping at each bounce at 300 Hz, from where the square is",
                "Read from the file: orange square on black, motion bounce, place left; ping at 300 Hz",
                "As asked: colour, background, shape, motion, place, sound, pitch, pan, sync",
            ],
        ),
        (
            "a green triangle stands still on the right over a white background, silence",
            [
                "Look for:   a green triangle stands still on the right over a white background",
                "Listen for: silence",
                "Read from the file: green triangle on white, motion still, place right; silence",
                "As asked: colour, background, shape, motion, place, sound",
            ],
        ),
    ],
)
def test_a_drawn_clip_is_read_from_its_file(prompt: str, lines: list[str], tmp_path: Path) -> None:
    description = drawn(prompt, tmp_path / "drawn.mp4")
    assert list(report(description, *look_at(tmp_path / "drawn.mp4", description))) == lines


def test_what_is_not_as_asked_is_said(tmp_path: Path) -> None:
    drawn(EXAMPLE, tmp_path / "drawn.mp4")
    asked = Description.read("a green circle moves right over a blue background, a low tone")
    *_, last = report(asked, *look_at(tmp_path / "drawn.mp4", asked))
    assert last == "As asked: background, shape, pan; not: colour, motion, sound, pitch"


def test_the_command_with_an_untrained_model(
    untrained_nano: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "WEIGHTS", untrained_nano)
    output = tmp_path / "clip.mp4"
    ended = here("demo", "--output", str(output), "--device", "cpu", "--quiet")
    assert ended.code == 0, ended.err
    look, listen, read, agreed, where = ended.out.splitlines()
    assert (look[:9], listen[:11], read[:5]) == ("Look for:", "Listen for:", "Read ")
    assert "; not: " in agreed
    assert where.startswith(f"The video is in {output} (")
    assert output.stat().st_size > 0


def test_other_worlds_are_refused_before_any_work(here: Here, untouched: None) -> None:
    ended = here("demo", "--prompt", "a boat on a lake")
    assert ended.code == 2
    assert "describes nothing that nano knows  Try: a red circle moves left" in ended.err
