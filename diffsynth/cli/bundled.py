"""``--model nano``: the files of the package and their settings, where nothing else was typed."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import typer

from diffsynth import nano
from diffsynth.errors import RequestError
from diffsynth.nano.bundle import DISTILLED_LORA_STRENGTH
from diffsynth.nano.world import FRAMED, unknown_words

logger = logging.getLogger(__name__)


def filled(
    context: typer.Context, model: str | None, prompt: str, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Option values of ``generate`` as ``--model`` completes them.

    Args:
        context: of the command; it knows what was typed.
        model: what ``--model`` says; None changes nothing.
        prompt: words in it that the model never saw are told.
        values: of the options, by parameter.  A LoRA named ``framed`` is that of the package.

    Raises:
        RequestError: no such model, or a checkpoint as well.
        CheckpointError: the files are not there.
    """
    if model is None:
        return dict(values)
    if model != nano.NAME:
        raise RequestError(f"--model={model} is not known", hint=f"{nano.NAME}; other models by --checkpoint")
    if values["checkpoint"]:
        raise RequestError("--model and --checkpoint are both given", hint="one of them")
    unknown = unknown_words(prompt)
    if unknown:
        logger.warning(
            "%s does not know %s; it knows clips like: %s", nano.NAME, ", ".join(unknown), nano.EXAMPLE
        )
    files, distilled = nano.files(), bool(values["use_distilled_pipeline"])
    distilled_lora = f"{files.distilled_lora}={DISTILLED_LORA_STRENGTH}"
    own: dict[str, Any] = {
        "checkpoint": [str(files.checkpoint)],
        "gemma": str(files.gemma),
        "upsampler": str(files.upsampler),
        # What is distilled has the LoRA in every stage.
        "distilled_lora": None if distilled else distilled_lora,
        **nano.settings(distilled=distilled),
    }
    untyped = {name: value for name, value in own.items() if not _typed(context, name)}
    loras = [re.sub(rf"^{FRAMED}(?==|$)", lambda _: str(files.framed_lora), lora) for lora in values["lora"]]
    return {**values, **untyped, "lora": [distilled_lora, *loras] if distilled else loras}


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
