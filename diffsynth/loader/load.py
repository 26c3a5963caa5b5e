"""From weight files to a network: found by content, checked key by key, read tensor by tensor."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.loader.key_names import NetworkKind, belongs, holds, official_names
from diffsynth.loader.meta import without_weights
from diffsynth.loader.networks import NetworkSpec, network_spec
from diffsynth.loader.recognise import SCALE_SUFFIXES, recognise, refuse_unsupported, unknown_keys
from diffsynth.loader.weight_files import WeightFiles

logger = logging.getLogger(__name__)

_OTHER_HALF: Mapping[NetworkKind, NetworkKind] = {
    NetworkKind.VIDEO_ENCODER: NetworkKind.VIDEO_DECODER,
    NetworkKind.VIDEO_DECODER: NetworkKind.VIDEO_ENCODER,
    NetworkKind.AUDIO_ENCODER: NetworkKind.AUDIO_DECODER,
    NetworkKind.AUDIO_DECODER: NetworkKind.AUDIO_ENCODER,
}
_INSPECT = "see what the file holds: `diffsynth inspect FILE`"


class StoredTensor(NamedTuple):
    """Where a parameter lies: its key in the files, and the key of its factor when it is quantised."""

    key: str
    scale_key: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkWeights:
    """A network located in files: everything is known about it and nothing is read yet."""

    kind: NetworkKind
    config: Any
    """The configuration object of the network's class."""
    files: WeightFiles
    entries: Mapping[str, StoredTensor]
    """Name in the module -> place in the files; exactly the names of the module's ``state_dict``."""
    spec: NetworkSpec

    def build(self) -> nn.Module:
        """The module on the meta device, in evaluation mode, without gradients."""
        with without_weights():
            module = self.spec.module(self.config)
        return module.eval().requires_grad_(False)

    def read(
        self,
        name: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        keep_float32: bool = False,
    ) -> Tensor:
        """Read one parameter.

        Args:
            name: its name in the module.
            dtype: of the result, for floating values; integers and booleans stay as they are.  Quantised
                weights are multiplied with their factor in float32 and rounded once.
            device: where the result goes; host memory then only holds a piece of it at a time.
            keep_float32: leave what the file stores as float32 (the scale-shift tables) in float32.

        Raises:
            CheckpointError: the file cannot be read, or the factor does not fit the weight.
        """
        key, scale_key = self.entries[name]
        stored = self.files.dtypes[key]
        if scale_key is not None:
            result = torch.empty(self.files.shapes[key], dtype=dtype, device=device)
            for rows, piece in self.pieces(name, dtype=dtype):
                result[rows].copy_(piece)
            return result
        floating = stored.startswith(("F", "BF"))
        as_stored = not floating or (keep_float32 and stored == "F32")
        return self.files.read(key, None if as_stored else dtype, device)

    def pieces(self, name: str, *, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Read one parameter in pieces of whole rows: what :meth:`read` gives, a few megabytes at a time.

        Yields:
            The range of rows and their values; the memory may be used again for the next piece.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        key, scale_key = self.entries[name]
        factors = None if scale_key is None else _factors(self.files, key, scale_key)
        for rows, piece in self.files.pieces(key):
            if factors is not None:
                piece = piece.float() * (factors[rows] if factors.ndim else factors)
            yield rows, piece.to(dtype)

    def is_float8(self, name: str) -> bool:
        """Whether the file stores the parameter as float8 e4m3; official fp8 files have a factor with it."""
        return self.files.dtypes[self.entries[name].key] == "F8_E4M3"

    def read_float8(self, name: str) -> tuple[Tensor, Tensor]:
        """A float8 e4m3 weight as it is stored, and its factors: :meth:`read` is their product.

        Returns:
            The weight (out, ...), every byte as in the file; (out,) float32 factors of its rows: the one of
            the file for all, or 1 where the file has none.

        Raises:
            CheckpointError: as :meth:`read`.
            ValueError: the parameter is stored otherwise.
        """
        if not self.is_float8(name):
            raise ValueError(f"{name} is not stored as float8 e4m3")
        key, scale_key = self.entries[name]
        factors = torch.ones(()) if scale_key is None else _factors(self.files, key, scale_key)
        return self.files.read(key), factors.reshape(-1).expand(self.files.shapes[key][0]).contiguous()

    @property
    def matrices(self) -> list[str]:
        """Names of all parameters with two dimensions that are called ``weight``."""
        return [
            name
            for name, entry in self.entries.items()
            if name.endswith(".weight") and len(self.files.shapes[entry.key]) == 2
        ]


def load_network(
    kind: NetworkKind,
    files: WeightFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    keep_float32: bool = False,
) -> nn.Module:
    """Read a network completely.

    Host memory needed is the size of the network in ``dtype`` and one piece of a tensor; with another device
    only the piece.

    Args:
        kind: which network of the files.
        files: the files, a state dict, or both.
        dtype: of all floating parameters and buffers.
        device: where the network goes.
        keep_float32: see :meth:`NetworkWeights.read`.

    Returns:
        The module in evaluation mode, without gradients.

    Raises:
        CheckpointError: see :func:`find_network`.
    """
    weights = find_network(kind, files)
    module = weights.build()
    tensors = {
        name: weights.read(name, dtype=dtype, device=device, keep_float32=keep_float32)
        for name in weights.entries
    }
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.requires_grad_(False)


def find_network(kind: NetworkKind, files: WeightFiles) -> NetworkWeights:
    """Locate a network in files and check names and shapes both ways, from the headers alone.

    Raises:
        CheckpointError: the files do not hold the network, lack some of its tensors, hold tensors that it
            does not have, state a configuration that is not supported, or are stored in a layout that
            cannot be read.
    """
    refuse_unsupported(files)
    names = official_names(files.shapes)
    if not holds(kind, names.values()):
        raise CheckpointError(f"{files.name} holds no {kind}", hint=_INSPECT)
    own = {key: name for key, name in names.items() if belongs(kind, name)}
    spec = network_spec(kind, own.values())
    sources = files.holding(own)
    beside = kind in (NetworkKind.GEMMA, NetworkKind.GEMMA_VISION)
    sections = _sidecar(sources.paths) if beside else sources.sections()
    # Without metadata the other half of an autoencoder, where it is there, completes the configuration.
    family = (kind, _OTHER_HALF.get(kind, kind))
    shapes = {name: files.shapes[key] for key, name in names.items() if any(belongs(k, name) for k in family)}
    config = spec.configure(sections, shapes)
    entries = _entries(spec, own)
    weights = NetworkWeights(kind=kind, config=config, files=files, entries=entries, spec=spec)
    expected = {name: tuple(tensor.shape) for name, tensor in weights.build().state_dict().items()}
    found = {name: files.shapes[entry.key] for name, entry in entries.items()}
    _compare(f"{files.name}: {kind}", expected, found)
    return weights


def sort_networks(sources: Iterable[WeightFiles]) -> dict[NetworkKind, WeightFiles]:
    """Which files fill which part of a pipeline, decided by what they hold.

    Parts of one network in several sources (projection and connectors apart, for instance) are put together.

    Raises:
        CheckpointError: a source holds nothing known or cannot be used; two sources hold the same tensors of
            a network, so that it is open which one is meant.
    """
    parts: dict[NetworkKind, WeightFiles] = {}
    for files in sources:
        unknown = unknown_keys(files)
        if unknown:
            logger.warning("%s: %d tensors are not used: %s", files.name, len(unknown), _some(unknown))
        for kind in recognise(files):
            other = parts.get(kind)
            if other is None:
                parts[kind] = files
                continue
            if _own_names(kind, other) & _own_names(kind, files):
                raise CheckpointError(
                    f"{other.name} and {files.name} both hold the {kind}", hint="give only one of them"
                )
            parts[kind] = WeightFiles.of((*other.sources, *files.sources))
    return parts


def _own_names(kind: NetworkKind, files: WeightFiles) -> set[str]:
    return {name for name in official_names(files.shapes).values() if belongs(kind, name)}


def _entries(spec: NetworkSpec, own: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Module names -> places in the files; companions of quantised weights go with their weight."""
    keys = {name: key for key, name in own.items()}
    weights: dict[str, str] = {}
    scales: dict[str, str] = {}
    for name, key in keys.items():
        suffix = next((s for s in SCALE_SUFFIXES if name.endswith(s)), "")
        base = f"{name.removesuffix(suffix)}.weight"
        if not suffix or base not in keys:
            weights[name] = key
        elif suffix == ".weight_scale":
            scales[base] = key
    inside = {name: spec.module_key(name) for name in weights}
    return {
        module_name: StoredTensor(weights[name], scales.get(name))
        for name, module_name in inside.items()
        if module_name is not None
    }


def _compare(
    where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Both key lists and all shapes must agree."""
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = (
        ("missing", sorted(expected.keys() - found.keys())),
        ("unexpected", sorted(found.keys() - expected.keys())),
        ("of another shape", wrong),
    )
    text = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems if keys)
    if text:
        raise CheckpointError(f"{where} does not fit its configuration: {text}", hint=_INSPECT)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def _sidecar(paths: Iterable[Path]) -> dict[str, Any] | None:
    """``config.json`` beside the shards, if there is one."""
    for path in paths:
        file = path.with_name("config.json")
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{file}: not JSON ({error})", hint="fetch the file again") from None
            return config if isinstance(config, dict) else None
    return None


def _factors(files: WeightFiles, key: str, scale_key: str) -> Tensor:
    """The scale of a weight in float32: without dimensions, or one per output row, shaped (out, 1, ...)."""
    scale = files.read(scale_key, torch.float32)
    shape = files.shapes[key]
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() != shape[0] or scale.shape[0] != shape[0]:
        raise CheckpointError(
            f"{files.name}: {scale_key} {list(scale.shape)} does not fit the weight {list(shape)}",
            hint="use the bf16 file of the same model",
        )
    return scale.reshape(-1, *[1] * (len(shape) - 1))
