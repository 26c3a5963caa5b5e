"""Clips and captions -> samples on the disk: once, before any training.

One file per clip, named by everything that decides its content: a second run skips what is there, and a
stopped one goes on.  (Tiles are left out: under limits below some 6 GB they are smaller than elsewhere.)
A clip that cannot be used is named, and the others go on.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.conditioning.tokens import AUDIO_LATENTS_PER_S, reference_frames
from diffsynth.device import out_of_memory_told
from diffsynth.errors import OutputError, RequestError
from diffsynth.models.ltx2.tiling import TileConfig
from diffsynth.models.ltx2.video_tiling import encode_tiled
from diffsynth.pipelines.assemble import OpenedModels
from diffsynth.pipelines.encode_inputs import encode_sound
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.progress import OnProgress, ignore
from diffsynth.pipelines.prompt_cache import PromptCache, digest_of
from diffsynth.training.clip_jobs import ClipJob, long_enough, plan_jobs
from diffsynth.training.clips import find_clips
from diffsynth.training.config import Bucket, DataSection, TrainConfig
from diffsynth.training.masks import read_audio_mask, read_video_mask
from diffsynth.training.networks import (
    TEXT,
    computing,
    files_of,
    formats_of,
    open_all,
    prepare,
    request_of,
)
from diffsynth.training.samples import Sample, entry_of, write_index
from diffsynth.training.texts import encode_texts, text_cache, told
from diffsynth.utils.audio import read_audio
from diffsynth.utils.files import make_folder
from diffsynth.utils.images import fit_frames, read_video

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessReport:
    """What became of the clips: numbers of ``made`` and ``kept`` samples; ``broken`` (where, reason)."""

    made: int
    kept: int
    broken: tuple[tuple[str, str], ...]


@torch.inference_mode()
def preprocess(config: TrainConfig, on_progress: OnProgress = ignore) -> PreprocessReport:
    """Make the samples that are not there yet, and the index that names those of this configuration.

    The text model comes first, then the encoders: as a whole, or with ``[memory]`` planned within its limits,
    block by block and tile by tile.

    Raises:
        RequestError: the list of clips cannot be read, or no clip in it can be used.
        CheckpointError, DownloadError: the models cannot be opened, or lack a network.
        OutputError: the folder is not writable or the disk is full.
        MemoryBudgetError: it does not fit, or the device ran out of memory.
    """
    config.check()
    data, folder = config.data, config.data.folder
    clips = find_clips(data.source, video=data.video)
    opened = open_all(config)
    encoders, captions = opened.only(_encoders(data)), text_cache(config, opened)
    models = digest_of([*files_of(opened.only(TEXT)), *files_of(encoders)], formats_of(config, opened))
    jobs, broken = plan_jobs(told("look at clips", clips, on_progress), data, models)
    make_folder(folder)
    todo = {job.file: job for job in jobs if not (folder / job.file).exists()}
    _check_sizes(config, encoders, todo.values())
    texts = [*(job.caption for job in todo.values()), *config.validation.texts]
    encode_texts(config, opened, captions, texts, on_progress)
    with out_of_memory_told("vram_limit in [memory], or a lower one; or smaller buckets", "the encoders"):
        broken += _encode_clips(config, encoders, captions, list(todo.values()), on_progress)
    for where, reason in broken:
        logger.warning("%s is left out: %s", where, reason)
    there = [job for job in jobs if (folder / job.file).exists()]
    if not there:
        raise RequestError(f"no clip of {data.source} can be used", hint="mend what is named above")
    write_index(folder, [entry_of(folder / job.file) for job in there])
    made = sum(job.file in todo for job in there)
    return PreprocessReport(made=made, kept=len(there) - made, broken=tuple(broken))


def _encoders(data: DataSection) -> list[str]:
    wanted = {"video_vae_encoder": data.video, "audio_vae_encoder": data.audio}
    return [name for name, needed in wanted.items() if needed]


def _check_sizes(config: TrainConfig, opened: OpenedModels, jobs: Iterable[ClipJob]) -> None:
    """Under limits every size is planned before any weight is read.

    Raises:
        MemoryBudgetError: one does not fit; the hint names what would.
    """
    if config.memory.managed:
        with computing(config, opened, _encoders(config.data)) as parts:
            for size in dict.fromkeys((job.bucket, job.fps, job.duration_s) for job in jobs):
                prepare(parts, request_of(*size))


def _encode_clips(
    config: TrainConfig,
    opened: OpenedModels,
    captions: PromptCache,
    jobs: Sequence[ClipJob],
    on_progress: OnProgress,
) -> list[tuple[str, str]]:
    """Write the samples.  Returns: (where, reason) of clips that cannot be read to their end."""
    broken: list[tuple[str, str]] = []
    if not jobs:
        return broken
    names = _encoders(config.data)
    with computing(config, opened, names) as parts:
        for job in told("encode clips", jobs, on_progress):
            prepare(parts, request_of(job.bucket, job.fps, job.duration_s))
            parts.memory.convert(names, on_progress)
            try:
                sample = _encode(config.data, parts, captions, job)
            except RequestError as error:
                broken.append((job.clip.where, str(error)))
                continue
            sample.save(config.data.folder / job.file, source=str(job.clip.path), caption=job.caption)
    return broken


def _encode(data: DataSection, parts: Parts, captions: PromptCache, job: ClipJob) -> Sample:
    context = captions.get(job.caption)
    if context is None:
        raise OutputError(
            f"{captions.path(job.caption)} could not be kept", hint=f"free space in {data.folder}"
        )
    bucket, video, audio, reference, voice = job.bucket, None, None, None, None
    video_mask = audio_mask = None
    if parts.video_vae_encoder is not None:
        assert bucket is not None, "pictures come in buckets"
        video = _encode_video(parts, job.clip.path, bucket)
        if data.reference_scale and job.clip.reference is not None:
            reference = _encode_video(
                parts,
                job.clip.reference,
                bucket,
                data.reference_scale,
                reference_frames(bucket.frames, data.reference_temporal_scale),
            )
        if job.video_mask is not None:
            video_mask = read_video_mask(job.video_mask, bucket)
    if parts.audio_vae_encoder is not None:
        audio = _encode_audio(parts, job.sound, job, whole=True)
        if data.audio_reference and job.clip.audio_reference is not None:
            voice = _encode_audio(parts, job.clip.audio_reference, job, whole=False)
        if job.audio_mask is not None:
            audio_mask = read_audio_mask(job.audio_mask, audio.shape[2])
    return Sample(
        video=video,
        audio=audio,
        context=context,
        fps=job.fps,
        reference=reference,
        audio_reference=voice,
        video_mask=video_mask,
        audio_mask=audio_mask,
    )


def _encode_audio(parts: Parts, path: Path, job: ClipJob, *, whole: bool) -> Tensor:
    """The beginning of a sound, no longer than the clip: (1, C, T, M) float32.

    With ``whole`` it is exactly as long, silence at its end; otherwise a shorter one stays so.
    """
    assert parts.audio_vae_encoder is not None
    duration_s = job.duration_s
    sound = read_audio(path, 0.0, duration_s, argument="clip").to_stereo()
    length = round(duration_s * AUDIO_LATENTS_PER_S)
    if whole:
        if job.bucket is None and not long_enough(sound.duration_s, duration_s):
            raise RequestError(
                f"it ends after {sound.duration_s:.2f} of {duration_s:g} s", hint="a whole sound"
            )
        sound = sound.fit(round(duration_s * sound.sampling_rate))
    else:
        length = min(length, max(1, round(sound.duration_s * AUDIO_LATENTS_PER_S)))
    with parts.memory.phase("encode audio"):
        return encode_sound(parts.audio_vae_encoder, sound, length, parts.device, parts.dtype).cpu()


def _encode_video(
    parts: Parts, path: Path, bucket: Bucket, scale: int = 1, kept: Sequence[int] | None = None
) -> Tensor:
    """The beginning of a clip at the size of the bucket, divided by ``scale``: (1, C, F, H, W) float32.

    Of all its frames those that are ``kept``, unless the file holds just as many.
    """
    encoder = parts.video_vae_encoder
    assert encoder is not None
    frames = read_video(path, frame_cap=bucket.frames, argument="clip").frames
    if kept is not None and len(frames) == bucket.frames:
        frames = frames[list(kept)]
    if len(frames) != (bucket.frames if kept is None else len(kept)):
        raise RequestError(f"it ends after {len(frames)} of {bucket.frames} frames", hint="a whole clip")
    pixels = fit_frames(frames, bucket.height // scale, bucket.width // scale)
    with parts.memory.phase("encode inputs 1") as phase:
        tiling = TileConfig(**phase.settings)
        return encode_tiled(encoder, pixels, tiling, device=parts.device, dtype=parts.dtype).float().cpu()
