"""Distils guidance and many steps into the eight fixed steps of the released distilled models, as a LoRA.

The teacher, the trained transformer with guidance, goes from every noise level of the list to the next one in
several small steps; the student, the same transformer with the LoRA, learns the mean velocity of that way.
Starting points are noised clips and those to which the student itself comes.  The second of two stages uses
the end of the same list.

B clips, T tokens of a stream, K levels of a round.
"""

import copy
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.conditioning.text import PromptContext, PromptTokenizer
from diffsynth.lora.official import official_metadata, official_tensors
from diffsynth.models.ltx2.transformer import LTX2Transformer, Modality
from diffsynth.sampling.schedules import DISTILLED_STAGE_1, DISTILLED_STAGE_2
from diffsynth.training.adapters import TrainableLora
from training.nano.dit import GEMMA, NanoTransformer
from training.nano.latents import FOLDER, Clips, sides
from training.nano.parts import working_dtype
from training.nano.prompts import token_ids
from training.nano.samples import Course, judged
from training.nano.transformer import Places

NAME = "distilled_lora"
SIGMAS = DISTILLED_STAGE_1
_SECOND = SIGMAS.index(DISTILLED_STAGE_2[0])
"""Where a second stage begins."""
_TINY = SIGMAS.index(0.975)
"""The steps before this one hardly move anything: one of them is learnt in a round."""
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")

Pair = tuple[Tensor, Tensor]
"""Of video and audio, (B, T, C) each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillSettings:
    """Size and training of the LoRA."""

    rank: int = 10
    steps: int | None = None
    """Rounds; None: as many as ``minutes`` allow."""
    minutes: float = 4.0
    batch: int = 32
    updates: int = 2
    """Steps of the optimiser in a round."""
    substeps: tuple[int, ...] = (1, 1, 1, 1, 2, 4, 6, 8)
    """Of the teacher, for every step of the list."""
    scale: float = 3.0
    """Of the guidance."""
    learning_rate: float = 2e-3
    warm_up: int = 20
    own: float = 0.6
    """Share of the rounds that begin at noise and go on with the student's own steps; the others begin at
    noised clips, half of them where a second stage begins."""
    first_frame: float = 0.2
    """Share of the rounds that give the first latent frame."""
    report_s: float = 10.0
    judge_s: float = 90.0
    judged_clips: int = 64
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """Clips of a round and what is said about them."""

    clean: Pair
    noise: Pair
    masks: Pair
    """1 where tokens are generated: (1, 1 or T, 1)."""
    positive: PromptContext
    negative: PromptContext
    positions: Pair

    @property
    def count(self) -> int:
        """B."""
        return len(self.clean[0])

    def noised(self, sigma: float) -> Pair:
        """The clips at a noise level, with what is given as it is."""
        video, audio = (
            torch.lerp(clean, noise, mask * sigma)
            for clean, noise, mask in zip(self.clean, self.noise, self.masks, strict=True)
        )
        return video, audio

    def moved(self, state: Pair, velocities: Pair, change: float) -> Pair:
        """A step of Euler's, by a change of the noise level; what is given stays."""
        video, audio = (
            x + mask * velocity * change
            for x, velocity, mask in zip(state, velocities, self.masks, strict=True)
        )
        return video, audio


def velocities(
    network: LTX2Transformer,
    problem: Problem,
    state: Pair,
    sigmas: Tensor,
    context: PromptContext,
) -> Pair:
    """What the network predicts for a state, float32.

    Args:
        network: teacher or student.
        problem: masks and positions of the state.
        state: as many rows as ``sigmas`` and ``context``.
        sigmas: noise level of every row.
        context: of every row.
    """
    dtype = network.patchify_proj.weight.dtype
    modalities = [
        Modality(
            latent=x.to(dtype),
            sigma=sigmas,
            timesteps=mask * sigmas[:, None, None],
            positions=positions,
            context=rows,
        )
        for x, mask, positions, rows in zip(
            state, problem.masks, problem.positions, (context.video, context.audio), strict=True
        )
    ]
    video, audio = network(*modalities)
    assert video is not None, "both streams go in and come out"
    assert audio is not None, "both streams go in and come out"
    return video.float(), audio.float()


@torch.no_grad()
def taught(
    teacher: LTX2Transformer, problem: Problem, state: Pair, index: int, settings: DistillSettings
) -> Pair:
    """Mean velocity of the teacher's way from a state at level ``index`` of the list to the next level."""
    start, end, count = SIGMAS[index], SIGMAS[index + 1], settings.substeps[index]
    both = PromptContext(
        torch.cat([problem.positive.video, problem.negative.video]),
        torch.cat([problem.positive.audio, problem.negative.audio]),
    )
    x, rows = state, problem.count
    for step in range(count):
        sigma = start + (end - start) * step / count
        sigmas = problem.clean[0].new_full((2 * rows,), sigma)
        twice = torch.cat([x[0], x[0]]), torch.cat([x[1], x[1]])
        video, audio = velocities(teacher, problem, twice, sigmas, both)
        guided = (
            torch.lerp(video[rows:], video[:rows], settings.scale),
            torch.lerp(audio[rows:], audio[:rows], settings.scale),
        )
        x = problem.moved(x, guided, (end - start) / count)
    return (x[0] - state[0]) / (end - start), (x[1] - state[1]) / (end - start)


@torch.no_grad()
def starting_points(
    student: LTX2Transformer, problem: Problem, choice: random.Random, own: float
) -> dict[int, Pair]:
    """States by their place in the list: the student's own, or noised clips and where it goes from them."""
    drawn = choice.random()
    if drawn > own and drawn > (1 + own) / 2:
        return {index: problem.noised(SIGMAS[index]) for index in _levels(choice)}
    first = 0 if drawn <= own else _SECOND
    wanted, found = _levels(choice), {}
    state = problem.noised(SIGMAS[first])
    for index in range(first, len(SIGMAS) - 1):
        if index in wanted:
            found[index] = state
        sigmas = problem.clean[0].new_full((problem.count,), SIGMAS[index])
        step = velocities(student, problem, state, sigmas, problem.positive)
        state = problem.moved(state, step, SIGMAS[index + 1] - SIGMAS[index])
    return found


def _levels(choice: random.Random) -> list[int]:
    return [choice.randrange(_TINY), *range(_TINY, len(SIGMAS) - 1)]


def loss_of(
    student: LTX2Transformer, problem: Problem, states: dict[int, Pair], targets: dict[int, Pair]
) -> Tensor:
    """Mean squared errors of video and audio at every level, (2, K)."""
    context, repeats = problem.positive, len(states)
    sigmas = torch.cat([problem.clean[0].new_full((problem.count,), SIGMAS[index]) for index in states])
    rows = PromptContext(context.video.repeat(repeats, 1, 1), context.audio.repeat(repeats, 1, 1))
    stacked = _stacked(list(states.values()))
    predicted = velocities(student, problem, stacked, sigmas, rows)
    errors = [
        ((p - t).square() * mask).mean(dim=2).reshape(repeats, -1).mean(dim=1) / mask.mean()
        for p, t, mask in zip(predicted, _stacked(list(targets.values())), problem.masks, strict=True)
    ]
    return torch.stack(errors)


def _stacked(pairs: Sequence[Pair]) -> Pair:
    return torch.cat([video for video, _ in pairs]), torch.cat([audio for _, audio in pairs])


class Problems:
    """Draws the problems of the rounds."""

    def __init__(
        self, settings: DistillSettings, network: NanoTransformer, folder: Path, device: torch.device
    ) -> None:
        self._settings, self._network, self._device = settings, network, device
        self._clips = [Clips.load(folder / FOLDER, side, device) for side in sides(folder / FOLDER)]
        self._places = Places(self._clips, device)
        self._random = torch.Generator(device).manual_seed(settings.seed)
        ids, counts = token_ids(PromptTokenizer(folder / GEMMA), [""], self._clips[0].ids.shape[2])
        with torch.no_grad():
            self._empty = network.text(ids.to(device), counts.to(device))

    @torch.no_grad()
    def draw(self, choice: random.Random) -> Problem:
        """Half of the rounds have the largest size."""
        shares = [1.0] * (len(self._clips) - 1) + [max(1.0, len(self._clips) - 1.0)]
        (clips,) = choice.choices(self._clips, shares)
        count = min(self._settings.batch, len(clips.video))
        rows = torch.randint(len(clips.video), (count,), generator=self._random, device=self._device)
        ids = clips.ids[rows, choice.randrange(clips.ids.shape[1] - 1)].long()
        counts = (ids > 0).sum(dim=1)
        clean = clips.video[rows].float(), clips.audio[rows].float()
        noise = [torch.randn(x.shape, generator=self._random, device=self._device) for x in clean]
        masks = [x.new_ones(1, 1, 1) for x in clean]
        if choice.random() < self._settings.first_frame:
            _, height, width = clips.grid
            masks[0] = masks[0].repeat(1, clean[0].shape[1], 1)
            masks[0][:, : height * width] = 0.0
        return Problem(
            clean=clean,
            noise=(noise[0], noise[1]),
            masks=(masks[0], masks[1]),
            positive=PromptContext(*self._network.text(ids, counts)),
            negative=PromptContext(*(context.expand(count, -1, -1) for context in self._empty)),
            positions=(self._places.video[clips.side], self._places.audio[clips.side]),
        )


class Distillation:
    """Teacher, student, and the optimiser of its LoRA."""

    def __init__(self, settings: DistillSettings, folder: Path, device: torch.device) -> None:
        self.settings = settings
        self.network = NanoTransformer.load(folder, device, working_dtype(device))
        self.teacher = copy.deepcopy(self.network.transformer)
        generator = torch.Generator().manual_seed(settings.seed)
        rank = settings.rank
        student = self.network.transformer
        self.lora = TrainableLora(student, _TARGETS, rank=rank, alpha=rank, generator=generator)
        self.problems = Problems(settings, self.network, folder, device)
        self.optimizer = torch.optim.AdamW(
            self.lora.parameters().values(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )

    def round(self, number: int, share: float) -> tuple[list[int], Tensor]:
        """States, targets, and some steps.

        Args:
            number: of the round; with the seed it decides what is drawn.
            share: of the training that is done.

        Returns: places in the list, and the errors of the first step there, (2, K).
        """
        s, choice = self.settings, random.Random((self.settings.seed << 32) + number)
        problem = self.problems.draw(choice)
        student = self.network.transformer
        states = starting_points(student, problem, choice, s.own)
        targets = {index: taught(self.teacher, problem, x, index, s) for index, x in states.items()}
        rate = min(1.0, (number + 1) / s.warm_up) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
        first = None
        for _ in range(s.updates):
            errors = loss_of(student, problem, states, targets)
            first = errors.detach() if first is None else first
            self.optimizer.param_groups[0]["lr"] = rate * s.learning_rate
            self.optimizer.zero_grad()
            torch.autograd.backward(errors.mean(dim=1).sum())
            self.optimizer.step()
        assert first is not None, "a round has at least one step"
        return list(states), first


def train(settings: DistillSettings, folder: Path, device: str) -> None:
    """The stage: write ``distilled_lora.safetensors`` and ``distilled_lora.json``."""
    run = Distillation(settings, folder, torch.device(device))
    count = sum(p.numel() for p in run.lora.parameters().values())
    print(f"{NAME}: {count:,} parameters over {len(run.lora.layers)} layers", flush=True)
    begun = told = tried = time.monotonic()
    sums, counts = torch.zeros(2, len(SIGMAS) - 1, device=device), [0] * (len(SIGMAS) - 1)
    number, share = 0, 0.0
    courses = [Course(distilled=True), Course(side=128, distilled=True)]
    while share < 1:
        levels, errors = run.round(number, share)
        sums[:, levels] += errors
        for level in levels:
            counts[level] += 1
        number, now = number + 1, time.monotonic()
        share = (now - begun) / (settings.minutes * 60) if settings.steps is None else number / settings.steps
        if now - told > settings.report_s or share >= 1:
            means = sums.cpu() / torch.tensor(counts).clamp(min=1)
            video, audio = (" ".join(f"{value:.4f}" for value in row) for row in means.tolist())
            print(f"{NAME} {number} video {video} audio {audio} {now - begun:.0f} s", flush=True)
            told, counts = now, [0] * len(counts)
            sums.zero_()
        if now - tried > settings.judge_s and share < 1:
            judged(run.network, folder, device, count=settings.judged_clips, courses=courses[:1])
            tried = time.monotonic()
    quality = judged(run.network, folder, device, count=settings.judged_clips, courses=courses)
    record = {"settings": asdict(settings), "rounds": number, "quality": quality}
    tensors = official_tensors(run.lora.updates())
    save_file(tensors, folder / f"{NAME}.safetensors", official_metadata("LTX-2", {"rank": settings.rank}))
    notes = record | {"parameters": count, "seconds": round(time.monotonic() - begun)}
    (folder / f"{NAME}.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
