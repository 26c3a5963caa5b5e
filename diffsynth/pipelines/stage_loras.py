"""Which LoRAs are active in which stage, and what they ask of a request."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from diffsynth.errors import RequestError
from diffsynth.lora import Lora, LoraStack
from diffsynth.lora.file import ReferenceScale
from diffsynth.pipelines.stages import Stage
from diffsynth.request import GenerateRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLoraBook:
    """The user's LoRAs, which every stage has, and the distilled one, which stages have in turns.

    Attributes:
        stack: of the transformer, None without one.
        distilled: the distilled LoRA.
        strength: of it in the second stage, where the request states none.
    """

    stack: LoraStack | None
    distilled: Lora | None
    strength: float

    def distilled_strength(self, request: GenerateRequest, number: int) -> float:
        """Of the distilled LoRA in a stage; 0 where it is not active."""
        if self.distilled is None or request.use_distilled_pipeline:
            return 0.0
        if number == 1:
            return request.stage1_lora_strength
        return self.strength if request.stage2_lora_strength is None else request.stage2_lora_strength

    def of_stage(self, request: GenerateRequest, stage: Stage) -> AbstractContextManager[object]:
        """What changes the LoRAs for the length of a stage."""
        strength = self.distilled_strength(request, stage.number)
        alone = stage.number > 1 and request.clear_lora_before_state_two
        if self.stack is None or not (strength or alone):
            return nullcontext()
        return _changed(self.stack, self.distilled if strength else None, strength, alone)

    def record(self, request: GenerateRequest) -> dict[str, float]:
        """Sources and strengths, for the record of a result."""
        active = self.stack.active if self.stack else {}
        found: dict[str, float] = {}
        for handle, strength in active.items():
            again = sum(other.source == handle.source for other in active if other.number < handle.number)
            found[f"{handle.source} ({again + 1})" if again else handle.source] = strength
        for number in (1, 2) if request.use_two_stage_pipeline else (1,):
            strength = self.distilled_strength(request, number)
            if self.distilled is not None and strength:
                found[f"{self.distilled.report.source} (stage {number})"] = strength
        return found

    def with_reference_factor(self, request: GenerateRequest) -> GenerateRequest:
        """The request with size and spacing of its reference clips as the active LoRAs state them.

        Raises:
            RequestError: two of them state different ones.
        """
        if not request.in_context_videos or self.stack is None:
            return request
        references = [(lora.report.source, lora.reference) for lora in self.stack.loras]
        stated = [(source, each.factor) for source, each in references if each.source != "default"]
        if len({factor for _, factor in stated if factor != 1}) > 1:
            listed = ", ".join(f"{source}: {factor}" for source, factor in stated)
            raise RequestError(
                f"in_context_videos: the LoRAs want references of different sizes ({listed})",
                hint="load only one of them; pipe.clear_lora() takes all away",
            )
        request = self._with_spacing(request, references)
        given, wanted = (
            request.in_context_downsample_factor,
            max((factor for _, factor in stated), default=None),
        )
        if given is None:
            return replace(request, in_context_downsample_factor=wanted or request.reference_factor)
        if wanted not in (None, given):
            logger.warning("in_context_downsample_factor=%s, but the LoRA was made for %s", given, wanted)
        return request

    @staticmethod
    def _with_spacing(
        request: GenerateRequest, references: Sequence[tuple[str, ReferenceScale]]
    ) -> GenerateRequest:
        """The request with the temporal factor of its reference clips.

        Raises:
            RequestError: see :meth:`with_reference_factor`.
        """
        stated = [(source, each.temporal_factor) for source, each in references if each.source != "default"]
        if len({factor for _, factor in stated}) > 1:
            listed = ", ".join(f"{source}: {factor}" for source, factor in stated)
            raise RequestError(
                f"in_context_videos: the LoRAs want references of different frame rates ({listed})",
                hint="load only one of them; pipe.clear_lora() takes all away",
            )
        given, wanted = request.in_context_temporal_factor, max((f for _, f in stated), default=None)
        if given is None and wanted is not None:
            return replace(request, in_context_temporal_factor=wanted)
        if wanted not in (None, given):
            logger.warning("in_context_temporal_factor=%s, but the LoRA was made for %s", given, wanted)
        return request


@contextmanager
def _changed(loras: LoraStack, lora: Lora | None, strength: float, alone: bool) -> Iterator[None]:
    """The distilled LoRA for a while; with ``alone`` the user's own ones are silent meanwhile."""
    strengths = loras.active
    with nullcontext() if lora is None else loras.scoped(lora, strength):
        try:
            for handle in strengths if alone else ():
                loras.set_strength(handle, 0.0)
            yield
        finally:
            for handle, before in strengths.items():
                loras.set_strength(handle, before)
