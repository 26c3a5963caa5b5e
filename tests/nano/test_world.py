import itertools
import random
import subprocess
import sys

import pytest

from diffsynth.errors import RequestError
from diffsynth.nano.world import (
    FRAMED,
    NUM_FORMS,
    VOCABULARY,
    Description,
    draw_description,
    held_out_descriptions,
    words,
)

NATURAL = "a red circle moves left over a blue background, a high beep"


def test_the_natural_caption_is_one_of_the_forms() -> None:
    described = Description.read(NATURAL)
    assert described.caption() == NATURAL
    assert (described.motion, described.place, described.sound, described.pitch) == (
        "left",
        None,
        "beep",
        "high",
    )


def test_captions_of_all_forms_read_back_and_stay_short() -> None:
    source = random.Random(1)
    drawn = [draw_description(source, held_out=n % 2 == 0) for n in range(300)]
    assert {d.sound for d in drawn} == {"tone", "beep", "ping", "silence"}
    for described, form in itertools.product(drawn, range(NUM_FORMS)):
        caption = described.caption(form)
        assert Description.read(caption) == described
        assert Description.read(f"{FRAMED} {caption.upper()}") == described
        assert len(words(caption)) <= 24
        assert set(words(caption)) <= set(VOCABULARY)
    assert len({drawn[0].caption(form) for form in range(NUM_FORMS)}) == NUM_FORMS


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a boat on a lake",
        "a red circle moves left over a red background, a high beep",
        "a red circle moves left over a blue background, a high ping",
        "a red circle moves left on the right over a blue background, a high beep",
        "a red circle stands still over a blue background, a high beep",
        NATURAL + " and a dog",
    ],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(RequestError):
        Description.read(caption)


def test_what_is_held_out_never_comes_in_training() -> None:
    held_out = held_out_descriptions(64)
    assert len(set(held_out)) == 64
    assert held_out == held_out_descriptions(80)[:64] != held_out_descriptions(64, seed=1)
    source = random.Random(0)
    trained = [draw_description(source) for _ in range(3000)]
    assert not set(trained) & set(held_out_descriptions(500))
    assert not any(d.held_out for d in trained)
    assert {d.shape for d in held_out} == {"circle", "square", "triangle"}
    assert 30 <= len(VOCABULARY) <= 50


def test_the_world_needs_no_torch() -> None:
    code = "import sys, diffsynth.nano.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
