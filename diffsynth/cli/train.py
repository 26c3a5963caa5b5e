"""``diffsynth preprocess`` and ``diffsynth train``: clips -> samples -> an adapter, by one TOML file."""

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from diffsynth.cli import machine
from diffsynth.errors import Cancelled

if TYPE_CHECKING:
    from diffsynth.training.trainer import OnStep, TrainingStep

logger = logging.getLogger(__name__)

_ECHO_S = 5.0

Config: TypeAlias = Annotated[Path, typer.Argument(help="TOML file with the settings: docs/en/training.md")]


def preprocess(config: Config, quiet: machine.Quiet = False) -> None:
    """Encode clips for training.

    A second run makes only what is missing.
    """
    from diffsynth.cli.generate import phases
    from diffsynth.training.config_file import read_config
    from diffsynth.training.preprocess import preprocess as run

    try:
        settings = read_config(config)
        with phases(quiet) as on_progress:
            report = run(settings, on_progress)
    except KeyboardInterrupt as error:
        raise Cancelled("cancelled; what is done stays", hint="the same command to go on") from error
    logger.info(
        "%s: %d samples made, %d were there, %d clips left out",
        settings.data.folder,
        report.made,
        report.kept,
        len(report.broken),
    )


def train(
    config: Config,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last state in the output folder")
    ] = False,
    quiet: machine.Quiet = False,
) -> None:
    """Train a LoRA on encoded clips.

    Ctrl-C saves the state, and --resume goes on from there.  Several devices: torchrun --nproc-per-node N -m
    diffsynth train CONFIG.
    """
    from diffsynth.training.config_file import read_config
    from diffsynth.training.state import Checkpoints
    from diffsynth.training.trainer import train as run
    from diffsynth.training.workers import process_number

    quiet = quiet or process_number() > 0
    settings = read_config(config)
    try:
        with _bar(quiet) as show, _interruptible(show) as (on_step, should_stop):
            adapter = run(settings, resume=resume, on_step=on_step, should_stop=should_stop)
    except KeyboardInterrupt as error:
        states = Checkpoints(settings.output.folder).states()
        raise Cancelled(
            "cancelled, and not saved",
            hint=f"--resume to go on after step {max(states)}" if states else "the same command again",
        ) from error
    if process_number() == 0:
        logger.info("%s", adapter)


@contextmanager
def _interruptible(show: "OnStep") -> Iterator[tuple["OnStep", Callable[[], bool]]]:
    """Within the ``with`` block the first Ctrl-C only asks to stop, once the run has begun; a second one
    interrupts, and so does one while the model is read, when there is nothing to save.

    torchrun passes every Ctrl-C on, which the terminal has sent already: shortly after the first it is the
    same one.
    """
    from diffsynth.training.workers import process_count

    asked_s: float | None = None
    several = process_count() > 1
    echo_s, begun = (_ECHO_S if several else 0.0), several

    def on_step(step: "TrainingStep") -> None:
        nonlocal begun
        begun = True
        show(step)

    def ask(_: int, __: FrameType | None) -> None:
        nonlocal asked_s
        now_s = time.monotonic()
        if not begun:
            raise KeyboardInterrupt
        if asked_s is None:
            asked_s = now_s
            logger.warning("the run is saved after this step; Ctrl-C once more ends it at once")
        elif now_s - asked_s >= echo_s:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield on_step, lambda: asked_s is not None
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bar(quiet: bool) -> Iterator["OnStep"]:
    """A bar with the time left and the loss; it ends its line whatever happens."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm(), tqdm(desc="train", unit="step", file=sys.stderr, disable=quiet) as bar:

        def show(step: "TrainingStep") -> None:
            if not step.values:  # the beginning, which is not step 0 when a run goes on
                bar.reset(total=step.steps)
                bar.initial = bar.n = step.step
                bar.refresh()
                return
            bar.set_postfix(loss=f"{step.values['loss']:.4f}", refresh=False)
            bar.update()

        yield show
