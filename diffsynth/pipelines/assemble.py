"""From model configurations to the parts of a pipeline: open, recognise, check that all fit, load."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.errors import CheckpointError, RequestError
from diffsynth.loader import (
    ModelConfig,
    NetworkKind,
    NetworkWeights,
    WeightFiles,
    find_network,
    load_network,
    model_version,
    sort_networks,
)
from diffsynth.loader.meta import without_weights
from diffsynth.lora import Lora, linear_shapes, read_lora
from diffsynth.models.ltx2.upsampler import UpsamplerConfig
from diffsynth.models.ltx2.video_vae import PerChannelStatistics
from diffsynth.pipelines.parts import ModelVersion, Parts

logger = logging.getLogger(__name__)

PART_OF: Mapping[NetworkKind, str] = {
    NetworkKind.GEMMA: "text_encoder",
    NetworkKind.GEMMA_VISION: "picture_encoder",
    NetworkKind.TEXT_CONNECTORS: "text_encoder_post_modules",
    NetworkKind.TRANSFORMER: "dit",
    NetworkKind.VIDEO_ENCODER: "video_vae_encoder",
    NetworkKind.VIDEO_DECODER: "video_vae_decoder",
    NetworkKind.AUDIO_ENCODER: "audio_vae_encoder",
    NetworkKind.AUDIO_DECODER: "audio_vae_decoder",
    NetworkKind.VOCODER: "audio_vocoder",
    NetworkKind.UPSAMPLER: "upsampler",
}
"""Network -> its name in the pipeline."""
DECODERS = ("video_vae_decoder", "audio_vae_decoder", "audio_vocoder")
"""All that it takes to go on from final latents."""

MODEL_NAMES: Mapping[str, str] = {"2.0": "LTX-2", "2.3": "LTX-2.3"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """Parts, and where each came from."""

    parts: Parts
    sources: Mapping[str, str]
    """Part -> name of its file."""
    paths: Mapping[str, tuple[Path, ...]]
    """Part -> its files, as they were given or where they were put; none for weights in memory."""

    @property
    def says_distilled(self) -> bool:
        """Whether the file of the transformer calls itself distilled; nothing inside a file tells."""
        return "distilled" in self.sources.get("dit", "").lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedModels:
    """All files opened and found to fit together; no weight is read yet."""

    networks: Mapping[NetworkKind, NetworkWeights]
    configs: Mapping[NetworkKind, ModelConfig]
    """Network -> the configuration that named its file."""
    version: ModelVersion
    tokenizer: PromptTokenizer | None

    def only(self, names: Collection[str]) -> Self:
        """Without the networks whose public names are not among ``names``."""
        kept = {kind: weights for kind, weights in self.networks.items() if PART_OF[kind] in names}
        return replace(self, networks=kept)

    def outline(self, device: torch.device, dtype: torch.dtype) -> Assembly:
        """The parts without weights, on the meta device: enough to check a request or a LoRA against."""
        return self._assemble(device, dtype, lambda _, weights: weights.build())

    def hold(self, device: torch.device, dtype: torch.dtype) -> Assembly:
        """The parts without weights for a memory manager, but for the statistics of the video latent."""
        assembly = self.outline(device, dtype)
        for kind in (NetworkKind.VIDEO_DECODER, NetworkKind.VIDEO_ENCODER):
            if kind in self.networks:
                assembly.parts.video_statistics = _statistics(self.networks[kind], device, dtype)
                break
        return assembly

    def load(self, device: torch.device, dtype: torch.dtype) -> Assembly:
        """Read all weights."""

        for name in dict.fromkeys(weights.files.name for weights in self.networks.values()):
            own = [PART_OF[kind] for kind, weights in self.networks.items() if weights.files.name == name]
            logger.info("%s: %s", name, ", ".join(own))

        def read(kind: NetworkKind, weights: NetworkWeights) -> nn.Module:
            return load_network(kind, weights.files, dtype=dtype, device=device)

        return self._assemble(device, dtype, read)

    def _assemble(
        self,
        device: torch.device,
        dtype: torch.dtype,
        make: Callable[[NetworkKind, NetworkWeights], nn.Module],
    ) -> Assembly:
        parts = Parts(device=device, dtype=dtype, version=self.version, tokenizer=self.tokenizer)
        for kind, weights in self.networks.items():
            setattr(parts, PART_OF[kind], make(kind, weights))
        half = parts.video_vae_decoder or parts.video_vae_encoder
        parts.video_statistics = None if half is None else half.per_channel_statistics
        sources = {PART_OF[kind]: _shown(weights.files) for kind, weights in self.networks.items()}
        paths = {PART_OF[kind]: weights.files.paths for kind, weights in self.networks.items()}
        return Assembly(parts=parts, sources=sources, paths=paths)


def open_models(
    model_configs: Sequence[ModelConfig], tokenizer_config: ModelConfig | None = None
) -> OpenedModels:
    """Open everything that the configurations name: headers and the tokenizer, no weights.

    Raises:
        RequestError: a configuration that cannot work, or none at all.
        CheckpointError: files that are missing, damaged, unknown, given twice, or of two model versions.
        DownloadError: a file could not be fetched.
    """
    if not model_configs:
        raise RequestError(
            "model_configs is empty",
            hint="model_configs=[ModelConfig(path='ltx-2-19b-dev.safetensors'), ...]",
        )
    for config in [*model_configs, *([tokenizer_config] if tokenizer_config else [])]:
        config.validate()
    opened = [config.open() for config in model_configs]
    version = _common_version(opened)
    sorted_files = sort_networks(opened)
    vision = _locate_vision(sorted_files.pop(NetworkKind.GEMMA_VISION, None))
    networks = {kind: _locate(kind, files) for kind, files in sorted_files.items()} | vision
    if NetworkKind.UPSAMPLER in networks and NetworkKind.TRANSFORMER in networks:
        _check_upsampler(networks[NetworkKind.UPSAMPLER], version)
    tokenizer = None if tokenizer_config is None else PromptTokenizer(_folder(tokenizer_config.resolve()))
    configs = {
        kind: next(c for c, files in zip(model_configs, opened, strict=True) if _shares(files, weights.files))
        for kind, weights in networks.items()
    }
    return OpenedModels(networks=networks, configs=configs, version=version, tokenizer=tokenizer)


def _shares(files: WeightFiles, others: WeightFiles) -> bool:
    return any(source in others.sources for source in files.sources)


def _statistics(weights: NetworkWeights, device: torch.device, dtype: torch.dtype) -> PerChannelStatistics:
    prefix = "per_channel_statistics."
    own = [name for name in weights.entries if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): weights.read(name, dtype=dtype, device=device) for name in own}
    with without_weights():
        statistics = PerChannelStatistics(weights.config.latent_channels)
    statistics.load_state_dict(tensors, strict=True, assign=True)
    return statistics


def read_transformer_lora(parts: Parts, source: str | Path | ModelConfig | Mapping[str, Tensor]) -> Lora:
    """Read a LoRA for the transformer.

    Raises:
        CheckpointError: no transformer to put it on, or see :func:`~diffsynth.lora.read_lora`.
    """
    parts.require(["dit"])
    assert parts.dit is not None
    shapes = linear_shapes(parts.dit)
    if isinstance(source, ModelConfig):
        source.validate()
        source = source.state_dict if source.state_dict is not None else source.resolve()[0]
    return read_lora(source, shapes.keys(), shapes)


def is_spatial_x2(config: UpsamplerConfig) -> bool:
    """Whether an upsampler doubles height and width and leaves time alone."""
    return config.spatial_upsample and not config.temporal_upsample and config.spatial_scale == 2


def upsampler_version(config: UpsamplerConfig) -> ModelVersion | None:
    """The model that an upsampler belongs to: the spatial x2 of LTX-2 alone is a rational resampler.

    None for temporal upsamplers, which look alike.
    """
    if not config.spatial_upsample:
        return None
    return "2.0" if config.rational_resampler and is_spatial_x2(config) else "2.3"


def _locate(kind: NetworkKind, files: WeightFiles) -> NetworkWeights:
    if kind not in PART_OF:
        raise CheckpointError(
            f"{files.name} is a LoRA, not a model",
            hint="pipe.load_lora(pipe.dit, path) (--lora), or stage2_lora_config (--distilled-lora) for the "
            "distilled LoRA",
        )
    return find_network(kind, files)


def _locate_vision(files: WeightFiles | None) -> dict[NetworkKind, NetworkWeights]:
    """The vision tower of the text model, which nothing but prompt enhancement uses: one that cannot be read
    is left out."""
    kind = NetworkKind.GEMMA_VISION
    try:
        return {} if files is None else {kind: find_network(kind, files)}
    except CheckpointError as error:
        logger.warning("prompts are enhanced without looking at pictures: %s", error.message)
        return {}


def _common_version(opened: Sequence[WeightFiles]) -> ModelVersion:
    """The version that the files state or show; files that look alike in both count for neither."""
    versions = {files.name: model_version(files) for files in opened}
    known = {name: version for name, version in versions.items() if version is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} is {MODEL_NAMES[version]}" for name, version in known.items())
        raise CheckpointError(f"files of two models: {listed}", hint="take all files from one model")
    return "2.3" if "2.3" in known.values() else "2.0"


def _check_upsampler(upsampler: NetworkWeights, version: ModelVersion) -> None:
    made_for = upsampler_version(upsampler.config)
    if made_for is not None and made_for != version:
        raise CheckpointError(
            f"{upsampler.files.name} belongs to {MODEL_NAMES[made_for]}, the model is {MODEL_NAMES[version]}",
            hint=f"the spatial upscaler x2 of Lightricks/{MODEL_NAMES[version]}",
        )


def _shown(files: WeightFiles) -> str:
    """File names without their folders: they end up in videos that people publish."""
    names = [path.name for path in files.paths]
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else (names or [files.name])[0]


def _folder(resolved: Sequence[Path]) -> Path:
    path = Path(resolved[0])
    return path if path.is_dir() else path.parent
