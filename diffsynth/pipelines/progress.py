"""What a running pipeline tells its caller; progress, preview and cancel all hang on this one protocol."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
    """One step of a phase is done: ``done == 0`` announces the phase, ``done == total`` ends it.

    ``unit`` says what is counted.  The conversion of a network, phase ``convert dit`` for instance, counts
    bytes, and a step of it is a block.
    """

    phase: str
    done: int
    total: int
    denoised: Denoised | None = None
    unit: Literal["step", "byte"] = "step"


OnProgress = Callable[[Progress], None]
"""Called after every step.  Raise :class:`~diffsynth.errors.Cancelled` in it to stop the run."""


def ignore(progress: Progress) -> None:
    """The listener of a caller who does not want to know."""


ProgressBar = Callable[[Sequence[float]], Iterable[float]]
"""Wraps a list and yields its items, as ``tqdm`` does; ``lambda x: x`` shows nothing.  The items are the
timesteps of a denoising loop, or the hundredths of a conversion."""


def with_bar(bar: ProgressBar, on_progress: OnProgress) -> OnProgress:
    """A listener that moves ``bar`` along denoising loops and conversions and passes everything on.

    Where the bar has a ``set_description``, as that of ``tqdm`` has, a conversion is called by its name.
    """
    ticks: Iterator[float] = iter(())
    taken = 0

    def listen(progress: Progress) -> None:
        nonlocal ticks, taken
        items = _items(progress)
        if items is not None:
            if progress.done == 0:
                shown, taken = bar(items), 0
                if progress.unit == "byte" and hasattr(shown, "set_description"):
                    shown.set_description(progress.phase)
                ticks = iter(shown)
            # An item is yielded before its work begins: a bar counts it when the next one is asked for.
            while taken <= len(items) * progress.done // progress.total:
                next(ticks, None)
                taken += 1
        on_progress(progress)

    return listen


def _items(progress: Progress) -> list[float] | None:
    """What a bar is moved along; None for a phase that has none."""
    if progress.denoised is not None:
        return [1000 * sigma for sigma in progress.denoised.stage.levels]
    return [float(percent) for percent in range(100)] if progress.unit == "byte" else None
