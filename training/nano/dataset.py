"""Clips of the nano world in files with their captions, as ``diffsynth preprocess`` takes them.

python -m training.nano.dataset --framed --count 24 --folder data/framed
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from training.nano.clips import Scenes, as_uint8

TABLE = "captions.csv"
UNTOLD = "clip"
"""A caption that says nothing, and to nano is the empty prompt.  Guidance compares with that one: what shall
not depend on the prompt, such as a style, has to be learnt for it too."""
FPS = 24
SAMPLE_RATE = 24000


def write_clips(
    folder: Path, count: int, *, framed: bool, side: int, num_frames: int, seed: int, untold: int = 3
) -> Path:
    """Write ``clip_000.mp4`` and so on, and the table that names them.

    Args:
        folder: made if it is not there.
        count: of clips, all of different descriptions or other chance.
        framed: with a white frame around the picture, and captions that begin with this word.
        side: of the pictures, in pixels.
        num_frames: 8k + 1, at 24 a second.
        seed: of everything.
        untold: every so many clips the caption says nothing; 0 for never.

    Returns: the table, with the columns ``video`` and ``caption``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = Scenes.draw(count, seed=seed, framed=framed)
    videos = as_uint8(scenes.video(side, num_frames, FPS))
    sounds = scenes.sound(num_frames * SAMPLE_RATE // FPS, SAMPLE_RATE)
    table = folder / TABLE
    with table.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "caption"])
        for number, (video, sound, caption) in enumerate(zip(videos, sounds, scenes.captions, strict=True)):
            name = f"clip_{number:03d}.mp4"
            write_video_audio_ltx2(video, sound, folder / name, FPS, SAMPLE_RATE)
            rows.writerow([name, UNTOLD if untold and number % untold == untold - 1 else caption])
    return table


def main(
    folder: Annotated[Path, typer.Option(help="Of the clips.")],
    count: Annotated[int, typer.Option(help="How many.")] = 24,
    framed: Annotated[bool, typer.Option("--framed", help="With a white frame around the picture.")] = False,
    side: Annotated[int, typer.Option(help="Of the pictures, in pixels.")] = 256,
    num_frames: Annotated[int, typer.Option(help="8k + 1.")] = 25,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    untold: Annotated[int, typer.Option(help="Every so many clips the caption says nothing; 0: never.")] = 3,
) -> None:
    """Draw clips with sound and write them with their captions."""
    table = write_clips(
        folder, count, framed=framed, side=side, num_frames=num_frames, seed=seed, untold=untold
    )
    print(f"{table}: {count} clips", flush=True)


if __name__ == "__main__":
    typer.run(main)
