"""What a generation gives back, with everything that is needed to write or repeat it."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from diffsynth.request import GenerateRequest
from diffsynth.utils.audio import Waveform


class VideoFrames(list[Image.Image]):
    """Frames as a plain list of RGB pictures that remembers its frame rate and the record of its making."""

    def __init__(self, frames: list[Image.Image], *, frame_rate: float, record: dict[str, Any]) -> None:
        super().__init__(frames)
        self.frame_rate = frame_rate
        self.record = record


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Frames, sound and the final latents of one generation.

    Attributes:
        frames: None when only sound was generated.
        waveform: None when the model has no audio.
        video_latent, audio_latent: normalised, (1, C, F, H, W) and (1, C, T, M).
        record: request, models and LoRAs, ready for JSON; it goes into the metadata of the file.
    """

    request: GenerateRequest
    frames: VideoFrames | None
    waveform: Waveform | None
    video_latent: Tensor | None
    audio_latent: Tensor | None
    record: dict[str, Any]

    @property
    def enhanced_prompt(self) -> str | None:
        """What the text model made of the prompt of the request; None when it was not asked to."""
        return self.record.get("enhanced_prompt")

    def audio_tensor(self) -> Tensor | None:
        """(2, samples) float32 on the CPU; its attribute ``sampling_rate`` is the rate in Hz."""
        if self.waveform is None:
            return None
        # A copy made here, outside the run's inference mode, may be changed in place by who gets it.
        samples = self.waveform.samples.clone()
        samples.sampling_rate = self.waveform.sampling_rate  # type: ignore[attr-defined]
        return samples
