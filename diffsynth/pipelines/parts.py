"""The networks of a pipeline by the names of the public API, and what to say when one is missing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_vision import Gemma3Vision
from diffsynth.models.ltx2.audio_vae import AudioDecoder, AudioEncoder
from diffsynth.models.ltx2.connectors import TextConnectors
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.models.ltx2.upsampler import LatentUpsampler
from diffsynth.models.ltx2.video_vae import PerChannelStatistics, VideoDecoder, VideoEncoder
from diffsynth.models.ltx2.vocoder import Vocoder
from diffsynth.models.ltx2.vocoder_bwe import VocoderBWE
from diffsynth.pipelines.enhanced_cache import EnhancedPromptCache
from diffsynth.pipelines.phases import AllOnDevice, Memory
from diffsynth.pipelines.prompt_cache import PromptCache

ModelVersion = Literal["2.0", "2.3"]

NETWORKS = (
    *("text_encoder", "picture_encoder", "text_encoder_post_modules", "dit"),
    *("video_vae_encoder", "video_vae_decoder"),
    *("audio_vae_encoder", "audio_vae_decoder", "audio_vocoder", "upsampler"),
)
"""Parts that hold weights."""


@dataclass(kw_only=True)
class Parts:
    """Networks of one model version, on one device, computing in one dtype.  Any may be missing."""

    device: torch.device
    dtype: torch.dtype
    version: ModelVersion = "2.0"
    tokenizer: PromptTokenizer | None = None
    text_encoder: Gemma3TextModel | None = None
    picture_encoder: Gemma3Vision | None = None
    """Of the text model; only prompt enhancement looks at pictures."""
    text_encoder_post_modules: TextConnectors | None = None
    dit: LTX2Transformer | None = None
    video_vae_encoder: VideoEncoder | None = None
    video_vae_decoder: VideoDecoder | None = None
    audio_vae_encoder: AudioEncoder | None = None
    audio_vae_decoder: AudioDecoder | None = None
    audio_vocoder: Vocoder | VocoderBWE | None = None
    upsampler: LatentUpsampler | None = None
    video_statistics: PerChannelStatistics | None = None
    """Of the video latent; always on the device, whichever half of the autoencoder it came with."""
    memory: Memory = field(default_factory=AllOnDevice)
    prompt_cache: PromptCache | None = None
    enhanced_cache: EnhancedPromptCache | None = None

    def require(self, names: Iterable[str]) -> None:
        """Check that parts are there.

        Raises:
            CheckpointError: it names each missing part and a file that holds it.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            wanted = "; ".join(f"{name} ({WHERE[name].format(self._files)})" for name in missing)
            raise CheckpointError(
                f"missing: {', '.join(missing)}", hint=f"add to model_configs (--checkpoint): {wanted}"
            )

    def loaded(self) -> list[str]:
        """Names of the parts that are there."""
        skipped = {"device", "dtype", "version", "memory", "prompt_cache", "enhanced_cache"}
        return [f.name for f in fields(self) if f.name not in skipped and getattr(self, f.name) is not None]

    @property
    def has_audio(self) -> bool:
        """Whether the transformer makes sound; assumed of one that is not there."""
        return self.dit is None or self.dit.config.has_audio

    @property
    def _files(self) -> str:
        return "LTX-2" if self.version == "2.0" else "LTX-2.3"


WHERE: Mapping[str, str] = {
    "tokenizer": "tokenizer_config=ModelConfig(model_id='google/gemma-3-12b-it-qat-q4_0-unquantized')",
    "text_encoder": "google/gemma-3-12b-it-qat-q4_0-unquantized, model-*.safetensors",
    "picture_encoder": "google/gemma-3-12b-it-qat-q4_0-unquantized, model-*.safetensors",
    "text_encoder_post_modules": "a Lightricks/{0} checkpoint, or text_encoder_post_modules.safetensors of "
    "DiffSynth-Studio/{0}-Repackage",
    "dit": "a Lightricks/{0} checkpoint, or transformer.safetensors of DiffSynth-Studio/{0}-Repackage",
    "video_vae_encoder": "a Lightricks/{0} checkpoint, or video_vae_encoder.safetensors of "
    "DiffSynth-Studio/{0}-Repackage",
    "video_vae_decoder": "a Lightricks/{0} checkpoint, or video_vae_decoder.safetensors of "
    "DiffSynth-Studio/{0}-Repackage",
    "audio_vae_encoder": "a Lightricks/{0} checkpoint, or audio_vae_encoder.safetensors of "
    "DiffSynth-Studio/{0}-Repackage",
    "audio_vae_decoder": "a Lightricks/{0} checkpoint, or audio_vae_decoder.safetensors of "
    "DiffSynth-Studio/{0}-Repackage",
    "audio_vocoder": "a Lightricks/{0} checkpoint, or audio_vocoder.safetensors of "
    "DiffSynth-Studio/{0}-Repackage",
    "upsampler": "Lightricks/{0}, the spatial upscaler x2",
    "video_statistics": "a Lightricks/{0} checkpoint, or video_vae_decoder.safetensors of "
    "DiffSynth-Studio/{0}-Repackage",
}
"""Part -> a file that holds it."""
