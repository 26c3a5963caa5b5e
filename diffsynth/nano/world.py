"""What the nano family knows: shapes that move over a plain background and sound where they are.

One word has one meaning.  ``tone`` is steady, ``beep`` pulses (125 ms on, 125 ms off), ``ping`` rings at each
bounce and dies away; the pitches low, middle and high are 300, 600 and 1200 Hz.
"""

import random
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Self

from diffsynth.errors import RequestError

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "red": (210, 25, 45),
    "green": (30, 160, 60),
    "blue": (35, 70, 225),
    "yellow": (250, 235, 50),
    "purple": (145, 50, 185),
    "orange": (245, 125, 20),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
"""RGB of the colour words, 0 to 255."""
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "still", "bounce")
PLACES: Mapping[str, float] = {"left": 0.25, "center": 0.5, "right": 0.75}
"""Horizontal position of the centre, as a share of the side."""
SOUNDS = ("tone", "beep", "ping", "silence")
PITCHES: Mapping[str, float] = {"low": 300.0, "middle": 600.0, "high": 1200.0}
"""Frequency in Hz."""
PULSE_S = 0.125
"""Seconds that a beep is on, and then off."""
FRAMED = "framed"
"""First word of the captions of the style that draws a white frame around the picture."""
FRAME_WIDTH = 0.08
"""Of the frame, as a share of the side."""
NUM_FORMS = 4
"""Word orders of a caption."""

_MOVES: Mapping[str, str] = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "still": "stands still",
    "bounce": "bounces",
}
_WHERE: Mapping[str, str] = {"left": "on the left", "center": "in the center", "right": "on the right"}
_SIDEWAYS = ("left", "right")
_HELD_OUT_OF = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The words of one caption."""

    shape: str
    colour: str
    background: str
    motion: str
    place: str | None
    """None for a shape that moves left or right."""
    sound: str
    pitch: str | None
    """None in silence."""

    def __post_init__(self) -> None:
        """Raises RequestError for what this world does not have."""
        _known("shape", self.shape, SHAPES)
        _known("colour", self.colour, PALETTE)
        _known("background", self.background, PALETTE)
        _known("motion", self.motion, MOTIONS)
        _known("place", self.place, (None,) if self.motion in _SIDEWAYS else PLACES)
        _known("sound", self.sound, SOUNDS if self.motion == "bounce" else ("tone", "beep", "silence"))
        _known("pitch", self.pitch, (None,) if self.sound == "silence" else PITCHES)
        if self.colour == self.background:
            raise RequestError(
                f"a {self.colour} shape does not show on {self.background}", hint="two different colours"
            )

    def caption(self, form: int = 0) -> str:
        """One of NUM_FORMS word orders, at most 24 words; ``form`` counts on from 0 again."""
        sound = "silence" if self.pitch is None else f"{_article(self.pitch)} {self.sound}"
        thing = f"{_article(self.colour)} {self.shape}"
        place = "" if self.place is None else f" {_WHERE[self.place]}"
        moves = f"{_MOVES[self.motion]}{place}"
        ground = f"over {_article(self.background)} background"
        return (
            f"{thing} {moves} {ground}, {sound}",
            f"{sound} while {thing} {moves} {ground}",
            f"{ground} {thing} {moves}, with {sound}",
            f"{self.colour} {self.shape}, {self.background} background, {moves}, {sound.removeprefix('a ')}",
        )[form % NUM_FORMS]

    @classmethod
    def read(cls, caption: str) -> Self:
        """The description of a caption in any of the forms, ``framed`` or not.

        Raises:
            RequestError: it is none of ours.
        """
        text = " ".join(words(caption))
        matched = re.match(_READABLE, text)
        found = {key: value for key, value in (matched.groupdict() if matched else {}).items() if value}
        fields = {key.rstrip("0123456789"): value for key, value in found.items()}
        if not fields:
            raise RequestError(
                f"the prompt {caption!r} describes nothing that nano knows",
                hint="a red circle moves left over a blue background, a high beep",
            )
        moves = next(motion for motion, phrase in _MOVES.items() if phrase == fields["moves"])
        where = next((place for place, phrase in _WHERE.items() if phrase == fields.get("where")), None)
        return cls(
            shape=fields["shape"],
            colour=fields["colour"],
            background=fields["background"],
            motion=moves,
            place=where,
            sound=fields.get("sound", "silence"),
            pitch=fields.get("pitch"),
        )

    @property
    def held_out(self) -> bool:
        """Whether this combination never comes in training."""
        key = " ".join(
            (
                self.shape,
                self.colour,
                self.background,
                self.motion,
                f"{self.place}",
                self.sound,
                f"{self.pitch}",
            )
        )
        return zlib.crc32(key.encode()) % _HELD_OUT_OF == 0


def draw_description(source: random.Random, *, held_out: bool = False) -> Description:
    """One combination, of those that training sees or of the others.

    A tenth is silent, and half of what bounces and is not silent pings.
    """
    while True:
        colour, background = source.sample(list(PALETTE), 2)
        motion = source.choice(MOTIONS)
        sounds = ("tone", "beep", "ping", "ping") if motion == "bounce" else ("tone", "beep")
        sound = "silence" if source.random() < 0.1 else source.choice(sounds)
        description = Description(
            shape=source.choice(SHAPES),
            colour=colour,
            background=background,
            motion=motion,
            place=None if motion in _SIDEWAYS else source.choice(list(PLACES)),
            sound=sound,
            pitch=None if sound == "silence" else source.choice(list(PITCHES)),
        )
        if description.held_out == held_out:
            return description


def held_out_descriptions(count: int, seed: int = 0) -> list[Description]:
    """Different combinations that never come in training.

    Args:
        count: at most about a thousand, which is all there are.
        seed: of the choice; a longer list begins with the shorter one.
    """
    source = random.Random(seed)
    found: dict[Description, None] = {}
    while len(found) < count:
        found[draw_description(source, held_out=True)] = None
    return list(found)


def words(caption: str) -> list[str]:
    """A caption's words in lower case, and its commas."""
    return re.findall(r"[^\s,]+|,", caption.lower())


def unknown_words(text: str) -> list[str]:
    """What the text model does not read and leaves out, in the order of the text, each once."""
    plain = re.findall(r"[^\W\d_]+|\d+", text.lower())
    return [word for word in dict.fromkeys(plain) if word not in VOCABULARY]


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _known(name: str, value: str | None, allowed: object) -> None:
    options = list(allowed)  # type: ignore[call-overload]
    if value not in options:
        raise RequestError(f"{name}={value!r} does not go", hint=", ".join(map(str, options)))


def _readable() -> re.Pattern[str]:
    """The forms of :meth:`Description.caption`, over words with single spaces between them."""
    colours, moves, where = "|".join(PALETTE), "|".join(_MOVES.values()), "|".join(_WHERE.values())
    pitches, sounds = "|".join(PITCHES), "|".join(SOUNDS[:-1])
    thing, ground = (
        rf"an? (?P<colour>{colours}) (?P<shape>{'|'.join(SHAPES)})",
        rf"over an? (?P<background>{colours}) background",
    )
    moving = rf"(?P<moves>{moves})(?: (?P<where>{where}))?"
    sound = rf"(?:silence|(?:an? )?(?P<pitch>{pitches}) (?P<sound>{sounds}))"
    terse = thing.removeprefix("an? ")
    forms = (
        rf"{thing} {moving} {ground} , {sound}",
        rf"{sound} while {thing} {moving} {ground}",
        rf"{ground} {thing} {moving} , with {sound}",
        rf"{terse} , {ground.removeprefix('over an? ')} , {moving} , {sound}",
    )
    # A name may stand only once in a pattern: they are numbered by form.
    numbered = [re.sub(r"\(\?P<(\w+)>", rf"(?P<\g<1>{number}>", form) for number, form in enumerate(forms)]
    return re.compile(rf"^(?:{FRAMED} )?(?:{'|'.join(numbered)})$")


def _vocabulary() -> tuple[str, ...]:
    found = {FRAMED, ",", *SHAPES, *PALETTE, *PITCHES, *SOUNDS}
    for colour, motion, form in product(("red", "orange"), MOTIONS, range(NUM_FORMS)):
        for place in (None,) if motion in _SIDEWAYS else PLACES:
            described = Description(
                shape="circle",
                colour=colour,
                background="blue",
                motion=motion,
                place=place,
                sound="tone",
                pitch="low",
            )
            found |= set(words(described.caption(form)))
    return tuple(sorted(found))


_READABLE = _readable()
VOCABULARY: tuple[str, ...] = _vocabulary()
"""Every word of every caption, and the comma."""
