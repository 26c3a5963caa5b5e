"""What a set of weight files holds, told by key names, shapes and metadata; never by file name or hash."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from diffsynth.errors import CheckpointError
from diffsynth.loader.key_names import (
    DIT,
    NetworkKind,
    Shapes,
    belongs,
    gemma_key,
    holds,
    is_gemma_other_part,
    kinds_in,
    official_names,
)
from diffsynth.loader.safetensors_file import DTYPE_BITS
from diffsynth.loader.weight_files import WeightFiles

__all__ = [
    "SCALE_SUFFIXES", "FileReport", "LoraReport", "NetworkKind", "NetworkReport", "Storage",
    "describe", "model_version", "recognise", "refuse_unsupported", "storage_of", "unknown_keys",
]  # fmt: skip

SCALE_SUFFIXES = (".weight_scale", ".input_scale")
"""Companions of a quantised ``.weight``: its factor, and a factor for activations that is not needed here."""
UNREAD_STATISTICS = frozenset(
    f"vae.per_channel_statistics.{name}"
    for name in ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel")
)
"""Tensors of the LTX-2 file that nothing reads."""

_BF16_HINT = "use the bf16 or the fp8 file of the same model"
_QUANTO_KEY = re.compile(r"\._(data|scale|shift)$|\.output_scale$")
_LORA_FORMATS: tuple[tuple[str, str], ...] = (
    ("kohya", r"^lora_unet_"),
    ("peft", r"^base_model\.model\."),
    ("comfyui", r"\.lora_(down|up)\.weight$"),
    ("diffsynth", r"\.lora_[AB]\.\w+\.weight$"),
    ("official", r"^(model\.)?diffusion_model\."),
    ("diffusers", r"^transformer\."),
)


_GATE = "transformer_blocks.0.attn1.to_gate_logits.weight"
_CONNECTOR = f"{DIT}video_embeddings_connector."
# A tensor that both models have, and one that only LTX-2.3 has beside it.
_VERSION_SIGNS = (
    (f"{DIT}patchify_proj.weight", f"{DIT}{_GATE}"),
    (f"{_CONNECTOR}learnable_registers", f"{_CONNECTOR}transformer_1d{_GATE.removeprefix('transformer')}"),
    ("text_embedding_projection.aggregate_embed.weight", ""),
    ("text_embedding_projection.video_aggregate_embed.weight",) * 2,
    ("vocoder.conv_pre.weight", ""),
    ("vocoder.bwe_generator.conv_pre.weight",) * 2,
    ("vae.decoder.conv_in.conv.weight", "vae.decoder.up_blocks.7.conv.conv.weight"),
)


class Storage(StrEnum):
    """How the linear weights are stored."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    FP8_SCALED = "fp8 with scales"
    FP8_PLAIN = "fp8 without scales"
    NVFP4 = "nvfp4"
    PACKED = "packed integers"


class NetworkReport(NamedTuple):
    """One network of a file."""

    kind: NetworkKind
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    """Stored dtype -> number of tensors."""
    storage: Storage


class LoraReport(NamedTuple):
    """A LoRA file."""

    format: str
    """official, bare peft, diffsynth, peft, comfyui, kohya or diffusers."""
    ranks: tuple[int, ...]
    targets: int
    """Layers that it changes."""
    has_alpha: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReport:
    """What ``diffsynth inspect`` tells.  ``problem`` is the reason why the files cannot be used, or empty."""

    paths: tuple[Path, ...]
    networks: tuple[NetworkReport, ...]
    version: str | None
    has_config: bool
    metadata: Mapping[str, str]
    lora: LoraReport | None
    unknown_keys: tuple[str, ...]
    problem: str
    hint: str


def recognise(files: WeightFiles) -> list[NetworkKind]:
    """The networks that the files hold.

    Raises:
        CheckpointError: nothing known, another model, or a layout that cannot be read; says which.
    """
    refuse_unsupported(files)
    kinds = kinds_in(official_names(files.shapes).values())
    if not kinds:
        raise CheckpointError(
            f"{files.name} holds nothing of LTX-2 (first keys: {files.keys[:3]})",
            hint="see what it holds: `diffsynth inspect FILE`",
        )
    return kinds


def describe(paths: str | Path | Iterable[str | Path]) -> FileReport:
    """Report on files taken together, from their headers alone; those that cannot be used are reported too.

    Raises:
        CheckpointError: a file cannot be read at all.
    """
    files = WeightFiles(paths)
    names = official_names(files.shapes)
    kinds = kinds_in(names.values())
    problem = hint = ""
    try:
        recognise(files)
    except CheckpointError as error:
        problem, hint = error.message, error.hint
    return FileReport(
        paths=files.paths,
        networks=tuple(_network_report(files, names, kind) for kind in kinds if kind is not NetworkKind.LORA),
        version=model_version(files),
        has_config="config" in files.metadata,
        metadata={key: text for key, text in files.metadata.items() if key != "config"},
        lora=_lora_report(files.shapes) if NetworkKind.LORA in kinds else None,
        unknown_keys=tuple(unknown_keys(files)),
        problem=problem,
        hint=hint,
    )


def unknown_keys(files: WeightFiles) -> list[str]:
    """Keys that no network of the files takes, nor any part of theirs that is never needed."""
    names = official_names(files.shapes)
    kinds = kinds_in(names.values())
    return [key for key, name in names.items() if not _is_known(name, kinds)]


def model_version(files: WeightFiles) -> str | None:
    """ "2.0" or "2.3", from the metadata, else from the structure; None where both models look alike.

    The audio autoencoder and the upsamplers leave no trace of the version.
    """
    stated = _stated_version(files)
    if stated is not None:
        return f"{stated[0]}.{stated[1]}" if stated >= (2, 3) else "2.0"
    shapes = {name: files.shapes[key] for key, name in official_names(files.shapes).items()}
    for sign, only_in_23 in _VERSION_SIGNS:
        if sign in shapes:
            return "2.3" if only_in_23 in shapes else "2.0"
    last_stage = shapes.get("vae.encoder.down_blocks.7.conv.conv.weight")
    if last_stage is not None:  # its multiplier is 2 in LTX-2 and 1 in LTX-2.3
        return "2.0" if last_stage[0] * 4 == last_stage[1] else "2.3"
    return None


def storage_of(dtypes: Mapping[str, str]) -> Storage:
    """How tensors, by any names, are stored; the most special layout among them counts."""
    weights = Counter(dtype for key, dtype in dtypes.items() if key.endswith(".weight"))
    if any(key.endswith(".weight_scale_2") for key in dtypes):
        return Storage.NVFP4
    if any(weights[dtype] for dtype in ("U8", "I8", "F4")) or any(map(_QUANTO_KEY.search, dtypes)):
        return Storage.PACKED
    if any(weights[dtype] for dtype in ("F8_E4M3", "F8_E5M2")):
        scaled = any(key.endswith(".weight_scale") for key in dtypes)
        return Storage.FP8_SCALED if scaled else Storage.FP8_PLAIN
    most = (weights or Counter(dtypes.values())).most_common(1)[0][0] if dtypes else "BF16"
    return {"F16": Storage.F16, "F32": Storage.F32}.get(most, Storage.BF16)


def refuse_unsupported(files: WeightFiles) -> None:
    """Raise for files that are known and cannot be used.

    Raises:
        CheckpointError: LTX-2.5 or LTX-Video, the diffusers naming, nvfp4 or packed integers.
    """
    names = list(official_names(files.shapes).values())
    if holds(NetworkKind.LORA, names):
        return
    stated = _stated_version(files)
    if stated is not None and stated > (2, 3):
        raise CheckpointError(
            f"{files.name} belongs to LTX-{stated[0]}.{stated[1]}, which is not supported",
            hint="use the files of Lightricks/LTX-2 or Lightricks/LTX-2.3",
        )
    if any(map(_is_diffusers_key, names)):
        raise CheckpointError(
            f"{files.name} uses the key names of the diffusers format",
            hint="use the single file of the same model, e.g. ltx-2-19b-dev.safetensors of Lightricks/LTX-2",
        )
    heads = {name.removeprefix(DIT).partition(".")[0] for name in names if name.startswith(DIT)}
    if "patchify_proj" in heads and "audio_patchify_proj" not in heads:
        raise CheckpointError(
            f"{files.name} holds an LTX-Video transformer: video only, without the audio stream of LTX-2",
            hint="use ltx-2-19b-dev.safetensors of Lightricks/LTX-2",
        )
    storage = storage_of(files.dtypes)
    if storage is Storage.NVFP4:
        raise CheckpointError(f"{files.name} is stored as nvfp4, which is not supported", hint=_BF16_HINT)
    if storage is Storage.PACKED:
        raise CheckpointError(
            f"{files.name} holds weights packed as integers (quanto or similar), which is not supported",
            hint=_BF16_HINT,
        )


def _stated_version(files: WeightFiles) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", files.metadata.get("model_version", ""))
    return (int(match[1]), int(match[2])) if match else None


def _is_diffusers_key(name: str) -> bool:
    marks = (".resnets.", "upsamplers.", "time_embed.", "video_connector.", "audio_connector.")
    return name in {"text_proj_in.weight", "latents_mean"} or any(
        mark in name if mark.startswith(".") else name.startswith(mark) for mark in marks
    )


def _is_known(name: str, kinds: list[NetworkKind]) -> bool:
    if NetworkKind.GEMMA in kinds and (gemma_key(name) is not None or is_gemma_other_part(name)):
        return True
    return any(belongs(kind, name) for kind in kinds)


def _network_report(files: WeightFiles, names: Mapping[str, str], kind: NetworkKind) -> NetworkReport:
    keys = [key for key, name in names.items() if belongs(kind, name) and name not in UNREAD_STATISTICS]
    weights = [key for key in keys if not key.endswith(SCALE_SUFFIXES)]
    return NetworkReport(
        kind=kind,
        tensors=len(keys),
        parameters=sum(math.prod(files.shapes[key]) for key in weights),
        bytes=sum(math.prod(files.shapes[key]) * DTYPE_BITS.get(files.dtypes[key], 8) // 8 for key in keys),
        dtypes=dict(Counter(files.dtypes[key] for key in keys)),
        storage=storage_of({key: files.dtypes[key] for key in keys}),
    )


def _lora_report(shapes: Shapes) -> LoraReport:
    down = {k: shape for k, shape in shapes.items() if re.search(r"\.lora_(A\.(\w+\.)?|down\.)weight$", k)}
    layers = {re.sub(r"\.(lora_\w+\..*|alpha|diff|diff_b|dora_scale)$", "", key) for key in shapes}
    found = (name for name, pattern in _LORA_FORMATS if any(re.search(pattern, key) for key in shapes))
    return LoraReport(
        format=next(found, "bare peft"),
        ranks=tuple(sorted({shape[0] for shape in down.values() if shape})),
        targets=len(layers),
        has_alpha=any(key.endswith(".alpha") for key in shapes),
    )
