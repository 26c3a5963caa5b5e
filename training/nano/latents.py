"""The data of the transformer: clips of the world as normalised latents, one file per size.

N clips, T video tokens of C channels, A audio tokens of M values, K caption forms of L token ids each.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.conditioning.tokens import Grid, audio_latent_frames, patchify, video_latent_shape
from diffsynth.loader import NetworkKind
from diffsynth.models.ltx2.mel import log_mel
from diffsynth.nano.world import FRAMED, NUM_FORMS, VOCABULARY, Description
from diffsynth.pipelines.encode_inputs import fit_audio_latent
from training.nano.clips import Scenes
from training.nano.dit import GEMMA
from training.nano.parts import load_part, working_dtype
from training.nano.prompts import TextSettings, token_ids, write_tokenizer

FRAMES, FPS = 25, 24.0
FOLDER = "latents"
_TELL_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSettings:
    """How many clips of which side are encoded."""

    counts: Mapping[int, int] = field(default_factory=lambda: {256: 32768, 192: 6144, 128: 16384})
    """Side in pixels -> clips."""
    batch: int = 64
    seed: int = 1000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clips:
    """Encoded clips of one side, on one device."""

    side: int
    video: Tensor
    """(N, T, C), normalised."""
    audio: Tensor
    """(N, A, M), normalised."""
    ids: Tensor
    """(N, K, L) uint8, padding on the right; the last form begins with the word of the framed style, which
    means nothing to the base model."""
    counts: Tensor
    """(N, K) uint8 valid tokens."""

    @property
    def grid(self) -> Grid:
        """(F, H, W) of the video latent."""
        return video_latent_shape(FRAMES, self.side, self.side)

    def save(self, folder: Path) -> None:
        """Write the file of this side."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"video": self.video, "audio": self.audio, "ids": self.ids, "counts": self.counts}
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, _path(folder, self.side))

    @classmethod
    def load(cls, folder: Path, side: int, device: torch.device | str) -> Self:
        """Read the file of a side."""
        return cls(side=side, **load_file(_path(folder, side), device=str(device)))


def sides(folder: Path) -> list[int]:
    """Sides that have files in a folder."""
    return sorted(int(path.stem) for path in folder.glob("*.safetensors"))


def encode(settings: LatentSettings, folder: Path, device: str) -> None:
    """The stage: write ``latents/SIDE.safetensors`` for every side, and the tokenizer."""
    write_tokenizer(folder / GEMMA, VOCABULARY)
    tokenizer = PromptTokenizer(folder / GEMMA)
    for side, count in settings.counts.items():
        if _path(folder / FOLDER, side).exists():
            continue
        clips = _encode_side(settings, folder, side, count, tokenizer, torch.device(device))
        clips.save(folder / FOLDER)
        values = clips.video.float(), clips.audio.float()
        print(
            f"latents {side} px: {count} clips, deviation of video {values[0].std():.3f}, "
            f"of audio {values[1].std():.3f}",
            flush=True,
        )


@torch.inference_mode()
def _encode_side(
    settings: LatentSettings,
    folder: Path,
    side: int,
    count: int,
    tokenizer: PromptTokenizer,
    device: torch.device,
) -> Clips:
    dtype = working_dtype(device)
    video_encoder = load_part(folder, NetworkKind.VIDEO_ENCODER, device, dtype)
    audio_encoder = load_part(folder, NetworkKind.AUDIO_ENCODER, device, dtype)
    mel = audio_encoder.config.mel
    samples, frames = round(FRAMES / FPS * mel.sampling_rate), audio_latent_frames(FRAMES, FPS)
    video, audio, descriptions = [], [], []
    told = time.monotonic()
    for start in range(0, count, settings.batch):
        seed = settings.seed * 1_000_003 + side * 100_003 + start
        scenes = Scenes.draw(min(settings.batch, count - start), seed=seed, device=device)
        pictures = scenes.video(side, FRAMES, FPS).to(dtype)
        spectrogram = log_mel(scenes.sound(samples, mel.sampling_rate), mel).to(dtype)
        video.append(patchify(video_encoder(pictures)).bfloat16())
        audio.append(patchify(fit_audio_latent(audio_encoder(spectrogram), frames)).bfloat16())
        descriptions += scenes.descriptions
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            print(f"latents {side} px: {len(descriptions)} of {count}", flush=True)
    ids, counts = caption_ids(tokenizer, descriptions)
    return Clips(side=side, video=torch.cat(video), audio=torch.cat(audio), ids=ids, counts=counts)


def caption_ids(tokenizer: PromptTokenizer, descriptions: list[Description]) -> tuple[Tensor, Tensor]:
    """(N, K, L) and (N, K) uint8, see :class:`Clips`."""
    length = TextSettings().length
    captions = []
    for number, description in enumerate(descriptions):
        forms = [description.caption(form) for form in range(NUM_FORMS)]
        captions += [*forms, f"{FRAMED} {forms[number % NUM_FORMS]}"]
    # Captions repeat, and each tokenizer call costs a tenth of a millisecond.
    known = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    ids, counts = token_ids(tokenizer, list(known), length)
    rows = torch.tensor([known[caption] for caption in captions]).view(len(descriptions), -1)
    return ids.to(torch.uint8)[rows], counts.to(torch.uint8)[rows]


def _path(folder: Path, side: int) -> Path:
    return folder / f"{side}.safetensors"
