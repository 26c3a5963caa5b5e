"""Trains the diffusion transformer, its connectors and its text model together, from captions.

B clips, T tokens of a stream.  Noise levels are those of few tokens: a logit-normal density, around
sigmoid(0.8) for small pictures, and a tenth uniform; both streams share the level, as when they are sampled.
"""

import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.conditioning.tokens import audio_positions, video_positions
from diffsynth.models.ltx2.transformer import Modality
from diffsynth.nano.world import NUM_FORMS
from training.nano.dit import GEMMA, NAME, NanoTransformer, TransformerSizes
from training.nano.latents import FOLDER, FPS, Clips, sides
from training.nano.loop import Loop
from training.nano.muon import Average, MuonAdamW, learning_rate_scale
from training.nano.parts import working_dtype
from training.nano.prompts import TextSettings
from training.nano.samples import Course, judged

_ADAMW_NAMES = ("table", "adaln", "patchify_proj", "proj_out", "caption_projection", "embed", "registers")
_AVERAGE_EVERY = 4
"""Steps: the running average reads every parameter on its own, in many small launches."""
_TRIED, _TIMED = 20, 60
"""Steps before the number of steps is planned."""
_EMPTY = 2
"""Id of ``<bos>``, which is all of an empty caption."""
_FRAMED_SHARE = 0.03
_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSettings:
    """Sizes and training of the transformer."""

    sizes: TransformerSizes = field(default_factory=TransformerSizes)
    text: TextSettings = field(default_factory=TextSettings)
    steps: int | None = None
    """None: as many as ``minutes`` allow, by the time that steps take."""
    minutes: float = 11.0
    batches: Mapping[int, int] = field(default_factory=lambda: {256: 128, 192: 192, 128: 256})
    """Side in pixels -> clips of a step."""
    shares: Mapping[int, float] = field(default_factory=lambda: {256: 0.6, 192: 0.1, 128: 0.3})
    """Side in pixels -> share of the steps."""
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warm_up: int = 150
    flat: float = 0.5
    floor: float = 0.02
    average: float = 0.9990
    logit_mean: float = 0.8
    """Of the noise levels at 64 tokens; half the logarithm of the number of tokens is added: as many more
    tokens show the same things, as much more noise it takes to hide them."""
    uniform: float = 0.1
    empty: float = 0.1
    first_frame: float = 0.25
    """Share of the steps that give the first latent frame."""
    given: float = 0.04
    """Share of the steps that give the whole sound, and of those that give the whole video."""
    report_s: float = 20.0
    sample_s: float = 120.0
    """Seconds between samples that are judged."""
    judged_clips: int = 64
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
    """Draws batches: what kind they are on the host, all numbers on the device; each step has its seed."""

    def __init__(self, settings: TransformerSettings, clips: list[Clips], device: torch.device) -> None:
        self._settings, self._clips, self._device = settings, clips, device
        self._random = torch.Generator(device)

    def draw(self, step: int) -> Batch:
        """The batch of a step."""
        seed = (self._settings.seed << 32) + step
        choice = random.Random(seed)
        self._random.manual_seed(seed)
        shares = [self._settings.shares.get(c.side, 0.0) for c in self._clips]
        (clips,) = choice.choices(self._clips, shares if any(shares) else None)
        count = min(self._settings.batches.get(clips.side, 64), len(clips.video))
        kind, s = choice.random(), self._settings
        rows = torch.randint(len(clips.video), (count,), generator=self._random, device=self._device)
        ids, counts = self._captions(clips, rows)
        return Batch(
            clips=clips,
            video=clips.video[rows].float(),
            audio=clips.audio[rows].float(),
            ids=ids,
            counts=counts,
            sigma=self.sigmas(count, clips.video.shape[1]),
            first_frame=kind < s.first_frame,
            given="audio" if kind > 1 - s.given else "video" if kind > 1 - 2 * s.given else None,
        )

    def sigmas(self, count: int, tokens: int) -> Tensor:
        """(count,) float32 noise levels."""
        mean = self._settings.logit_mean + 0.5 * math.log(tokens / _TOKENS)
        levels = torch.sigmoid(self._normal(count) + mean)
        return torch.where(self._uniform(count) < self._settings.uniform, self._uniform(count), levels)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers that go with the batch drawn last."""
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


class AveragingOptimizer(MuonAdamW):
    """Keeps a running average of the network beside the optimiser; both make up the state."""

    def __init__(self, network: NanoTransformer, settings: TransformerSettings) -> None:
        super().__init__(
            network.named_parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adamw_names=_ADAMW_NAMES,
        )
        self.average = Average(network, settings.average**_AVERAGE_EVERY)
        self._steps = 0

    def step(self, scale: float = 1.0) -> None:
        """See :class:`MuonAdamW`."""
        super().step(scale)
        self._steps += 1
        if self._steps % _AVERAGE_EVERY == 0:
            self.average.update()

    def state_dict(self) -> dict[str, Any]:
        """See :class:`MuonAdamW`."""
        return super().state_dict() | {"average": self.average.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`MuonAdamW`."""
        super().load_state_dict(state)
        self.average.load_state_dict(state["average"])
        self._steps = int(state["steps"])


class Training:
    """Network, optimiser and data of a run."""

    def __init__(self, settings: TransformerSettings, folder: Path, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.folder, self.device = settings, folder, device
        tokenizer = PromptTokenizer(folder / GEMMA)
        vocab_size = tokenizer.tokenizer.get_vocab_size()
        clips = [Clips.load(folder / FOLDER, side, device) for side in sides(folder / FOLDER)]
        channels = {"video_channels": clips[0].video.shape[2], "audio_channels": clips[0].audio.shape[2]}
        network = NanoTransformer.of_sizes(replace(settings.sizes, **channels), settings.text, vocab_size)
        self.network = network.to(device, working_dtype(device))
        self.batches, self.places = Batches(settings, clips, device), Places(clips, device)
        self.optimizer = AveragingOptimizer(self.network, settings)
        self._sums, self._count = torch.zeros(2, device=device), 0
        self._judged_at = time.monotonic()

    def loss_at(self, step: int, steps: int) -> Tensor:
        """Of video and audio together."""
        batch = self.batches.draw(step)
        noise = self.batches.noise(batch.video), self.batches.noise(batch.audio)
        both = torch.stack(losses(self.network, batch, self.places, noise))
        self._sums += both.detach()
        self._count += 1
        return both.sum()

    def schedule(self, step: int, steps: int) -> float:
        """Of the learning rates."""
        s = self.settings
        return learning_rate_scale(step, steps, warm_up=s.warm_up, flat=s.flat, floor=s.floor)

    def report(self) -> str:
        """Losses since the last report; now and then the percentages of samples."""
        video, audio = (self._sums / max(self._count, 1)).tolist()
        self._sums.zero_()
        self._count = 0
        if time.monotonic() - self._judged_at > self.settings.sample_s:
            self.judge(Course(steps=12))
            self._judged_at = time.monotonic()
        return f"mean of video {video:.4f} audio {audio:.4f}"

    def judge(self, *courses: Course) -> dict[str, dict[str, float]]:
        """Percentages of held-out prompts by the averaged weights, where all that it takes is there."""
        self.optimizer.average.swap()
        count = self.settings.judged_clips
        found = judged(self.network, self.folder, self.device, count=count, courses=courses)
        self.optimizer.average.swap()
        return found

    def plan(self) -> int:
        """How many steps there will be.

        Raises:
            ValueError: on the CPU, where steps are not timed, without a number in the settings.
        """
        if self.settings.steps is not None:
            return self.settings.steps
        if self.device.type != "cuda":
            raise ValueError("the number of steps is planned on CUDA alone; elsewhere it must be given")
        begun = 0.0
        for step in range(_TRIED + _TIMED):
            if step == _TRIED:
                torch.cuda.synchronize()
                begun = time.monotonic()
            torch.autograd.backward(self.loss_at(step, 1))
            self.optimizer.step(0.0)  # takes its time and changes nothing
        torch.cuda.synchronize()
        mean = (time.monotonic() - begun) / _TIMED
        steps = int(self.settings.minutes * 60 / mean)
        print(f"{NAME}: {1000 * mean:.1f} ms/step, {steps} steps", flush=True)
        return steps


def train(settings: TransformerSettings, folder: Path, device: str) -> None:
    """The stage: write ``transformer.safetensors``, ``transformer.json`` and the weights of ``gemma/``.

    A run that broke off goes on where it last told of itself.
    """
    begun = time.monotonic()
    run = Training(settings, folder, torch.device(device))
    count = sum(p.numel() for p in run.network.transformer.parameters())
    text = sum(p.numel() for p in run.network.text.parameters())
    print(f"{NAME}: {count:,} parameters, text side {text:,}", flush=True)
    state = folder / "partial" / f"{NAME}.pt"
    loop = Loop(
        name=NAME,
        steps=1 if state.exists() else run.plan(),
        schedule=run.schedule,
        state=state,
        report=run.report,
        report_s=settings.report_s,
    )
    loop.run(run.optimizer, run.loss_at)
    run.optimizer.average.swap()
    run.network.save(folder)
    courses = [Course(), Course(side=192), Course(side=128)]
    quality = judged(run.network, folder, device, count=settings.judged_clips, courses=courses)
    notes = {
        "config": {NAME: run.network.section},
        "parameters": count,
        "settings": asdict(settings),
        "quality": quality,
        "seconds": round(time.monotonic() - begun),
    }
    (folder / f"{NAME}.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    state.unlink(missing_ok=True)
