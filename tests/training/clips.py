"""Small clips on the disk, and a configuration for them."""

from pathlib import Path

import av
import torch

from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.pipelines.tiny import DEV, GEMMA

FPS, RATE = 25.0, 16000


def write_clip(path: Path, *, frames: int = 9, width: int = 64, height: int = 64, sound: bool = True) -> Path:
    """A red square on blue that moves right, with a tone."""
    pictures = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    pictures[..., 2] = 200
    for index, picture in enumerate(pictures):
        picture[8:24, 2 * index : 2 * index + 16] = torch.tensor([230, 10, 10], dtype=torch.uint8)
    seconds = torch.arange(round(frames / FPS * RATE)) / RATE
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * seconds).expand(2, -1) if sound else None
    write_video_audio_ltx2(pictures, tone, path, fps=FPS, audio_sample_rate=RATE)
    return path


def write_lossless(path: Path, pictures: torch.Tensor) -> Path:
    """uint8 (F, H, W, 3) without sound, every value as it is."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=round(FPS))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "bgr0"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return path


def write_config(folder: Path, **sections: str) -> Path:
    """``run.toml`` in ``folder`` for the tiny models and the clips in ``folder/clips``.

    A given section is added, or put instead of the one that has its name."""
    texts = {
        "model": f'checkpoint = "{DEV}"\ngemma = "{GEMMA}"\ndevice = "cpu"\ndtype = "float32"',
        "data": 'source = "clips"\nfolder = "samples"\nbuckets = ["64x64x9"]',
        "output": 'folder = "run"\nsave_every = 100\ndtype = "float32"',
        **sections,
    }
    path = folder / "run.toml"
    path.write_text("\n".join(f"[{name}]\n{text}\n" for name, text in texts.items()))
    return path


def write_data_set(folder: Path, count: int = 1) -> Path:
    """``folder/clips`` with so many clips and their captions."""
    clips = folder / "clips"
    clips.mkdir()
    for number in range(count):
        clip = write_clip(clips / f"{number}.mp4", width=64 + 32 * number)
        clip.with_suffix(".txt").write_text(f"a red square moves right {number}\n")
    return clips
