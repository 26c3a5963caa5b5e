"""Mask files -> which latent cells of a clip are given: white, or loud, is given; the rest is generated."""

from pathlib import Path

from torch import Tensor
from torch.nn import functional

from diffsynth.conditioning.items import token_weights
from diffsynth.conditioning.tokens import AUDIO_LATENTS_PER_S, video_latent_shape
from diffsynth.errors import RequestError
from diffsynth.training.config import Bucket
from diffsynth.utils.audio import read_audio
from diffsynth.utils.images import fit_mask, read_video

THRESHOLD = 0.5
"""What is above is given."""


def read_video_mask(path: Path, bucket: Bucket) -> Tensor:
    """A grey clip as long as the video, or one picture for all frames, fitted as the video is.

    Args:
        path: of the clip or picture.
        bucket: the size of the video.

    Returns: (1, F, H, W) bool, True where the mean of the pixels of a latent cell is above one half.

    Raises:
        RequestError: it cannot be read, is of another length, or gives all or nothing.
    """
    frames = read_video(path, frame_cap=bucket.frames, argument="mask").frames
    if len(frames) not in {1, bucket.frames}:
        raise RequestError(
            f"its mask has {len(frames)} of {bucket.frames} frames", hint="a picture, or a clip as long"
        )
    pixels = fit_mask(frames, bucket.height, bucket.width).expand(-1, -1, bucket.frames, -1, -1)
    grid = video_latent_shape(bucket.frames, bucket.height, bucket.width)
    return _checked(token_weights(pixels, grid).reshape(1, *grid) > THRESHOLD, path)


def read_audio_mask(path: Path, length: int) -> Tensor:
    """A sound whose loudness is a mask: samples of size 1 are given, silence is generated.

    Args:
        path: of the sound, as long as that of the clip or cut to it; silence follows a shorter one.
        length: latents of the sound of the clip.

    Returns: (1, T) bool, True where the mean of ``|sample|`` over the 40 ms of a latent is above one half.

    Raises:
        RequestError: it cannot be read, or gives all or nothing.
    """
    duration_s = length / AUDIO_LATENTS_PER_S
    sound = read_audio(path, 0.0, duration_s, argument="mask")
    samples = sound.fit(round(duration_s * sound.sampling_rate)).samples
    loudness = functional.adaptive_avg_pool1d(samples.abs().mean(dim=0, keepdim=True), length)
    return _checked(loudness > THRESHOLD, path)


def _checked(mask: Tensor, path: Path) -> Tensor:
    if bool(mask.all()) or not bool(mask.any()):
        what = "the whole clip" if bool(mask.all()) else "nothing of the clip"
        raise RequestError(f"its mask {path.name} gives {what}", hint="white or loud where it is given")
    return mask
