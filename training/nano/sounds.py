"""The world's sounds for the audio networks: mel spectrograms and the waveforms they stand for.

B batch, M mel frames, S samples; 2 channels, 64 mel bins.
"""

import random
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from diffsynth.models.ltx2.mel import MelConfig, log_mel
from diffsynth.nano.world import Description, draw_description
from training.nano.clips import Scenes

MEL = MelConfig()
VOCODER_RATE = 24000
SAMPLES_PER_FRAME = MEL.hop_length * VOCODER_RATE // MEL.sampling_rate
FRAMES_1S, FRAMES_2S = 105, 205
"""Mel frames of the sound of 25 and of 49 pictures at 24 per second; both are 4L - 3."""

_SAMPLES_AFTER_LAST_FRAME = 27
"""25 pictures at 24 per second last 16667 samples, 27 more than the centre of the last frame."""

_KINDS = {"tone": 0.25, "beep": 0.25, "ping": 0.4, "silence": 0.1}
"""Shares in balanced draws.  In the world one sound in ten pings, and a ping is over in 50 ms: left at that,
its onset is the last thing to be learnt."""


@dataclass(frozen=True)
class Sounds:
    """A batch of stereo sounds, made louder or softer side by side.

    ``log_gains`` is (B, 2, 2): the natural logarithm of each channel's gain at the first and at the last
    sample, a straight line between them.
    """

    scenes: Scenes
    log_gains: Tensor

    @classmethod
    def draw(
        cls,
        count: int,
        *,
        seed: int,
        device: torch.device | str,
        gains: tuple[float, float] = (0.0, 0.0),
        share: float = 1.0,
        drifting: float = 0.0,
        held_out: bool = False,
        balanced: bool = False,
    ) -> Self:
        """Draw sounds of the world.

        Args:
            count: B.
            seed: the same seed draws the same sounds on every device.
            device: where the sounds are made.
            gains: range of the logarithm of the gains, drawn evenly.
            share: part of the sounds whose gains differ from 1.
            drifting: part of those whose gains change over time.
            held_out: only combinations that no network is trained on.
            balanced: kinds of sound by how hard they are to learn, for training, instead of by how often
                they come in the world.
        """
        generator = torch.Generator().manual_seed(seed)
        low, high = gains
        log_gains = low + (high - low) * torch.rand(count, 2, 2, generator=generator)
        constant = torch.rand(count, 1, generator=generator) >= drifting
        log_gains[..., 1] = torch.where(constant, log_gains[..., 0], log_gains[..., 1])
        log_gains *= torch.rand(count, 1, 1, generator=generator) < share
        if balanced:
            scenes = Scenes.of(_balanced(count, seed), seed=seed, device=device)
        else:
            scenes = Scenes.draw(count, seed=seed, device=device, held_out=held_out)
        return cls(scenes, log_gains.to(device))

    def waveform(self, num_frames: int, sample_rate: int) -> Tensor:
        """(B, 2, S) float32 of exactly ``num_frames`` mel frames of 10 ms, at ``sample_rate`` Hz."""
        num_samples = num_frames * MEL.hop_length * sample_rate // MEL.sampling_rate
        start, end = self.log_gains[..., :1], self.log_gains[..., 1:]
        time = torch.linspace(0, 1, num_samples, device=self.log_gains.device)
        return self.scenes.sound(num_samples, sample_rate) * torch.lerp(start, end, time).exp_()

    def mel(self, num_frames: int) -> Tensor:
        """(B, 2, num_frames, 64) natural-log mel magnitudes."""
        num_samples = MEL.hop_length * (num_frames - 1) + _SAMPLES_AFTER_LAST_FRAME
        return log_mel(self.waveform(num_frames, MEL.sampling_rate)[..., :num_samples], MEL)


def _balanced(count: int, seed: int) -> list[Description]:
    """Descriptions that are not held out, their kinds of sound drawn with the weights above."""
    source = random.Random(seed)
    kinds = source.choices(list(_KINDS), weights=list(_KINDS.values()), k=count)
    drawn = []
    for kind in kinds:
        description = draw_description(source)
        while description.sound != kind:
            description = draw_description(source)
        drawn.append(description)
    return drawn
