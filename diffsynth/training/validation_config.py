"""Which clips are made on the way, as the configuration file states it."""

from dataclasses import dataclass
from pathlib import Path

from diffsynth.errors import RequestError
from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
from diffsynth.pipelines.presets import OFFICIAL_PRESETS
from diffsynth.request import GenerateRequest

_SETTINGS = {"num_frames": "frames", "frame_rate": "fps", "num_inference_steps": "steps"}
"""What a request names otherwise."""
_FIT = ", or fit=True (--fit)"
"""What a request advises, and the file has no setting for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationClip:
    """A clip that is made again and again while training goes on.

    Attributes:
        prompt: as for a generation; the trigger of the data is not put in front.
        image: first frame.
        reference: clip for an in-context LoRA.
        sound: sound that the video is made for.
        video: clip that the sound is made for.
    """

    prompt: str
    image: Path | None = None
    reference: Path | None = None
    sound: Path | None = None
    video: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSection:
    """When clips are made, and how.

    Attributes:
        every: steps between two rounds; one is made before the first step as well.
        clips: none make no rounds.
        negative_prompt: of all clips.
        width, height: pixels, multiples of 32.
        frames: 8k + 1.
        fps: frames per second.
        steps: of denoising.
        cfg_scale: plain guidance of picture and sound; the full guidance of the official pipelines if None.
        seed: of the noise, the same in every round.
    """

    every: int = 100
    clips: tuple[ValidationClip, ...] = ()
    negative_prompt: str = NEGATIVE_PROMPT
    width: int = 960
    height: int = 544
    frames: int = 89
    fps: float = 24.0
    steps: int = 30
    cfg_scale: float | None = None
    seed: int = 42

    @property
    def texts(self) -> list[str]:
        """Everything that has to be encoded."""
        return [*(clip.prompt for clip in self.clips), self.negative_prompt] if self.clips else []

    def check(self) -> None:
        """Raise RequestError, naming the setting, for a value that cannot work."""
        if self.every < 1:
            raise RequestError(f"every={self.every}", hint="1 or more steps")
        for request in self.requests("2.0", audio_only=False, reference_scale=1):
            try:
                request.validate()
            except RequestError as error:
                name, is_equal, value = error.message.partition("=")
                message = f"{_SETTINGS.get(name, name)}{is_equal}{value}"
                raise RequestError(message, hint=error.hint.removesuffix(_FIT)) from error

    def requests(
        self, version: str, *, audio_only: bool, reference_scale: int, reference_temporal_scale: int = 1
    ) -> tuple[GenerateRequest, ...]:
        """One per clip.

        Args:
            version: of the model, "2.0" or "2.3"; it decides the official guidance.
            audio_only: no pictures are trained.
            reference_scale: width and height of the clips, divided by those of their references.
            reference_temporal_scale: their frames alike.
        """
        preset = OFFICIAL_PRESETS[version]
        full = self.cfg_scale is None
        return tuple(
            GenerateRequest(
                prompt=clip.prompt,
                negative_prompt=self.negative_prompt,
                height=self.height,
                width=self.width,
                num_frames=self.frames,
                frame_rate=self.fps,
                seed=self.seed,
                num_inference_steps=self.steps,
                cfg_scale=self.cfg_scale,
                video_guidance=preset.video_guidance if full else None,
                audio_guidance=preset.audio_guidance if full else None,
                input_images=_names(clip.image),
                in_context_videos=_names(clip.reference),
                in_context_downsample_factor=reference_scale if clip.reference is not None else None,
                in_context_temporal_factor=reference_temporal_scale if clip.reference is not None else None,
                retake_audio=None if clip.sound is None else str(clip.sound),
                retake_video=None if clip.video is None else str(clip.video),
                audio_only=audio_only,
            )
            for clip in self.clips
        )


def _names(path: Path | None) -> tuple[str, ...]:
    return () if path is None else (str(path),)
