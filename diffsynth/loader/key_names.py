"""The networks of a checkpoint and the key names under which files hold them.

The official single files put all networks under fixed prefixes.  Other programs ship parts of them with the
prefixes removed; :func:`official_names` gives every key its official name back, so that everything after it
knows one naming only.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType

from diffsynth.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


class NetworkKind(StrEnum):
    """What a weight file can hold."""

    TRANSFORMER = "transformer"
    TEXT_CONNECTORS = "text connectors"
    VIDEO_ENCODER = "video encoder"
    VIDEO_DECODER = "video decoder"
    AUDIO_ENCODER = "audio encoder"
    AUDIO_DECODER = "audio decoder"
    VOCODER = "vocoder"
    UPSAMPLER = "latent upsampler"
    GEMMA = "Gemma 3"
    GEMMA_VISION = "Gemma 3 vision"
    LORA = "LoRA"


DIT = "model.diffusion_model."
_CONNECTORS = (f"{DIT}video_embeddings_connector.", f"{DIT}audio_embeddings_connector.")
VIDEO_STATISTICS = "vae.per_channel_statistics."
AUDIO_STATISTICS = "audio_vae.per_channel_statistics."

OFFICIAL_PREFIXES: Mapping[NetworkKind, tuple[str, ...]] = MappingProxyType(
    {
        NetworkKind.TRANSFORMER: (DIT,),
        NetworkKind.TEXT_CONNECTORS: ("text_embedding_projection.", *_CONNECTORS),
        NetworkKind.VIDEO_ENCODER: ("vae.encoder.", VIDEO_STATISTICS),
        NetworkKind.VIDEO_DECODER: ("vae.decoder.", VIDEO_STATISTICS),
        NetworkKind.AUDIO_ENCODER: ("audio_vae.encoder.", AUDIO_STATISTICS),
        NetworkKind.AUDIO_DECODER: ("audio_vae.decoder.", AUDIO_STATISTICS),
        NetworkKind.VOCODER: ("vocoder.",),
        NetworkKind.UPSAMPLER: (
            *("initial_conv.", "initial_norm.", "res_blocks.", "upsampler."),
            *("post_upsample_res_blocks.", "final_conv."),
        ),
    }
)
"""Where the official files hold each network.  The statistics belong to both halves of an autoencoder; alone
they are neither.  Gemma 3 has several namings, see :func:`gemma_key`."""

EXCLUDED_PREFIXES: Mapping[NetworkKind, tuple[str, ...]] = MappingProxyType(
    {NetworkKind.TRANSFORMER: _CONNECTORS}
)
"""Keys below a prefix that belong to another network."""

_GEMMA_KEY = re.compile(
    r"(?:language_model\.model\.|model\.language_model\.|model\.|)((?:embed_tokens|layers\.\d+|norm)\..+)"
)
_GEMMA_LAYER = re.compile(r"layers\.\d+\.pre_feedforward_layernorm\.weight")
_GEMMA_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|language_model\.lm_head|lm_head)\."
)
_GEMMA_VISION_KEY = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)")
_GEMMA_PROJECTOR_KEY = re.compile(r"(?:model\.)?(multi_modal_projector\..+)")
_LORA_KEY = re.compile(
    r"\.(lora_A|lora_B)\.(\w+\.)?weight$|\.(lora_down|lora_up)\.weight$|\.(alpha|diff|diff_b|dora_scale)$"
)

_TRANSFORMER_HEADS = frozenset(
    f"{audio}{name}"
    for audio in ("", "audio_")
    for name in (
        *("patchify_proj", "proj_out", "scale_shift_table", "caption_projection"),
        *("adaln_single", "prompt_adaln_single"),
    )
) | {
    "transformer_blocks",
    "av_ca_video_scale_shift_adaln_single",
    "av_ca_audio_scale_shift_adaln_single",
    "av_ca_a2v_gate_adaln_single",
    "av_ca_v2a_gate_adaln_single",
}  # fmt: skip
_CONNECTOR_HEADS = frozenset({"video_embeddings_connector", "audio_embeddings_connector"})
_PROJECTION_HEADS = frozenset({"aggregate_embed", "video_aggregate_embed", "audio_aggregate_embed"})
_VOCODER_HEADS = frozenset({"conv_pre", "conv_post", "ups", "resblocks", "act_post"})
_BWE_HEADS = frozenset({"vocoder", "bwe_generator", "mel_stft"})
_STATISTICS_HEAD = "per_channel_statistics"
# First part of the keys of half an autoencoder, which alone tells which half of which one it is.
_HALVES = {
    "down_blocks": "vae.encoder.",
    "up_blocks": "vae.decoder.",
    "down": "audio_vae.encoder.",
    "up": "audio_vae.decoder.",
}
_AUTOENCODER_OF_RANK = {5: "vae.", 4: "audio_vae."}


def official_names(shapes: Shapes) -> dict[str, str]:
    """File key -> the name that the official single file gives it; keys of unknown parts stay as they are.

    Accepts the official names, those without ``model.diffusion_model.`` or ``model.``, the connectors and the
    projection alone, the autoencoders without ``vae.`` and ``audio_vae.``, one half of them without any
    prefix, and the vocoders without ``vocoder.``.

    Raises:
        CheckpointError: two keys mean the same tensor.
    """
    added = _prefixes_of_heads(shapes)
    names = {key: added.get(_head(key), "") + key for key in shapes}
    seen: dict[str, str] = {}
    for key, name in names.items():
        if name in seen:
            raise CheckpointError(
                f"{seen[name]!r} and {key!r} are the same tensor, with and without a prefix",
                hint="use a file of one part of the model",
            )
        seen[name] = key
    return names


def _prefixes_of_heads(shapes: Shapes) -> dict[str, str]:
    """First part of a key -> what stands before it in the official file."""
    heads = {_head(key) for key in shapes}
    added = dict.fromkeys(heads & _CONNECTOR_HEADS, DIT)
    added.update(dict.fromkeys(heads & _PROJECTION_HEADS, "text_embedding_projection."))
    if "diffusion_model" in heads:
        added["diffusion_model"] = "model."
    if {"transformer_blocks", "patchify_proj"} <= heads:
        added.update(dict.fromkeys(heads & _TRANSFORMER_HEADS, DIT))
    if "conv_pre" in heads and "ups" in heads:
        added.update(dict.fromkeys(heads & _VOCODER_HEADS, "vocoder."))
    if "bwe_generator" in heads:
        added.update(dict.fromkeys(heads & _BWE_HEADS, "vocoder."))
    added.update(_autoencoder_prefixes(shapes, heads))
    return added


def _autoencoder_prefixes(shapes: Shapes, heads: set[str]) -> dict[str, str]:
    added: dict[str, str] = {}
    for head in ("encoder", "decoder"):
        rank = len(shapes.get(f"{head}.conv_in.conv.weight", ()))
        if rank in _AUTOENCODER_OF_RANK:
            added[head] = added[_STATISTICS_HEAD] = _AUTOENCODER_OF_RANK[rank]
    half = next((prefix for head, prefix in _HALVES.items() if head in heads), None)
    if half is not None and "conv_in" in heads:
        added.update(dict.fromkeys(heads & {*_HALVES, "conv_in", "conv_out", "mid"}, half))
        added[_STATISTICS_HEAD] = half.split(".")[0] + "."
    return added


def _head(key: str) -> str:
    return key.partition(".")[0]


def gemma_key(key: str) -> str | None:
    """The name of a Gemma 3 text tensor below its prefix; None for anything else."""
    match = _GEMMA_KEY.fullmatch(key)
    return match[1] if match else None


def gemma_vision_key(key: str) -> str | None:
    """The name of a tensor of Gemma 3's vision tower or projector in its module; None for anything else."""
    tower = _GEMMA_VISION_KEY.fullmatch(key)
    if tower:
        return f"vision_model.{tower[1]}"
    projector = _GEMMA_PROJECTOR_KEY.fullmatch(key)
    return projector[1] if projector else None


def is_gemma_other_part(key: str) -> bool:
    """Whether a key belongs to the vision tower, the projector or the head, which encoding never needs."""
    return _GEMMA_OTHER_PARTS.match(key) is not None


def is_lora_key(key: str) -> bool:
    """Whether a key is that of a LoRA tensor in any known format."""
    return _LORA_KEY.search(key) is not None


def kinds_in(names: Iterable[str]) -> list[NetworkKind]:
    """The networks of which ``names``, official ones, hold weights, in the order of :class:`NetworkKind`."""
    names = list(names)
    return [kind for kind in NetworkKind if holds(kind, names)]


def holds(kind: NetworkKind, names: Collection[str]) -> bool:
    """Whether ``names``, official ones, hold weights of a network; a LoRA is one only when all say so."""
    is_lora = bool(names) and all(is_lora_key(name) for name in names)
    if is_lora or kind is NetworkKind.LORA:
        return is_lora and kind is NetworkKind.LORA
    return any(_proves(kind, name) for name in names)


def belongs(kind: NetworkKind, name: str) -> bool:
    """Whether an official name is one of a network's, statistics included."""
    if kind is NetworkKind.GEMMA:
        return gemma_key(name) is not None
    if kind is NetworkKind.GEMMA_VISION:
        return gemma_vision_key(name) is not None
    if kind is NetworkKind.LORA:
        return is_lora_key(name)
    return name.startswith(OFFICIAL_PREFIXES[kind]) and not name.startswith(EXCLUDED_PREFIXES.get(kind, ()))


def _proves(kind: NetworkKind, name: str) -> bool:
    if kind is NetworkKind.GEMMA:
        key = gemma_key(name)
        return key is not None and _GEMMA_LAYER.fullmatch(key) is not None
    if kind is NetworkKind.GEMMA_VISION:
        return gemma_vision_key(name) == "multi_modal_projector.mm_soft_emb_norm.weight"
    if kind is NetworkKind.TRANSFORMER:
        return name.startswith((f"{DIT}transformer_blocks.", f"{DIT}patchify_proj."))
    if kind is NetworkKind.UPSAMPLER:
        return name.startswith(("upsampler.", "post_upsample_res_blocks."))
    return belongs(kind, name) and not name.startswith((VIDEO_STATISTICS, AUDIO_STATISTICS))
