"""Clips made on the way with what is being trained, through the units of the pipeline.

Nothing of the run changes: the noise has its own source, the transformer is used as it stands, and every
other network is read for a round, lies on the device for its phase alone, and is gone after the round.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from diffsynth.conditioning.enhance import Chat
from diffsynth.device import backend_for, out_of_memory_told
from diffsynth.errors import Cancelled
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.pipelines.inputs import inputs_by_path
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.phases import AllOnDevice, PhaseRun, StageLoras, parts_of_phase
from diffsynth.pipelines.progress import Progress
from diffsynth.pipelines.result import Result
from diffsynth.request import GenerateRequest
from diffsynth.training.clip_plans import Room, plan_clip
from diffsynth.training.config import TrainConfig
from diffsynth.training.networks import open_all
from diffsynth.training.strategy import Role
from diffsynth.training.texts import encode_texts, text_cache
from diffsynth.utils.audio_file import write_audio
from diffsynth.utils.files import make_folder
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from diffsynth.vram.plan import PhasePlan

logger = logging.getLogger(__name__)

FOLDER = "validation"

Aside = Callable[[PhasePlan | None], AbstractContextManager[None]]
Plans = Callable[[GenerateRequest], Mapping[str, PhasePlan]]


def stays(plan: PhasePlan | None) -> AbstractContextManager[None]:
    """Of a base that makes no room."""
    return nullcontext()


class Validator:
    """Makes the clips of a configuration."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Check every clip and encode its prompt, so that nothing can fail for these reasons later.

        Raises:
            RequestError: a clip that cannot be made, or files of it that cannot be read.
            CheckpointError, DownloadError: the models cannot be opened, or lack a network.
            OutputError: an encoded prompt could not be kept.
            MemoryBudgetError: the device ran out of memory in the text model.
        """
        self._folder = config.output.folder / FOLDER
        self._every = config.validation.every
        self._opened = open_all(config)
        self._outline = self._opened.outline(device, config.model.torch_dtype)
        parts = self._outline.parts
        requests = config.validation.requests(
            self._opened.version,
            audio_only=config.strategy.video == Role.NONE,
            reference_scale=config.data.reference_scale or 1,
            reference_temporal_scale=config.data.reference_temporal_scale,
        )
        pipe = LTX2AudioVideoPipeline(self._outline)
        self._requests = [pipe.check(request) for request in requests]
        for request in self._requests:
            inputs_by_path(request).check(request)
        parts.prompt_cache = text_cache(config, self._opened)
        encode_texts(config, self._opened, parts.prompt_cache, config.validation.texts)
        self._room: Room | None = None

    def share(self, room: Room | None) -> None:
        """Plan every clip beside a base; rounds follow these plans.

        Raises:
            MemoryBudgetError: a clip does not fit; the hint names one that would.
        """
        self._room = room
        for request in self._requests:
            self._plans(request)

    def _plans(self, request: GenerateRequest) -> Mapping[str, PhasePlan]:
        return {} if self._room is None else plan_clip(request, self._outline.parts, self._room)

    def missing(self, step: int) -> dict[Path, GenerateRequest]:
        """What has to be made after a step: nothing after most, or after a round that was made before."""
        if step % self._every:
            return {}
        suffixes = [".wav" if request.audio_only else ".mp4" for request in self._requests]
        names = [f"step_{step:05d}_{number}{suffix}" for number, suffix in enumerate(suffixes, 1)]
        wanted = zip(names, self._requests, strict=True)
        return {self._folder / name: r for name, r in wanted if not (self._folder / name).exists()}

    def run(
        self,
        network: LTX2Transformer,
        step: int,
        *,
        record: Mapping[str, object],
        should_stop: Callable[[], bool],
        aside: Aside = stays,
    ) -> None:
        """Make what is missing after a step; a round that is stopped leaves the clips that are whole.

        Args:
            network: on the device, with the adapter or the weights as they are to be used.
            record: what is being trained, for the metadata.
            should_stop: asked after every step of denoising.
            aside: of the base, see :class:`~diffsynth.training.base.Base`; entered for the phases in which
                other networks compute.

        Raises:
            OutputError: the folder cannot be written to.
            MemoryBudgetError: the device ran out of memory.
        """
        missing = self.missing(step)
        if not missing or should_stop():
            return
        make_folder(self._folder)

        def listen(progress: Progress) -> None:
            if progress.denoised is not None and should_stop():
                raise Cancelled("the round is stopped", hint="--resume")

        smaller = "fewer frames, or a smaller width and height in [validation]"
        with out_of_memory_told(smaller, "validation"):
            pipe = self._pipeline(network, aside)
            for path, request in missing.items():
                logger.info("validation after step %d: %s", step, path.name)
                try:
                    result = pipe.generate(request, on_progress=listen)
                except Cancelled:
                    return
                result.record["training"] = {**record, "step": step}
                _write(result, path)

    def _pipeline(self, network: LTX2Transformer, aside: Aside) -> LTX2AudioVideoPipeline:
        """The network with all others that the clips need, which end with what is returned."""
        outline, device = self._outline, self._outline.parts.device
        others = self._opened.only(self._needed()).load(torch.device("cpu"), outline.parts.dtype).parts
        modules = {name: getattr(others, name) for name in self._needed()}
        memory = _InTurns(modules, device, aside, self._plans)
        parts = replace(outline.parts, dit=network, memory=memory, **modules)
        return LTX2AudioVideoPipeline(replace(outline, parts=parts))

    def _needed(self) -> list[str]:
        requests = self._requests
        pictures = any(r.input_images or r.in_context_videos or r.retake_video for r in requests)
        wanted = {
            "video_vae_encoder": pictures,
            "audio_vae_encoder": any(r.retake_audio for r in requests),
            "video_vae_decoder": not all(r.audio_only for r in requests),
            "audio_vae_decoder": self._outline.parts.has_audio,
            "audio_vocoder": self._outline.parts.has_audio,
        }
        return [name for name, needed in wanted.items() if needed]


class _InTurns(AllOnDevice):
    """Networks that wait on the host and are on the device for their phase alone."""

    def __init__(
        self, modules: Mapping[str, nn.Module], device: torch.device, aside: Aside, plans: Plans
    ) -> None:
        self._modules = modules
        self._device = device
        self._aside = aside
        self._plans = plans
        self._planned: Mapping[str, PhasePlan] = {}

    def prepare(
        self, request: GenerateRequest, *, loras: StageLoras, prompts: Sequence[str], chat: Chat | None = None
    ) -> None:
        """See :class:`~diffsynth.pipelines.phases.Memory`: as it was planned before the first step."""
        self._planned = self._plans(request)

    @contextmanager
    def phase(self, name: str) -> Iterator[PhaseRun]:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        own = [self._modules[part] for part in parts_of_phase(name) if part in self._modules]
        plan = self._planned.get(name)
        if not own:  # the transformer's own phase
            with nullcontext() if plan is None else self._aside(plan):
                yield PhaseRun()
            return
        with self._aside(None):
            try:
                for module in own:
                    module.to(self._device)
                yield PhaseRun({} if plan is None else plan.settings)
            finally:
                for module in own:
                    module.to("cpu")
                backend_for(self._device).empty_cache()


def _write(result: Result, path: Path) -> None:
    if result.frames is not None:
        write_video_audio_ltx2(result.frames, result.waveform, path)
    elif result.waveform is not None:
        write_audio(result.waveform, path, request=result.record)
