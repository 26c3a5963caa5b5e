"""Numbers of the official pipelines: what their commands use where nothing is said.

Source: official ltx-pipelines 1.0.0.  The public Python API has its own defaults, with plain guidance; full
guidance is ``pipe(..., video_guidance=preset.video_guidance, audio_guidance=preset.audio_guidance)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffsynth.guidance_params import GuidanceParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Defaults of the guided pipelines.

    ``height`` and ``width`` in pixels are those of one stage; two stages end at twice as much.
    ``frame_rate`` in frames per second.
    """

    num_inference_steps: int
    video_guidance: GuidanceParams
    audio_guidance: GuidanceParams
    height: int = 512
    width: int = 768
    num_frames: int = 121
    frame_rate: float = 24.0
    seed: int = 10


def _guided(steps: int, stg_block: int) -> Preset:
    video = GuidanceParams(
        cfg_scale=3.0, stg_scale=1.0, stg_blocks=(stg_block,), rescale_scale=0.7, modality_scale=3.0
    )
    return Preset(
        num_inference_steps=steps, video_guidance=video, audio_guidance=replace(video, cfg_scale=7.0)
    )


OFFICIAL_PRESETS: Mapping[str, Preset] = {"2.0": _guided(40, 29), "2.3": _guided(30, 28)}
"""By version of the model, "2.0" or "2.3"."""

HQ_PRESET = Preset(
    num_inference_steps=15,
    video_guidance=GuidanceParams(cfg_scale=3.0, rescale_scale=0.45, modality_scale=3.0),
    audio_guidance=GuidanceParams(cfg_scale=7.0, rescale_scale=1.0, modality_scale=3.0),
    height=544,
    width=960,
)
"""Of the two-stage pipeline with res_2s, made for LTX-2.3."""
HQ_LORA_STRENGTHS = (0.25, 0.5)
"""Of the distilled LoRA in the two stages of that pipeline."""
