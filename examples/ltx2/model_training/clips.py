"""A small data set that is drawn here, so that every configuration runs at once: balls that roll and sound.

It stands in for clips of yours.  ``clips/list.csv`` has every column that one of the configurations uses,
``clips/sounds.csv`` the sounds alone.
"""

import csv
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from diffsynth.utils.audio import Waveform
from diffsynth.utils.audio_file import write_audio
from diffsynth.utils.data.media_io_ltx2 import write_video_audio_ltx2

FRAME_RATE, SAMPLING_RATE = 24, 16000
BALLS = (("red", "blue", "right", 220), ("yellow", "green", "left", 440), ("white", "purple", "right", 880))
"""Ball, floor, where it rolls to, and the pitch in Hz."""


def draw(folder: Path, width: int, height: int, num_frames: int) -> None:
    """Write ``folder/clips`` and ``folder/first_frame.png``, unless they are there."""
    clips = folder / "clips"
    if (clips / "list.csv").exists():
        return
    clips.mkdir(parents=True)
    rows, sounds = [], []
    for number, (ball, floor, side, pitch_hz) in enumerate(BALLS):
        frames = [_frame(ball, floor, side, n / num_frames, width, height) for n in range(num_frames)]
        tone = _tone(pitch_hz, num_frames)
        write_video_audio_ltx2(frames, tone, clips / f"{number}.mp4", FRAME_RATE, SAMPLING_RATE)
        grey = [ImageOps.grayscale(frame).convert("RGB") for frame in frames]
        write_video_audio_ltx2(grey, None, clips / f"{number}_reference.mp4", FRAME_RATE)
        write_audio(Waveform(tone, SAMPLING_RATE), clips / f"{number}.wav")
        write_audio(Waveform(_tone(pitch_hz / 2, num_frames), SAMPLING_RATE), clips / f"{number}_voice.wav")
        mask = Image.new("L", (width, height), 255)
        ImageDraw.Draw(mask).rectangle((0, height // 2, width, height), 0)
        mask.save(clips / f"{number}_mask.png")
        rows.append(
            {
                "video": f"{number}.mp4",
                "caption": f"A {ball} ball rolls to the {side} over a {floor} floor, a tone sounds.",
                "reference_video": f"{number}_reference.mp4",
                "reference_audio": f"{number}_voice.wav",
                "video_mask": f"{number}_mask.png",
            }
        )
        sounds.append(
            {
                "audio": f"{number}.wav",
                "caption": f"A steady tone of {pitch_hz} Hz.",
                "reference_audio": f"{number}_voice.wav",
            }
        )
        if number == 0:
            frames[0].save(folder / "first_frame.png")
    _write(clips / "sounds.csv", sounds)
    _write(clips / "list.csv", rows)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def _frame(ball: str, floor: str, side: str, share: float, width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), "grey")
    pencil, radius = ImageDraw.Draw(picture), height / 8
    pencil.rectangle((0, height * 0.6, width, height), floor)
    x = width * (share if side == "right" else 1 - share)
    pencil.ellipse((x - radius, height * 0.6 - 2 * radius, x + radius, height * 0.6), ball)
    return picture


def _tone(pitch_hz: float, num_frames: int) -> torch.Tensor:
    """(2, samples) at 16 kHz, as long as the clip."""
    time_s = torch.arange(num_frames * SAMPLING_RATE // FRAME_RATE) / SAMPLING_RATE
    return (0.4 * torch.sin(2 * math.pi * pitch_hz * time_s)).expand(2, -1).contiguous()
