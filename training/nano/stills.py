"""Frames of clips that nano makes, and what the two channels of their sound do, in one picture.

python -m training.nano.stills --output docs/nano.png
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw
from torch import Tensor

from diffsynth import nano
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline

PROMPTS = (
    nano.EXAMPLE,
    "an orange square bounces on the right over a black background, a low ping",
    "a white triangle moves up on the left over a purple background, a middle tone",
    "framed a yellow circle moves right over a green background, a high tone",
)
"""The last one is made with the LoRA of the package."""
COLUMNS = 5
"""Frames of a clip."""
PICTURE_PX = 96
CHANNEL_PX = 14
LABEL_PX = 14
MARGIN_PX = 4
_INK, _PAPER = (60, 60, 60), (255, 255, 255)


def strip(prompt: str, frames: Sequence[Image.Image], sound: Tensor) -> Image.Image:
    """A row: the prompt, frames from the first to the last, the left channel above the right one.

    Args:
        prompt: written over the frames.
        frames: of the clip; a few at equal distances are taken.
        sound: (2, samples) in [-1, 1].
    """
    width = COLUMNS * (PICTURE_PX + MARGIN_PX) - MARGIN_PX
    row = Image.new("RGB", (width, LABEL_PX + PICTURE_PX + 2 * (CHANNEL_PX + MARGIN_PX)), _PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((0, 0), prompt, fill=_INK)
    for column in range(COLUMNS):
        frame = frames[round(column * (len(frames) - 1) / (COLUMNS - 1))]
        small = frame.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX)
        row.paste(small, (column * (PICTURE_PX + MARGIN_PX), LABEL_PX))
    for channel, wave in enumerate(sound):
        middle = LABEL_PX + PICTURE_PX + MARGIN_PX + channel * CHANNEL_PX + CHANNEL_PX // 2
        for x, piece in enumerate(np.array_split(wave.abs().numpy(), width)):
            height = float(piece.max()) * CHANNEL_PX / 2
            draw.line([(x, middle - height), (x, middle + height)], fill=_INK)
    return row


def sheet(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows below one another."""
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), _PAPER)
    for number, row in enumerate(rows):
        whole.paste(row, (0, number * row.height))
    return whole


def main(
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/nano.png"),
    seed: Annotated[int, typer.Option(help="Of the noise of all clips.")] = 1,
    device: Annotated[str | None, typer.Option(help="The best one if not given.")] = None,
) -> None:
    """Make a clip of every prompt and write the frames."""
    pipe = LTX2AudioVideoPipeline.from_pretrained(device=device, **nano.models())
    rows = []
    for prompt in PROMPTS:
        if prompt is PROMPTS[-1]:
            pipe.load_lora(pipe.dit, nano.files().framed_lora)
        video, sound = pipe(prompt, seed=seed, **nano.settings())
        assert video is not None, "a video was asked for"
        assert sound is not None, "with its sound"
        rows.append(strip(prompt, video, sound))
    sheet(rows).quantize(128, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"{output}: {output.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    typer.run(main)
