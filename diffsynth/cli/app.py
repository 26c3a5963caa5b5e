"""Commands, and the one place where an error becomes a message and an exit code."""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from diffsynth import __version__
from diffsynth.cli import machine, official
from diffsynth.cli.bundled import filled
from diffsynth.cli.cache import cache_app
from diffsynth.cli.demo import demo
from diffsynth.cli.options import parse_request, request_options
from diffsynth.cli.plan import plan
from diffsynth.cli.train import preprocess, train
from diffsynth.errors import Cancelled, DiffSynthError

UNEXPECTED = 1

app = typer.Typer(
    name="diffsynth",
    help="Video with sound from text and pictures: LTX-2 and LTX-2.3 on machines far smaller than the model.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MODELS = "Models (a path, or MODEL_ID:FILE_PATTERN as on ModelScope and Hugging Face)"
RUN = machine.RUN
OUTPUT_HELP = "the mp4 to write; with audio alone a .wav or .flac"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option(help="show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="show the version and stop", is_eager=True, callback=_show_version),
    ] = False,
) -> None: ...


@app.command()
@request_options
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="what the video shows and how it sounds")],
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT_HELP, rich_help_panel=RUN)] = Path(
        "video.mp4"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            help="nano: the tiny model of this package, instead of all the files below; "
            "256x256, 25 frames, 20 steps",
            rich_help_panel=MODELS,
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="single-file checkpoint, or repackaged parts, one option each, "
            "e.g. Lightricks/LTX-2:ltx-2-19b-dev.safetensors",
            rich_help_panel=MODELS,
        ),
    ] = None,
    gemma: Annotated[
        str, typer.Option(help="Gemma 3 folder with weights and tokenizer", rich_help_panel=MODELS)
    ] = "google/gemma-3-12b-it-qat-q4_0-unquantized:model-*.safetensors",
    upsampler: Annotated[
        str | None, typer.Option(help="x2 latent upsampler, for two stages", rich_help_panel=MODELS)
    ] = None,
    distilled_lora: Annotated[
        str | None,
        typer.Option(
            help="distilled LoRA of the second stage, FILE or FILE=STRENGTH (0.8)", rich_help_panel=MODELS
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA, FILE or FILE=STRENGTH (1.0); repeat", rich_help_panel=MODELS),
    ] = None,
    device: machine.Device = None,
    dtype: machine.Dtype = machine.DEFAULT_DTYPE,
    vram_limit: machine.VramLimit = None,
    host_limit: machine.HostLimit = None,
    storage: machine.Storage = None,
    cache: machine.Cache = True,
    stats: machine.Stats = False,
    quiet: machine.Quiet = False,
    **request: object,
) -> None:
    """Make a video with sound.  The mp4 keeps the whole request in its metadata."""
    files: dict[str, Any] = {"checkpoint": checkpoint or (), "gemma": gemma, "upsampler": upsampler}
    loras: dict[str, Any] = {"distilled_lora": distilled_lora, "lora": lora or ()}
    given = filled(context, model, prompt, files | loras | request)
    # Before torch is imported: a wrong number is told at once.
    checked = parse_request({"prompt": prompt, **given}).validate()
    try:
        from diffsynth.cli.generate import DISTILLED_LORA_STRENGTH, ModelOptions, run, with_strength

        distilled = given["distilled_lora"]
        models = ModelOptions(
            checkpoint=tuple(given["checkpoint"]),
            gemma=given["gemma"],
            upsampler=given["upsampler"],
            distilled_lora=with_strength(distilled, DISTILLED_LORA_STRENGTH) if distilled else None,
            loras=tuple(with_strength(name) for name in given["lora"]),
            machine=machine.MachineOptions.of(device, dtype, vram_limit, host_limit, storage, cache),
        )
        run(request=checked, models=models, output=output, quiet=quiet, stats=stats)
    except KeyboardInterrupt as error:  # typer would end without a word
        raise Cancelled("cancelled; nothing half-written was left") from error


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="file that a run named when it was stopped while decoding")],
    checkpoint: Annotated[
        list[str],
        typer.Option(help="the checkpoint of that run, or its repackaged decoders", rich_help_panel=MODELS),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT_HELP, rich_help_panel=RUN)] = Path(
        "video.mp4"
    ),
    device: machine.Device = None,
    dtype: machine.Dtype = machine.DEFAULT_DTYPE,
    vram_limit: machine.VramLimit = None,
    host_limit: machine.HostLimit = None,
    storage: machine.Storage = None,
    cache: machine.Cache = True,
    stats: machine.Stats = False,
    quiet: machine.Quiet = False,
) -> None:
    """Decode the latents of a stopped run.  A small --vram-limit makes small tiles."""
    try:
        from diffsynth.cli.decode import run

        options = machine.MachineOptions.of(device, dtype, vram_limit, host_limit, storage, cache)
        run(latents, checkpoint=checkpoint, machine=options, output=output, quiet=quiet, stats=stats)
    except KeyboardInterrupt as error:
        raise Cancelled("cancelled; nothing half-written was left") from error


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="checkpoint, LoRA, upsampler, or generated video or sound")],
    json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Say what a file holds.  Networks, variant, parameters and dtypes; or the request that made a result."""
    from diffsynth.cli.inspect import run

    run(file, as_json=json)


app.command()(demo)
app.command()(plan)
app.command()(preprocess)
app.command()(train)
app.add_typer(cache_app)


def _add_official(name: str, text: str) -> None:
    """One of the official commands, which read their options themselves."""

    def command(context: typer.Context) -> None:
        official.run(name, context.args)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, help=text, context_settings=settings, add_help_option=False)(command)


for _pipeline in official.PIPELINES.values():
    _add_official(_pipeline.name, _pipeline.text)


def main() -> None:
    """Entry point: run a command, print an error as message and hint, exit with the code of its kind."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if sys.platform == "linux":
        # Plans go to the edge of the budget; memory in fixed segments would leave gaps there.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except DiffSynthError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail("cancelled", Cancelled.exit_code, debug)
    except Exception as error:
        _fail(
            f"unexpected {type(error).__name__}: {error}  Try: diffsynth --debug ... and report it",
            UNEXPECTED,
            debug,
        )


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(f"diffsynth: {message}", err=True)
    raise SystemExit(code)
