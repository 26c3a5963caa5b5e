"""Trains the diffusion transformer, its connectors and its text model together, from captions.

B clips, T tokens of a stream.  Noise levels are those of few tokens: a logit-normal density around
sigmoid(0.8), a tenth uniform; both streams share the level, as they do when they are sampled.
"""

import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.conditioning.tokens import audio_positions, video_positions
from diffsynth.models.ltx2.transformer import Modality
from diffsynth.nano.world import NUM_FORMS
from training.nano.dit import GEMMA, NAME, NanoTransformer, TransformerSizes
from training.nano.latents import FOLDER, FPS, Clips, sides
from training.nano.muon import Average, MuonAdamW, learning_rate_scale
from training.nano.parts import working_dtype
from training.nano.prompts import TextSettings

_ADAMW_NAMES = ("table", "adaln", "patchify_proj", "proj_out", "caption_projection", "embed", "registers")
_TELL_EVERY_S = 5.0
_EMPTY = 2
"""Id of ``<bos>``, which is all of an empty caption."""
_FRAMED_SHARE = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSettings:
    """Sizes and training of the transformer."""

    sizes: TransformerSizes = field(default_factory=TransformerSizes)
    text: TextSettings = field(default_factory=TextSettings)
    steps: int = 14000
    minutes: float = 12.0
    """The schedule ends no later than this: after a tenth of the steps the rest is counted anew."""
    batches: Mapping[int, int] = field(default_factory=lambda: {256: 128, 192: 192, 128: 256})
    """Side in pixels -> clips of a step."""
    shares: Mapping[int, float] = field(default_factory=lambda: {256: 0.6, 192: 0.1, 128: 0.3})
    """Side in pixels -> share of the steps."""
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warm_up: int = 150
    flat: float = 0.5
    average: float = 0.9990
    logit_mean: float = 0.8
    uniform: float = 0.1
    empty: float = 0.1
    first_frame: float = 0.25
    """Share of the steps that give the first latent frame."""
    given: float = 0.04
    """Share of the steps that give the whole sound, and of those that give the whole video."""
    sample_every: int = 2000
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Clips of one size, at their noise levels.

    ``first_frame`` gives the first latent frame, ``given`` names a stream that is given as a whole.
    """

    clips: Clips
    video: Tensor
    audio: Tensor
    ids: Tensor
    counts: Tensor
    sigma: Tensor
    first_frame: bool = False
    given: str | None = None


class Batches:
    """Draws batches: what kind they are on the host, all numbers on the device."""

    def __init__(self, settings: TransformerSettings, clips: list[Clips], device: torch.device) -> None:
        self._settings, self._clips, self._device = settings, clips, device
        self._choice = random.Random(settings.seed)
        self._random = torch.Generator(device).manual_seed(settings.seed)

    def draw(self) -> Batch:
        """The next batch."""
        shares = [self._settings.shares.get(c.side, 0.0) for c in self._clips]
        (clips,) = self._choice.choices(self._clips, shares if any(shares) else None)
        count = min(self._settings.batches.get(clips.side, 64), len(clips.video))
        kind, s = self._choice.random(), self._settings
        rows = torch.randint(len(clips.video), (count,), generator=self._random, device=self._device)
        ids, counts = self._captions(clips, rows)
        return Batch(
            clips=clips,
            video=clips.video[rows].float(),
            audio=clips.audio[rows].float(),
            ids=ids,
            counts=counts,
            sigma=self.sigmas(count),
            first_frame=kind < s.first_frame,
            given="audio" if kind > 1 - s.given else "video" if kind > 1 - 2 * s.given else None,
        )

    def sigmas(self, count: int) -> Tensor:
        """(count,) float32 noise levels."""
        levels = torch.sigmoid(self._normal(count) + self._settings.logit_mean)
        return torch.where(self._uniform(count) < self._settings.uniform, self._uniform(count), levels)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers."""
        return self._normal(*like.shape)

    def _captions(self, clips: Clips, rows: Tensor) -> tuple[Tensor, Tensor]:
        count = len(rows)
        form = (self._uniform(count) * NUM_FORMS).long()
        form = torch.where(self._uniform(count) < _FRAMED_SHARE, NUM_FORMS, form)
        ids, counts = clips.ids[rows, form].long(), clips.counts[rows, form].long()
        empty = self._uniform(count) < self._settings.empty
        nothing = torch.zeros_like(ids[:1])
        nothing[:, 0] = _EMPTY
        return torch.where(empty[:, None], nothing, ids), counts.masked_fill(empty, 1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self._device)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._random, device=self._device)


class Places:
    """Positions of the tokens, made once per size."""

    def __init__(self, clips: list[Clips], device: torch.device) -> None:
        self.video = {c.side: video_positions(c.grid, FPS).to(device) for c in clips}
        self.audio = {c.side: audio_positions(c.audio.shape[1]).to(device) for c in clips}


def losses(
    network: NanoTransformer, batch: Batch, places: Places, noise: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the velocities of video and audio over all that is generated.

    Args:
        network: in its own dtype.
        batch: what to learn.
        places: of its size.
        noise: of the shapes of video and audio.
    """
    dtype = network.transformer.patchify_proj.weight.dtype
    contexts = network.text(batch.ids, batch.counts)
    masks = _masks(batch)
    modalities = []
    for name, clean, drawn, mask, context, positions in zip(
        ("video", "audio"),
        (batch.video, batch.audio),
        noise,
        masks,
        contexts,
        (places.video[batch.clips.side], places.audio[batch.clips.side]),
        strict=True,
    ):
        timesteps = mask * batch.sigma[:, None, None]
        modalities.append(
            Modality(
                latent=torch.lerp(clean, drawn, timesteps).to(dtype),
                sigma=torch.zeros_like(batch.sigma) if batch.given == name else batch.sigma,
                timesteps=timesteps,
                positions=positions,
                context=context,
            )
        )
    velocities = network.transformer(*modalities)
    errors = [
        _error(predicted, drawn - clean, mask)
        for predicted, drawn, clean, mask in zip(
            velocities, noise, (batch.video, batch.audio), masks, strict=True
        )
    ]
    return errors[0], errors[1]


def _masks(batch: Batch) -> tuple[Tensor, Tensor]:
    """1 where tokens are generated, (1, 1 or T, 1) for video and audio."""
    video, audio = (batch.sigma.new_full((1, 1, 1), float(batch.given != n)) for n in ("video", "audio"))
    if batch.first_frame:
        _, rows, columns = batch.clips.grid
        video = video.repeat(1, batch.video.shape[1], 1)
        video[:, : rows * columns] = 0.0
    return video, audio


def _error(predicted: Tensor | None, target: Tensor, mask: Tensor) -> Tensor:
    assert predicted is not None, "a stream with tokens has velocities"
    error = ((predicted.float() - target).square().mean(dim=(0, 2), keepdim=True) * mask).sum()
    share = mask.mean().clamp(min=1e-8) * predicted.shape[1]
    return error / share


class Training:
    """Network, optimiser and data of a run."""

    def __init__(self, settings: TransformerSettings, folder: Path, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        tokenizer = PromptTokenizer(folder / GEMMA)
        vocab_size = tokenizer.tokenizer.get_vocab_size()
        network = NanoTransformer(settings.sizes, settings.text, vocab_size)
        self.network = network.to(device, working_dtype(device))
        clips = [Clips.load(folder / FOLDER, side, device) for side in sides(folder / FOLDER)]
        self.batches, self.places = Batches(settings, clips, device), Places(clips, device)
        self.optimizer = MuonAdamW(
            self.network.named_parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adamw_names=_ADAMW_NAMES,
        )
        self.average = Average(self.network, settings.average**_AVERAGE_EVERY)

    def step(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """One step; returns the losses of video and audio without waiting for the device."""
        s, batch = self.settings, self.batches.draw()
        noise = self.batches.noise(batch.video), self.batches.noise(batch.audio)
        video, audio = losses(self.network, batch, self.places, noise)
        (video + audio).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step(learning_rate_scale(step, steps, warm_up=s.warm_up, flat=s.flat))
        if step % _AVERAGE_EVERY == 0:
            self.average.update()
        return video.detach(), audio.detach()


_AVERAGE_EVERY = 4
"""The running average reads every parameter on its own: many small launches."""


def train(settings: TransformerSettings, folder: Path, device: str) -> None:
    """The stage: write ``transformer.safetensors``, ``transformer.json`` and the weights of ``gemma/``."""
    target = torch.device(device)
    run = Training(settings, folder, target)
    count = sum(p.numel() for p in run.network.transformer.parameters())
    text = sum(p.numel() for p in run.network.text.parameters())
    print(f"transformer: {count / 1e6:.2f} M parameters, text side {text / 1e6:.2f} M", flush=True)
    begun, steps, step = time.monotonic(), settings.steps, 0
    told, sums, since = begun, torch.zeros(2, device=target), 0
    while step < steps:
        sums += torch.stack(run.step(step, steps))
        step, since = step + 1, since + 1
        if time.monotonic() - told > _TELL_EVERY_S or step == steps:
            video, audio = (sums / since).tolist()
            taken = time.monotonic() - begun
            print(f"step {step}/{steps} video {video:.4f} audio {audio:.4f} {taken:.0f} s", flush=True)
            steps = _affordable(settings, step, steps, taken)
            told, since = time.monotonic(), 0
            sums.zero_()
        if settings.sample_every and step % settings.sample_every == 0 and step < steps:
            run.average.swap()
            _try_out(run, folder, target)
            run.average.swap()
    run.average.swap()
    run.network.save(folder)
    quality = _try_out(run, folder, target)
    notes = {"config": {NAME: run.network.section}, "settings": asdict(settings), "steps": steps}
    notes |= {"losses": {"video": video, "audio": audio}, "quality": quality}
    (folder / f"{NAME}.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def _affordable(settings: TransformerSettings, step: int, steps: int, taken: float) -> int:
    """Fewer steps where the whole would take too long, so that the schedule still ends at its end."""
    if step < settings.steps / 20:
        return steps
    return min(steps, max(step + 1, round(step * settings.minutes * 60 / taken)))


def _try_out(run: Training, folder: Path, device: torch.device) -> dict[str, float]:
    """Percentages of held-out prompts, where all that it takes is there."""
    from training.nano.samples import judged

    return judged(run.network, folder, device)
