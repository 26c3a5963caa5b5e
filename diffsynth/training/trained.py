"""What is trained: the factors of a LoRA, or all weights of the transformer; and the file of each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.loader import NetworkWeights
from diffsynth.lora.official import official_metadata, official_tensors
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.training.adapters import TrainableLora
from diffsynth.training.samples import save_tensors


class Trained(Protocol):
    """See the module."""

    name: ClassVar[str]
    """Beginning of the names of its files."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, in an order that is always the same."""
        ...

    def save(
        self, path: Path, values: Mapping[str, Tensor], dtype: torch.dtype, record: Mapping[str, object]
    ) -> None:
        """Write values of the parameters as a file that generation loads.

        Args:
            path: a new file.
            values: by the names of :meth:`parameters`.
            dtype: of the file.
            record: what made it, ready for JSON.

        Raises:
            OutputError: the folder is not writable or the disk is full.
        """
        ...

    def detach(self) -> None:
        """Nothing more is trained."""
        ...


class TrainedLora:
    """Factors over a frozen base; the file has the official key format."""

    name: ClassVar[str] = "lora"

    def __init__(
        self, lora: TrainableLora, base_model: str, reference_factors: tuple[int, int] | None = None
    ) -> None:
        """The last two as in :func:`~diffsynth.lora.official.official_metadata`."""
        self.lora = lora
        self._base_model = base_model
        self._reference_factors = reference_factors

    def parameters(self) -> dict[str, nn.Parameter]:
        """See :class:`Trained`."""
        return self.lora.parameters()

    def save(
        self, path: Path, values: Mapping[str, Tensor], dtype: torch.dtype, record: Mapping[str, object]
    ) -> None:
        """See :class:`Trained`."""
        tensors = official_tensors(self.lora.updates(values), dtype)
        save_tensors(path, tensors, official_metadata(self._base_model, record, self._reference_factors))

    def detach(self) -> None:
        """See :class:`Trained`."""
        self.lora.detach()


class TrainedModel:
    """All weights of the transformer; the file is a single-file checkpoint like the one that it began as."""

    name: ClassVar[str] = "model"

    def __init__(self, network: LTX2Transformer, weights: NetworkWeights) -> None:
        """
        Args:
            network: float32; it learns from here on.
            weights: where it was read from.

        Raises:
            CheckpointError: the weights are stored with factors, and could not be written back.
        """
        if any(entry.scale_key is not None for entry in weights.entries.values()):
            raise CheckpointError(
                f"{weights.files.name} is quantised: its weights cannot be trained", hint="a bf16 checkpoint"
            )
        self._network = network.requires_grad_(True)
        self._weights = weights

    def parameters(self) -> dict[str, nn.Parameter]:
        """See :class:`Trained`."""
        return dict(self._network.named_parameters())

    def save(
        self, path: Path, values: Mapping[str, Tensor], dtype: torch.dtype, record: Mapping[str, object]
    ) -> None:
        """See :class:`Trained`.

        Other networks of the files go along as they are, with the configuration; what was stored as float32
        stays so.
        """
        files, entries = self._weights.files, self._weights.entries
        own = {
            entries[name].key: value.detach().to(
                "cpu", torch.float32 if files.dtypes[entries[name].key] == "F32" else dtype
            )
            for name, value in values.items()
        }
        tensors = {key: own[key].contiguous() if key in own else files.read(key) for key in files.keys}
        save_tensors(path, tensors, files.metadata | {"training": json.dumps(record, ensure_ascii=False)})

    def detach(self) -> None:
        """See :class:`Trained`."""
        self._network.requires_grad_(False)
