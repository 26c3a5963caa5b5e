"""``diffsynth demo``: a clip of the nano model, and what can be seen and heard in it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth import nano
from diffsynth.cli import machine
from diffsynth.errors import Cancelled
from diffsynth.nano.world import PITCHES, PULSE_S, Description
from diffsynth.request import GenerateRequest

if TYPE_CHECKING:
    from diffsynth.nano.judge import Picture, Sound, Verdict

_SOUNDS: Mapping[str, str] = {
    "tone": "a steady tone",
    "beep": f"a beep, {PULSE_S * 1000:.0f} ms on and {PULSE_S * 1000:.0f} ms off,",
    "ping": "a ping at each bounce",
}


def demo(
    prompt: Annotated[
        str,
        typer.Option(help="what nano knows, in words like those of the default"),
    ] = nano.EXAMPLE,
    output: Annotated[Path, typer.Option("--output", "-o", help="the mp4 to write")] = Path("demo.mp4"),
    seed: Annotated[int, typer.Option(help="of the noise")] = 1,
    device: machine.Device = None,
    quiet: machine.Quiet = False,
) -> None:
    """Make a clip with the tiny model of the package.  It takes seconds and no download."""
    description = Description.read(prompt)
    files = nano.files()
    request = GenerateRequest(prompt=prompt, seed=seed, **nano.settings()).validate()
    try:
        from diffsynth.cli.generate import ModelOptions, run

        begun = time.monotonic()
        models = ModelOptions(
            checkpoint=(str(files.checkpoint),),
            gemma=str(files.gemma),
            upsampler=None,
            distilled_lora=None,
            loras=(),
            machine=machine.MachineOptions.of(device, machine.DEFAULT_DTYPE, None, None, None, False),
        )
        with _one_thread():
            run(request=request, models=models, output=output, quiet=quiet)
        seconds = time.monotonic() - begun
        seen, heard, verdict = look_at(output, description)
    except KeyboardInterrupt as error:
        raise Cancelled("cancelled; nothing half-written was left") from error
    typer.echo("\n".join(report(description, seen, heard, verdict)))
    typer.echo(f"The video is in {output.absolute()} ({seconds:.0f} s)")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain little from more, and threads that wait for each other lose much on a busy
    machine.  Bits depend on the number of threads too: with one, the clip does not depend on the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def look_at(file: Path, description: Description) -> "tuple[Picture, Sound, Verdict]":
    """What an mp4 shows and sounds, read without the description, and whether the two agree."""
    from diffsynth.nano.judge import judge, read_picture, read_sound
    from diffsynth.utils.media_io_ltx2 import read_audio, read_video

    video, sound = read_video(file), read_audio(file)
    verdict = judge(video.frames, sound.samples, sound.sampling_rate, description, fps=float(video.fps))
    return read_picture(video.frames), read_sound(sound.samples, sound.sampling_rate), verdict


def report(description: Description, seen: "Picture", heard: "Sound", verdict: "Verdict") -> Iterator[str]:
    """What to look for, what is there, and whether the two agree."""
    from diffsynth.nano.judge import ATTRIBUTES

    yield f"Look for:   {description.caption().rpartition(', ')[0]}"
    if description.pitch is None:
        yield "Listen for: silence"
    else:
        pitch = f"{PITCHES[description.pitch]:.0f} Hz"
        yield f"Listen for: {_SOUNDS[description.sound]} at {pitch}, from where the {description.shape} is"
    sound = "silence" if heard.kind == "silence" else f"{heard.kind or '?'} at {heard.pitch_hz:.0f} Hz"
    there = f"{seen.colour or '?'} {seen.shape or '?'} on {seen.background}"
    yield f"Read from the file: {there}, motion {seen.motion or '?'}, place {seen.place or '?'}; {sound}"
    right = [name for name in ATTRIBUTES if getattr(verdict, name) is True]
    wrong = [name for name in ATTRIBUTES if getattr(verdict, name) is False]
    yield f"As asked: {', '.join(right) or 'nothing'}" + (f"; not: {', '.join(wrong)}" if wrong else "")
