"""Which class computes each network, where its configuration comes from, and which keys are its own."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffsynth.errors import CheckpointError
from diffsynth.loader.key_names import NetworkKind, Shapes, belongs, gemma_key, gemma_vision_key
from diffsynth.loader.recognise import UNREAD_STATISTICS
from diffsynth.models import gemma3, gemma3_config, gemma3_vision
from diffsynth.models.ltx2 import (
    audio_vae,
    connectors,
    transformer,
    upsampler,
    video_vae,
    vocoder,
    vocoder_bwe,
)

logger = logging.getLogger(__name__)

Sections = Mapping[str, Any]
Configure = Callable[[Sections | None, Shapes], Any]

_SECTION_NAMES = frozenset({"transformer", "vae", "audio_vae", "vocoder"})


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """One network: ``module(configure(sections, shapes))`` builds it."""

    kind: NetworkKind
    module: Callable[[Any], nn.Module]
    configure: Configure
    """From the parsed metadata (None: there is none) and the shapes of the network's own official keys."""
    prefixes: Mapping[str, str]
    """Official prefix -> module prefix."""

    def module_key(self, name: str) -> str | None:
        """The module's name of an official key; None when the key is not one of this network's."""
        if self.kind is NetworkKind.GEMMA:
            return gemma_key(name)
        if self.kind is NetworkKind.GEMMA_VISION:
            return gemma_vision_key(name)
        if not belongs(self.kind, name) or name in UNREAD_STATISTICS:
            return None
        prefix = next(prefix for prefix in self.prefixes if name.startswith(prefix))
        return self.prefixes[prefix] + name.removeprefix(prefix)


def network_spec(kind: NetworkKind, names: Iterable[str]) -> NetworkSpec:
    """How to build a network from a file with these official key names.

    Raises:
        CheckpointError: a LoRA, which is no network of its own.
    """
    if kind is NetworkKind.LORA:
        raise CheckpointError(
            "a LoRA changes the transformer and is not loaded as a model",
            hint="pipe.load_lora(pipe.dit, PATH), or stage2_lora_config for the distilled LoRA",
        )
    if kind is NetworkKind.VOCODER:
        extended = any(name.startswith("vocoder.bwe_generator.") for name in names)
        return _VOCODER_BWE if extended else _VOCODER
    return _SPECS[kind]


def _by_section(
    section: str, stated: Callable[[Sections, Shapes], Any], infer: Callable[[Shapes], Any]
) -> Configure:
    """A configuration from ``section`` of the metadata where it is there, else from shapes."""

    def configure(sections: Sections | None, shapes: Shapes) -> Any:
        if sections is not None and section in sections:
            return stated(sections, shapes)
        logger.info("no metadata for the %s; its sizes are read from the tensor shapes", section)
        return infer(shapes)

    return configure


def _configure_upsampler(sections: Sections | None, shapes: Shapes) -> upsampler.UpsamplerConfig:
    """Its files state the configuration without a section around it."""
    if sections and not _SECTION_NAMES & sections.keys():
        return upsampler.UpsamplerConfig.from_sections(sections)
    return upsampler.UpsamplerConfig.infer(shapes)


def _configure_gemma(config: Sections | None, shapes: Shapes) -> gemma3_config.Gemma3Config:
    """``config`` is the ``config.json`` beside the shards."""
    if config is not None:
        return gemma3_config.Gemma3Config.from_dict(config)
    logger.info("no config.json beside the Gemma 3 weights; its sizes are read from the tensor shapes")
    return gemma3_config.Gemma3Config.infer(shapes)


def _configure_gemma_vision(config: Sections | None, shapes: Shapes) -> gemma3_vision.Gemma3VisionConfig:
    if config is not None:
        return gemma3_vision.Gemma3VisionConfig.from_dict(config)
    inside = {gemma_vision_key(name): shape for name, shape in shapes.items()}
    return gemma3_vision.Gemma3VisionConfig.infer({name: s for name, s in inside.items() if name})


_VOCODER = NetworkSpec(
    kind=NetworkKind.VOCODER,
    module=vocoder.Vocoder,
    configure=_by_section(
        "vocoder", lambda s, _: vocoder.VocoderConfig.from_sections(s), vocoder.VocoderConfig.infer
    ),
    prefixes=vocoder.KEY_PREFIXES,
)
_VOCODER_BWE = NetworkSpec(
    kind=NetworkKind.VOCODER,
    module=vocoder_bwe.VocoderBWE,
    configure=_by_section(
        "vocoder",
        lambda s, _: vocoder_bwe.VocoderBWEConfig.from_sections(s),
        vocoder_bwe.VocoderBWEConfig.infer,
    ),
    prefixes=vocoder_bwe.VocoderBWE.KEY_PREFIXES,
)
_VIDEO = _by_section(
    "vae", lambda s, _: video_vae.VideoVAEConfig.from_sections(s), video_vae.VideoVAEConfig.infer
)
_AUDIO = _by_section(
    "audio_vae", lambda s, _: audio_vae.AudioVAEConfig.from_sections(s), audio_vae.AudioVAEConfig.infer
)
_SPECS: Mapping[NetworkKind, NetworkSpec] = {
    spec.kind: spec
    for spec in (
        NetworkSpec(
            kind=NetworkKind.TRANSFORMER,
            module=transformer.LTX2Transformer,
            configure=_by_section(
                "transformer",
                transformer.TransformerConfig.from_sections,
                transformer.TransformerConfig.infer,
            ),
            prefixes=transformer.KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.TEXT_CONNECTORS,
            module=connectors.TextConnectors,
            configure=_by_section(
                "transformer",
                connectors.TextConnectorsConfig.from_sections,
                connectors.TextConnectorsConfig.infer,
            ),
            prefixes=connectors.KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.VIDEO_ENCODER,
            module=video_vae.VideoEncoder,
            configure=_VIDEO,
            prefixes=video_vae.ENCODER_KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.VIDEO_DECODER,
            module=video_vae.VideoDecoder,
            configure=_VIDEO,
            prefixes=video_vae.DECODER_KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.AUDIO_ENCODER,
            module=audio_vae.AudioEncoder,
            configure=_AUDIO,
            prefixes=audio_vae.ENCODER_KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.AUDIO_DECODER,
            module=audio_vae.AudioDecoder,
            configure=_AUDIO,
            prefixes=audio_vae.DECODER_KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.UPSAMPLER,
            module=upsampler.LatentUpsampler,
            configure=_configure_upsampler,
            prefixes=upsampler.KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.GEMMA,
            module=gemma3.Gemma3TextModel,
            configure=_configure_gemma,
            prefixes=gemma3_config.KEY_PREFIXES,
        ),
        NetworkSpec(
            kind=NetworkKind.GEMMA_VISION,
            module=gemma3_vision.Gemma3Vision,
            configure=_configure_gemma_vision,
            prefixes={},
        ),
    )
}
