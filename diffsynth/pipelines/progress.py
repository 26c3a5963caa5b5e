"""What a running pipeline tells its caller; progress, preview and cancel all hang on this one protocol."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.tokens import unpatchify
from diffsynth.pipelines.stages import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoised:
    """Where a denoising loop stands: the states after a step and the clean estimates of that step.

    Before the first step (``sigma`` None) the states are the noisy ones it starts from, without estimates.
    """

    stage: Stage
    video: ModalityState | None
    audio: ModalityState | None
    sigma: float | None = None
    video_x0: Tensor | None = None
    audio_x0: Tensor | None = None

    def preview(self) -> Tensor | None:
        """The estimated clean video latent (1, C, F, H, W), normalised: good from the first step on."""
        if self.video is None or self.video_x0 is None:
            return None
        return unpatchify(self.video_x0[:, : self.video.target_tokens], self.video.target_shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One step of a phase is done: ``done == 0`` announces the phase, ``done == total`` ends it."""

    phase: str
    done: int
    total: int
    denoised: Denoised | None = None


OnProgress = Callable[[Progress], None]
"""Called after every step.  Raise :class:`~diffsynth.errors.Cancelled` in it to stop the run."""


def ignore(progress: Progress) -> None:
    """The listener of a caller who does not want to know."""


ProgressBar = Callable[[Sequence[float]], Iterable[float]]
"""Wraps the list of timesteps and yields them, as ``tqdm`` does; ``lambda x: x`` shows nothing."""


def with_bar(bar: ProgressBar, on_progress: OnProgress) -> OnProgress:
    """A listener that moves ``bar`` along the timesteps of every denoising loop and passes everything on."""
    ticks: Iterator[float] = iter(())

    def listen(progress: Progress) -> None:
        nonlocal ticks
        if progress.denoised is not None:
            if progress.done == 0:
                ticks = iter(bar([1000 * sigma for sigma in progress.denoised.stage.sigmas[:-1].tolist()]))
            next(ticks, None)
        on_progress(progress)

    return listen
