"""The units of a request, in the order in which they run, and how one is run."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from traceback import clear_frames

from diffsynth.device import is_out_of_memory
from diffsynth.pipelines.encode_inputs import EncodeAudioInput, EncodeVideoInputs
from diffsynth.pipelines.enhance import EnhancePrompt
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.stages import Stage
from diffsynth.pipelines.state import GenerationState
from diffsynth.pipelines.units import DecodeAudio, DecodeVideo, Denoise, EncodePrompts, Unit, Upsample
from diffsynth.request import GenerateRequest

StageLora = Callable[[Stage], AbstractContextManager[object]]
"""Stage -> what is entered for its length."""


def making(request: GenerateRequest, stages: Sequence[Stage], lora: StageLora) -> list[Unit]:
    """The units up to the final latents."""
    has_video_inputs = request.input_images or request.in_context_videos or request.retake_video is not None
    units: list[Unit] = [EnhancePrompt()] if request.enhance_prompt else []
    units.append(EncodePrompts())
    if request.retake_audio is not None:
        units.append(EncodeAudioInput())
    for stage in stages:
        if stage.number > 1:
            units.append(Upsample())
        if has_video_inputs:
            units.append(EncodeVideoInputs(stage))
        units.append(Denoise(stage, partial(lora, stage)))
    return units


def decoding(request: GenerateRequest, parts: Parts) -> list[Unit]:
    """The units from the final latents on."""
    units: list[Unit] = []
    if not request.audio_only:
        units.append(DecodeVideo())
    if parts.has_audio:
        units.append(DecodeAudio())
    return units


def needs(units: Iterable[Unit]) -> list[str]:
    """The parts that units need, each once."""
    return list(dict.fromkeys(name for unit in units for name in unit.needs))


def run_unit(unit: Unit, parts: Parts, state: GenerationState) -> None:
    """Run a unit; if the device runs out of memory, again with less, from the last finished step."""
    parts.memory.convert(unit.needs, state.on_progress)
    while True:
        try:
            unit.run(parts, state)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            clear_frames(error.__traceback__)  # they hold the tensors that filled the device
            if not parts.memory.step_down():
                raise
        else:
            return
