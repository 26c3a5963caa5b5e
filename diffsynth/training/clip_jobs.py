"""What has to be made of which clip: its size, its caption, and the name of the sample that it becomes."""

import glob
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from diffsynth.conditioning.tokens import AUDIO_LATENTS_PER_S, reference_frames
from diffsynth.errors import RequestError
from diffsynth.training.clips import ClipSource
from diffsynth.training.config import Bucket, DataSection
from diffsynth.utils.audio import sound_length
from diffsynth.utils.images import VideoInfo, probe_video

FORMAT_VERSION = 1
"""Raised when the same clip and weights would give another sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipJob:
    """A clip that can be used, as it will be encoded.

    Attributes:
        bucket: its size; None for sound alone.
        fps: frames per second of the clip; of sound alone, its latents.
        duration_s: length of the sound.
        file: name of its sample.
    """

    clip: ClipSource
    caption: str
    bucket: Bucket | None
    fps: float
    duration_s: float
    file: str
    video_mask: Path | None = None
    audio_mask: Path | None = None

    @property
    def sound(self) -> Path:
        """The file that the sound is read from."""
        return self.clip.sound or self.clip.path


def plan_jobs(
    clips: Iterable[ClipSource], data: DataSection, models: str
) -> tuple[list[ClipJob], list[tuple[str, str]]]:
    """Look at every clip: its header, its size, all its bytes for the name, but no picture.

    Args:
        models: digest of the networks that will encode it.

    Returns:
        Those that can be used, and (where, reason) of the others.
    """
    jobs: list[ClipJob] = []
    broken: list[tuple[str, str]] = []
    for clip in clips:
        try:
            jobs.append(_job(clip, data, models))
        except (RequestError, OSError) as error:
            broken.append((clip.where, str(error)))
    return jobs, broken


def choose_bucket(info: VideoInfo, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest in aspect of those that the clip is long enough for; of equal ones the longest, then
    the largest.

    Raises:
        RequestError: the clip is too short for all.
    """
    fitting = [bucket for bucket in buckets if bucket.frames <= info.num_frames]
    if not fitting:
        shortest = min(bucket.frames for bucket in buckets)
        raise RequestError(f"it has {info.num_frames} frames", hint=f"a longer clip: {shortest} frames")

    def order(bucket: Bucket) -> tuple[float, int, int]:
        ratio = math.log(bucket.width / bucket.height) - math.log(info.width / info.height)
        return round(abs(ratio), 6), -bucket.frames, -bucket.width * bucket.height

    return min(fitting, key=order)


def choose_duration(length_s: float, durations: Sequence[float]) -> float:
    """The longest that a sound is long enough for, to one latent: silence may follow it for less than that.

    Raises:
        RequestError: the sound is too short for all.
    """
    fitting = [duration for duration in durations if long_enough(length_s, duration)]
    if not fitting:
        raise RequestError(
            f"it lasts {length_s:.2f} s",
            hint=f"a longer sound: {min(durations):g} s, or other audio_durations",
        )
    return max(fitting)


def long_enough(length_s: float, duration_s: float) -> bool:
    """Whether less than one latent is missing."""
    return length_s > duration_s - 1 / AUDIO_LATENTS_PER_S


def _length(clip: ClipSource, data: DataSection) -> tuple[Bucket | None, float, float]:
    """Bucket, frames per second and length of the sound, as :class:`ClipJob` has them."""
    if data.audio_durations:
        length_s = sound_length(clip.sound or clip.path, argument="clip")
        return None, AUDIO_LATENTS_PER_S, choose_duration(length_s, data.audio_durations)
    if not clip.pictures:
        raise RequestError(
            f"{clip.path.name} has no pictures, and buckets count frames",
            hint="audio_durations = [5.0] in [data]",
        )
    info = probe_video(clip.path, argument="clip")
    if data.audio and clip.sound is None and not info.has_audio:
        raise RequestError(f"{clip.path.name} has no sound track", hint="audio = false in [data]")
    bucket, fps = choose_bucket(info, data.sizes), float(info.fps)
    return bucket, fps, bucket.frames / fps


def _job(clip: ClipSource, data: DataSection, models: str) -> ClipJob:
    if clip.caption is None:
        raise RequestError(
            f"{clip.path.name} has no readable caption", hint="one in the list, or a .txt file"
        )
    bucket, fps, duration_s = _length(clip, data)
    reference = _reference(clip, bucket, data) if data.reference_scale and bucket is not None else None
    video_mask = _mask(clip.video_mask, data.video_masks, clip.path) if data.video else None
    audio_mask = _mask(clip.audio_mask, data.audio_masks, clip.path) if data.audio else None
    if data.audio_reference and clip.audio_reference is None:
        raise RequestError(f"{clip.path.name} has no reference sound", hint="audio_reference = false")
    caption = f"{data.trigger} {clip.caption}".strip()
    facts = [
        FORMAT_VERSION,
        models,
        caption,
        [duration_s] if bucket is None else astuple(bucket),
        fps,
        data.video,
        data.audio,
        data.reference_scale,
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for file in (clip.path, clip.sound if data.audio else None, reference):
        if file is None:
            digest.update(b"none")
            continue
        digest.update(_digest(file))
    further = {
        "audio_reference": clip.audio_reference if data.audio_reference else None,
        "video_mask": video_mask,
        "audio_mask": audio_mask,
    }
    if data.reference_temporal_scale != 1:
        digest.update(f"every {data.reference_temporal_scale}".encode())
    for name, file in further.items():
        if file is not None:
            digest.update(name.encode() + _digest(file))
    return ClipJob(
        clip=clip,
        caption=caption,
        bucket=bucket,
        fps=fps,
        duration_s=duration_s,
        file=f"{digest.hexdigest()[:40]}.safetensors",
        video_mask=video_mask,
        audio_mask=audio_mask,
    )


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _mask(stated: Path | None, folder: Path | None, clip: Path) -> Path | None:
    """The mask of a clip: the one in its row, else the file of its name in the folder of masks, if any."""
    if stated is not None or folder is None:
        return stated
    found = sorted(folder.glob(f"{glob.escape(clip.stem)}.*"))
    if not found:
        raise RequestError(f"{folder} holds no mask for {clip.name}", hint=f"{clip.stem}.png")
    return found[0]


def _reference(clip: ClipSource, bucket: Bucket, data: DataSection) -> Path:
    if clip.reference is None:
        raise RequestError(f"{clip.path.name} has no reference clip", hint="reference_scale = 0 in [data]")
    num_frames = probe_video(clip.reference, argument="reference").num_frames
    sparse = len(reference_frames(bucket.frames, data.reference_temporal_scale))
    if num_frames < bucket.frames and num_frames != sparse:
        raise RequestError(
            f"its reference has {num_frames} of {bucket.frames} frames",
            hint="clips of equal length"
            if sparse == bucket.frames
            else f"{bucket.frames} frames, or {sparse}",
        )
    return clip.reference
