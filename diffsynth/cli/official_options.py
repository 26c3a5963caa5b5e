"""The options of the official commands, each declared once."""

import argparse
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args

from diffsynth.cli import machine
from diffsynth.cli.machine import DEFAULT_DTYPE, MachineOptions
from diffsynth.errors import RequestError
from diffsynth.pipelines.presets import HQ_LORA_STRENGTHS, Preset


@dataclass(frozen=True, slots=True)
class Option:
    """One option."""

    flag: str
    text: str
    how: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``ArgumentParser.add_argument``."""
    of_preset: Callable[[Preset, int], Any] | None = None
    """The default that help states, of a preset and the number of stages."""

    @property
    def name(self) -> str:
        """Of the value in the namespace."""
        return self.flag.removeprefix("--").replace("-", "_")

    def add_to(self, parser: ArgumentParser, presets: Sequence[Preset], stages: int) -> None:
        """Declare it; ``presets`` are those that may count, in the order of the models."""
        text = self.text
        if self.of_preset is not None:
            values = dict.fromkeys(_shown(self.of_preset(preset, stages)) for preset in presets)
            text += f" ({', or with LTX-2.3 '.join(values)})"
        parser.add_argument(self.flag, help=text, **self.how)


LATER: Mapping[str, str] = {
    "--offload": "--vram-limit auto, which brings the weights block by block",
    "--max-batch-size": "leave it out: all passes of a step share one way through the weights",
    "--compile": "leave it out: nothing is compiled",
}
"""Options of later official versions -> what does their work here."""


class Parser(ArgumentParser):
    """Says what is wrong in one line instead of below all options."""

    def error(self, message: str) -> NoReturn:
        """Print it with the way out and end with the exit code of a wrong request."""
        known = next((flag for flag in LATER if flag in message.replace("=", " ").split()), None)
        way_out = f"{self.prog} --help" if known is None else LATER[known]
        self.exit(RequestError.exit_code, f"{self.prog}: {message}  Try: {way_out}\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows an option of several words as it is typed."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if isinstance(action, _SeveralWords):
            return str(action.metavar)
        return super()._format_args(action, default_metavar)


class _SeveralWords(argparse.Action):
    """``--option PATH [STRENGTH]``: words of different kinds, some of which may be left out."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        *,
        kinds: Sequence[Callable[[str], Any]],
        at_least: int,
        defaults: Sequence[Any] = (),
        endless: bool = False,
        repeat: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            kinds: of each word.
            at_least: words that must be there.
            defaults: of those that may be left out, from ``at_least`` on; none: they stay out.
            endless: the last kind may come any number of times.
            repeat: the option may be given more than once; what it was given is a list then.
        """
        super().__init__(option_strings, dest, nargs="*", **kwargs)
        self._kinds, self._at_least, self._defaults = tuple(kinds), at_least, tuple(defaults)
        self._endless, self._repeat = endless, repeat

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        kinds = self._kinds + self._kinds[-1:] * (len(values) - len(self._kinds)) * self._endless
        try:
            if not self._at_least <= len(values) <= len(kinds):
                raise ValueError(values)
            words = tuple(kind(word) for kind, word in zip(kinds, values, strict=False))
        except ValueError:
            parser.error(f"argument {option_string}: {' '.join(values) or 'nothing'} is not {self.metavar}")
        words += self._defaults[len(words) - self._at_least :]
        earlier = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*earlier, words] if self._repeat else words)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _words(metavar: str, *kinds: Callable[[str], Any], at_least: int, **how: Any) -> dict[str, Any]:
    return {"action": _SeveralWords, "metavar": metavar, "kinds": kinds, "at_least": at_least, **how}


def _required(metavar: str, kind: Callable[[str], Any] = str) -> dict[str, Any]:
    return {"required": True, "metavar": metavar, "type": kind}


def _number(metavar: str, kind: Callable[[str], Any]) -> dict[str, Any]:
    return {"metavar": metavar, "type": kind}


CHECKPOINT = Option("--checkpoint-path", "checkpoint of the dev model", _required("FILE"))
DISTILLED_CHECKPOINT = Option(
    "--distilled-checkpoint-path", "checkpoint of the distilled model", _required("FILE")
)
OUTPUT = Option("--output-path", "file to write", _required("FILE", Path))

COMMON = (
    Option("--gemma-root", "Gemma 3 folder with weights and tokenizer", _required("DIR")),
    Option("--prompt", "what the video shows and how it sounds", _required("TEXT")),
    OUTPUT,
    Option("--seed", "seed of the noise", _number("N", int), lambda preset, _: preset.seed),
    Option(
        "--lora",
        "LoRA and its strength (1.0); repeat for more",
        _words("PATH [STRENGTH]", str, float, at_least=1, defaults=(1.0,), repeat=True),
    ),
    Option("--enhance-prompt", "let Gemma write the prompt out in detail first", {"action": "store_true"}),
    Option(
        "--quantization",
        "fp8-cast: weights stored as plain e4m3; fp8-scaled-mm: as e4m3 with scales, computed with in bf16, "
        "for which no file of maxima is needed",
        _words("KIND [FILE]", str, str, at_least=1),
    ),
    Option(
        "--streaming-prefetch-count",
        "bring the weights block by block, N on their way while one computes; without --vram-limit in "
        "what is free",
        _number("N", int),
    ),
    Option(
        "--fit",
        "cut an illegal size, or more frames than a clip has, to the nearest legal one below",
        {"action": "store_true"},
    ),
)
LENGTH = (
    Option("--num-frames", "frames, 8k+1", _number("N", int), lambda preset, _: preset.num_frames),
    Option("--frame-rate", "frames per second", _number("X", float), lambda preset, _: preset.frame_rate),
)
SIZE = (
    Option("--height", "height in pixels", _number("N", int), lambda preset, stages: stages * preset.height),
    Option("--width", "width in pixels", _number("N", int), lambda preset, stages: stages * preset.width),
)
STEPS = (
    Option(
        "--num-inference-steps",
        "denoising steps; distilled models have their own",
        _number("N", int),
        lambda preset, _: preset.num_inference_steps,
    ),
)
PICTURES = (
    Option(
        "--image",
        "picture, its frame (-1 is the last), how strictly it is kept, and the quality of a round trip "
        "through H.264 (33, 0 is none); repeat for more",
        _words("PATH FRAME STRENGTH [CRF]", str, int, float, int, at_least=3, defaults=(None,), repeat=True),
    ),
)
GUIDED = (Option("--negative-prompt", "what it must not show (a list of flaws)", _number("TEXT", str)),)


def _guidance(modality: str, short: str) -> tuple[Option, ...]:
    """The options of one stream; ``short`` names the modality guidance."""

    def of(name: str) -> Callable[[Preset, int], Any]:
        return lambda preset, _: getattr(getattr(preset, f"{modality}_guidance"), name)

    number, blocks = _number("X", float), _words("N ...", int, at_least=0, endless=True)
    return (
        Option(f"--{modality}-cfg-guidance-scale", "classifier-free guidance", number, of("cfg_scale")),
        Option(f"--{modality}-stg-guidance-scale", "perturbed guidance", number, of("stg_scale")),
        Option(
            f"--{modality}-rescale-scale",
            "pull towards the deviation of one pass",
            number,
            of("rescale_scale"),
        ),
        Option(f"--{modality}-stg-blocks", "blocks that are perturbed", blocks, of("stg_blocks")),
        Option(f"--{short}-guidance-scale", "guidance by the other stream", number, of("modality_scale")),
        Option(f"--{modality}-skip-step", "steps left out between two", _number("N", int), of("skip_step")),
    )


VIDEO_GUIDANCE = _guidance("video", "a2v")
AUDIO_GUIDANCE = _guidance("audio", "v2a")
UPSAMPLER = Option("--spatial-upsampler-path", "x2 latent upsampler", _required("FILE"))
DISTILLED_LORA = Option(
    "--distilled-lora",
    "distilled LoRA of the second stage and its strength (1.0)",
    {"required": True, **_words("PATH [STRENGTH]", str, float, at_least=1, defaults=(1.0,))},
)
HQ_STRENGTHS = tuple(
    Option(
        f"--distilled-lora-strength-stage-{number}",
        f"strength of the distilled LoRA in stage {number} ({strength})",
        {"type": float, "default": strength, "metavar": "X"},
    )
    for number, strength in enumerate(HQ_LORA_STRENGTHS, 1)
)
GIVEN_SOUND = (
    Option("--audio-path", "file with the sound", _required("FILE")),
    Option(
        "--audio-start-time", "where in it the video begins, in seconds (0)", {"type": float, "default": 0.0}
    ),
    Option("--audio-max-duration", "seconds of it to use (all of the video)", {"type": float}),
)
RETAKE = (
    Option("--video-path", "the clip", _required("FILE")),
    Option("--start-time", "seconds where the new part begins", _required("S", float)),
    Option("--end-time", "seconds where it ends", _required("S", float)),
    Option("--checkpoint-path", "checkpoint of the dev model", _number("FILE", str)),
    Option("--distilled-checkpoint-path", "or of the distilled model: 8 steps", _number("FILE", str)),
    Option("--loras", "LoRAs of strength 1", {"nargs": "+", "metavar": "PATH", "default": []}),
)
CONDITIONING = (
    Option(
        "--video-conditioning",
        "reference clip and how strictly it is kept; repeat for more",
        {"required": True, **_words("PATH STRENGTH", str, float, at_least=2, repeat=True)},
    ),
    Option(
        "--conditioning-attention-mask",
        "grey clip, white where the video attends to the references, and how much it does",
        _words("MASK STRENGTH", str, float, at_least=2),
    ),
    Option("--skip-stage-2", "end after the first stage, at half the size", {"action": "store_true"}),
)

_MACHINE: Mapping[str, tuple[Any, Any]] = {
    "device": (machine.Device, None),
    "dtype": (machine.Dtype, DEFAULT_DTYPE),
    "vram_limit": (machine.VramLimit, None),
    "host_limit": (machine.HostLimit, None),
    "storage": (machine.Storage, None),
    "cache": (machine.Cache, True),
    "stats": (machine.Stats, False),
    "quiet": (machine.Quiet, False),
}
"""Name -> declaration and default: the same as those of ``diffsynth generate``."""


def add_machine_options(parser: ArgumentParser) -> None:
    """The options that every command of ours has."""
    group = parser.add_argument_group("of diffsynth")
    for name, (declaration, default) in _MACHINE.items():
        kind, option = get_args(declaration)
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(
                flag,
                help=option.help,
                default=default,
                action=BooleanOptionalAction if default else "store_true",
            )
        else:
            number = float if kind == float | None else str
            group.add_argument(flag, help=option.help, default=default, type=number)


def machine_options(given: Namespace, storage: str | None) -> MachineOptions:
    """From what was typed, with the storage format that was found in it."""
    return MachineOptions.of(
        given.device,
        given.dtype,
        given.vram_limit,
        given.host_limit,
        storage,
        given.cache,
        prefetch_count=given.streaming_prefetch_count,
    )
