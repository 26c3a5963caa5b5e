"""How units ask for the networks of a phase, wherever the weights are meanwhile.

A unit says ``with memory.phase("denoise 1")`` and finds the networks of that phase ready.  Phases follow one
another; each gives back what it held.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeAlias

from diffsynth.conditioning.enhance import Chat
from diffsynth.models.gemma3_writer import HeadChunks
from diffsynth.models.ltx2.feature_extractor import Slices
from diffsynth.pipelines.progress import OnProgress
from diffsynth.pipelines.stages import Stage
from diffsynth.request import GenerateRequest

StageLoras: TypeAlias = Callable[[Stage], AbstractContextManager[object]]
"""Sets the LoRAs of a stage for as long as it is entered."""


LOOK = "look at picture"
ENHANCE = "enhance prompt"

PHASE_PARTS: Mapping[str, tuple[str, ...]] = {
    LOOK: ("picture_encoder",),
    ENHANCE: ("text_encoder",),
    "text": ("text_encoder", "text_encoder_post_modules"),
    "connectors": ("text_encoder_post_modules",),
    "encode audio": ("audio_vae_encoder",),
    "encode inputs": ("video_vae_encoder",),
    "denoise": ("dit",),
    "upsample": ("upsampler",),
    "decode video": ("video_vae_decoder",),
    "decode audio": ("audio_vae_decoder", "audio_vocoder"),
}
"""Phase, without its number -> the networks that compute in it."""


def parts_of_phase(name: str) -> tuple[str, ...]:
    """The networks that compute in a phase, such as ``denoise 2``."""
    return PHASE_PARTS[name.rstrip("0123456789").rstrip()]


class PhaseRun(NamedTuple):
    """What a unit gets for a phase besides networks that are ready."""

    settings: Mapping[str, int | None] = {}
    """Of the plan: tile sizes.  Empty: as the request has them."""
    slices: Slices | None = None
    """Source of the text projections where they are streamed."""
    head: HeadChunks | None = None
    """Source of the text model's head where it is streamed."""


class Memory(Protocol):
    """See the module."""

    def prepare(
        self, request: GenerateRequest, *, loras: StageLoras, prompts: Sequence[str], chat: Chat | None = None
    ) -> None:
        """Decide how the phases of a request will run.

        Args:
            request: what will be generated.
            loras: sets the LoRAs of a stage, so that they can be measured.
            prompts: those that have to be encoded.
            chat: what the text model is given to write the prompt from, which then is encoded as well.

        Raises:
            MemoryBudgetError: the request does not fit; the hint says what would.
        """
        ...

    def prepare_decoding(self, request: GenerateRequest) -> None:
        """Decide how the phases after the final latents will run, when no others will.

        Raises:
            MemoryBudgetError: decoding does not fit.
        """
        ...

    def convert(self, parts: Sequence[str], on_progress: OnProgress) -> None:
        """Bring networks into the form in which they wait, as far as the coming phases need them and they
        are not there: else the first phase that needs one does it without a word.

        Args:
            parts: their names; others are ignored.
            on_progress: told about each that has to be converted, in a phase ``convert NAME``.  What it
                raises stops the conversion, of which nothing is left.

        Raises:
            CheckpointError, OutputError: weights cannot be read or converted.
        """
        ...

    def phase(self, name: str) -> AbstractContextManager[PhaseRun]:
        """The networks of a phase are on the device inside the ``with`` block."""
        ...

    def step_down(self) -> bool:
        """After a phase ran out of device memory all the same: decide on less for it.

        Returns:
            Whether the phase is worth another try.

        Raises:
            MemoryBudgetError: there is no less.
        """
        ...

    def report(self) -> dict[str, Any]:
        """What was planned and what was measured, ready for JSON."""
        ...

    def close(self) -> None:
        """Give back what waits on the host and the files; no phase follows."""
        ...


class AllOnDevice:
    """Every network lies on the device all the time."""

    def prepare(
        self, request: GenerateRequest, *, loras: StageLoras, prompts: Sequence[str], chat: Chat | None = None
    ) -> None:
        """See :class:`Memory`: there is nothing to decide."""

    def prepare_decoding(self, request: GenerateRequest) -> None:
        """See :class:`Memory`."""

    def convert(self, parts: Sequence[str], on_progress: OnProgress) -> None:
        """See :class:`Memory`: there is nothing to convert."""

    def step_down(self) -> bool:
        """See :class:`Memory`."""
        return False

    def phase(self, name: str) -> AbstractContextManager[PhaseRun]:
        """See :class:`Memory`."""
        return nullcontext(PhaseRun())

    def report(self) -> dict[str, Any]:
        """See :class:`Memory`."""
        return {"managed": False}

    def close(self) -> None:
        """See :class:`Memory`: the networks belong to others."""
