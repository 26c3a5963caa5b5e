"""What a generation works on: the request with its inputs, and what the units have made so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from PIL import Image
from torch import Tensor

from diffsynth.conditioning.items import ConditioningItem
from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.text import PromptContext
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.progress import OnProgress, Progress, ignore
from diffsynth.pipelines.stages import Stage
from diffsynth.request import GenerateRequest
from diffsynth.sampling.conventions import Conventions
from diffsynth.sampling.loops import Carry
from diffsynth.sampling.noise import NoiseSource
from diffsynth.utils.audio import Waveform


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """Where a denoising loop goes on that did not come to its end: its noise is drawn only once.

    ``estimates``: x0 by stream of the last finished step, which a stream that sits out the next one needs;
    ``carry``: what else the sampler needs.
    """

    video: ModalityState | None
    audio: ModalityState | None
    next_step: int
    estimates: Mapping[str, Tensor] = field(default_factory=dict)
    carry: Carry = field(default_factory=Carry)


@dataclass(kw_only=True)
class GenerationState:
    """Filled unit by unit.

    Attributes:
        noise: the run's one source of noise; it moves on with every draw.
        contexts: by prompt, those that are known already.
        enhanced_prompt: what the text model made of the prompt.
        positive, negative: contexts of the prompts, on the host; ``negative`` stays None when nothing is
            guided.
        video_items, audio_items: conditionings of the coming stage.
        video_latent, audio_latent: normalised latents (1, C, F, H, W) and (1, C, T, M): the start of the
            coming stage, then its result.
        audio_shape: (1, C, T, M) of the audio latent; None for a model without sound.
        unfinished: how far the present denoising loop has come; None between stages.
        frames: decoded pictures; waveform: decoded sound.
    """

    request: GenerateRequest
    inputs: Inputs
    conventions: Conventions
    stages: tuple[Stage, ...]
    noise: NoiseSource
    audio_shape: tuple[int, int, int, int] | None = None
    on_progress: OnProgress = ignore
    contexts: dict[str, PromptContext] = field(default_factory=dict)
    enhanced_prompt: str | None = None
    positive: PromptContext | None = None
    negative: PromptContext | None = None
    video_items: list[ConditioningItem] = field(default_factory=list)
    audio_items: list[ConditioningItem] = field(default_factory=list)
    video_latent: Tensor | None = None
    audio_latent: Tensor | None = None
    unfinished: Unfinished | None = None
    frames: list[Image.Image] | None = None
    waveform: Waveform | None = None

    @property
    def prompted(self) -> GenerateRequest:
        """The request with the prompt that is encoded, as soon as it is known."""
        if self.enhanced_prompt is None:
            return self.request
        return replace(self.request, prompt=self.enhanced_prompt, enhance_prompt=False)

    def report(self, phase: str, done: int, total: int) -> None:
        """Tell the caller where a phase stands."""
        self.on_progress(Progress(phase=phase, done=done, total=total))
