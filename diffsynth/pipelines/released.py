"""The released checkpoints, as networks without data: sizes are known before anything is downloaded."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from typing import Any

import torch

from diffsynth.loader.meta import without_weights
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.ltx2.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from diffsynth.models.ltx2.connectors import TextConnectors, TextConnectorsConfig
from diffsynth.models.ltx2.transformer import LTX2Transformer, TransformerConfig
from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig
from diffsynth.models.ltx2.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from diffsynth.models.ltx2.vocoder import Vocoder, VocoderConfig
from diffsynth.models.ltx2.vocoder_bwe import VocoderBWE, VocoderBWEConfig
from diffsynth.pipelines.parts import NETWORKS, ModelVersion, Parts

FILES: Mapping[ModelVersion, str] = {"2.0": "ltx-2", "2.3": "ltx-2.3"}
"""Version -> name of its configuration; its upsampler's is ``NAME-spatial-upscaler-x2``."""
GEMMA = "gemma-3-12b-it"


def released_config(name: str) -> dict[str, Any]:
    """The configuration that a released file states, by its name without version numbers and suffix.

    ``ltx-2`` and ``ltx-2.3`` hold the sections of the single-file checkpoints, ``gemma-3-12b-it`` the
    ``config.json`` of the text model, the others the metadata of the latent upsamplers.
    """
    file = resources.files("diffsynth.models.ltx2") / "released" / f"{name}.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def released_parts(version: ModelVersion, dtype: torch.dtype = torch.bfloat16) -> Parts:
    """All networks of a released model on the meta device; no tokenizer."""
    config = released_config(FILES[version])
    upsampler = released_config(f"{FILES[version]}-spatial-upscaler-x2")
    video, audio = VideoVAEConfig.from_sections(config), AudioVAEConfig.from_sections(config)
    with without_weights():
        return Parts(
            device=torch.device("meta"),
            dtype=dtype,
            version=version,
            text_encoder=Gemma3TextModel(Gemma3Config.from_dict(released_config(GEMMA))),
            text_encoder_post_modules=TextConnectors(TextConnectorsConfig.from_sections(config)),
            dit=LTX2Transformer(TransformerConfig.from_sections(config)),
            video_vae_encoder=VideoEncoder(video),
            video_vae_decoder=VideoDecoder(video),
            audio_vae_encoder=AudioEncoder(audio),
            audio_vae_decoder=AudioDecoder(audio),
            audio_vocoder=_vocoder(config, version),
            upsampler=LatentUpsampler(UpsamplerConfig.from_sections(upsampler)),
        )


def completed(parts: Parts) -> Parts:
    """``parts`` with the released networks of the same version, on the meta device, where it has none."""
    released = released_parts(parts.version, parts.dtype)
    missing = {name: getattr(released, name) for name in NETWORKS if getattr(parts, name) is None}
    return replace(parts, **missing)


def _vocoder(config: Mapping[str, Any], version: ModelVersion) -> Vocoder | VocoderBWE:
    if version == "2.0":
        return Vocoder(VocoderConfig.from_sections(config))
    return VocoderBWE(VocoderBWEConfig.from_sections(config))
