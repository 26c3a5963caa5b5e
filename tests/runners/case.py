"""A golden case: tensors and metadata of one file, and the book-keeping of comparisons."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

FLOAT32_ALWAYS = re.compile(r"positions|sigma|timestep|mask|rope|waveform|per_channel_statistics")
"""Inputs that stay float32 whatever the networks compute in."""


class GoldenMismatch(AssertionError):
    """A computed tensor departs from the recorded one."""


class Tolerance(NamedTuple):
    atol: float
    rtol: float = 0.0


class Comparison(NamedTuple):
    name: str
    error: float
    share: float
    """Largest error as a share of what is allowed there; above 1 the comparison failed."""
    note: str = ""
    relative_rms: float = 0.0
    """RMS of the error over the RMS of what was expected."""


@dataclass
class Outcome:
    path: Path
    component: str
    status: Literal["passed", "failed", "later"]
    message: str = ""
    comparisons: list[Comparison] = field(default_factory=list)

    def line(self) -> str:
        worst = max(self.comparisons, key=lambda c: c.share, default=None)
        figures = ""
        if worst is not None:
            figures = f"  {len(self.comparisons)} compared, worst {worst.name}: "
            figures += f"{worst.error:.2e} = {worst.share:.1%} of the tolerance"
        message = f"  {self.message}" if self.message else ""
        return f"{self.status:6}  {self.path}  [{self.component}]{figures}{message}"

    def details(self, only_failures: bool) -> str:
        rows = [c for c in self.comparisons if not only_failures or c.share > 1]
        return "\n".join(f"        {c.name}: {c.error:.3e} ({c.share:.2%}) {c.note}" for c in rows)


class Case:
    """One golden file; its tensors are keyed ``weights/...``, ``in/...``, ``mid/...``, ``out/...``."""

    def __init__(self, path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.path = path
        self.meta = meta
        self.tensors = tensors
        self.comparisons: list[Comparison] = []
        self.dtype = torch.float32

    @classmethod
    def load(
        cls, path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "Case":
        """Read a file; weights and inputs go to ``device``, in ``dtype`` where networks compute in it."""
        if path.suffix == ".json":
            return cls(path, json.loads(path.read_text(encoding="utf-8")), {})
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = json.loads(metadata.get("case", "{}"))
        meta["metadata"] = {k: v for k, v in metadata.items() if k != "case"}
        for key, tensor in tensors.items():
            if key.startswith(("weights/", "in")):
                keeps = not tensor.is_floating_point() or FLOAT32_ALWAYS.search(key)
                if dtype is not None and not keeps:
                    # A bias of -float32.max would round to -inf in bfloat16.
                    limits = torch.finfo(dtype)
                    tensor = tensor.clamp(limits.min, limits.max).to(dtype)
                tensors[key] = tensor.to(device)
        case = cls(path, meta, tensors)
        case.dtype = dtype or torch.float32
        return case

    @property
    def component(self) -> str:
        return str(self.meta.get("component", ""))

    @property
    def variant(self) -> str:
        return str(self.meta.get("variant", ""))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below ``prefix``, with the prefix removed."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def weights(self) -> dict[str, Tensor]:
        """The checkpoint keys of the case, in float32 (every value is exact there) unless asked otherwise."""
        return {
            k: v.to(self.dtype) if v.is_floating_point() else v for k, v in self.group("weights/").items()
        }

    def tolerance(self, group: str | None = None) -> Tolerance:
        """As the case states it: a number, text that begins with one, ``{atol, rtol}``, or such per group."""
        stated = self.meta["tolerance"]
        if group is not None and isinstance(stated, Mapping) and group in stated:
            stated = stated[group]
        if isinstance(stated, Mapping):
            return Tolerance(float(stated["atol"]), float(stated.get("rtol", 0.0)))
        if isinstance(stated, str):
            match = re.match(r"[0-9.]+(e-?[0-9]+)?", stated)
            assert match, f"no number in the tolerance {stated!r}"
            return Tolerance(float(match.group()))
        return Tolerance(float(stated))

    def check(self, name: str, actual: Tensor, tolerance: Tolerance | None = None) -> None:
        """Compare with the recorded tensor ``name`` and go on; :meth:`finish` raises for all."""
        expected = self.tensors[name]
        assert tuple(actual.shape) == tuple(expected.shape), (
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
        self.compare(name, actual, expected, tolerance)

    def compare(
        self, name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance | None = None
    ) -> None:
        atol, rtol = tolerance or self.tolerance()
        a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
        difference = (a - e).abs()
        difference[~torch.isfinite(a)] = torch.inf
        allowed = atol + rtol * e.abs()
        share = torch.where(difference == 0, 0.0, difference / allowed)
        error = difference.max().item() if difference.numel() else 0.0
        rms = (difference.square().mean() / e.square().mean().clamp(min=1e-30)).sqrt().item()
        largest = share.max().item() if share.numel() else 0.0
        self.comparisons.append(Comparison(name, error, largest, relative_rms=rms if e.numel() else 0.0))

    def check_equal(self, name: str, actual: object, expected: object) -> None:
        """Compare exactly: lists, numbers, integer tables."""
        same = actual == expected
        note = "" if same else f"got {actual!r}, expected {expected!r}"[:300]
        self.comparisons.append(Comparison(name, float(not same), 2.0 * (not same), note))

    def finish(self) -> None:
        """Raise when a comparison failed, or when an ``out/`` tensor of the file was never compared."""
        compared = {c.name for c in self.comparisons}
        forgotten = [k for k in self.tensors if k.startswith("out/") and k not in compared]
        if forgotten:
            raise GoldenMismatch(f"never compared: {forgotten}")
        failures = [c for c in self.comparisons if c.share > 1]
        if failures:
            first = failures[0]
            raise GoldenMismatch(
                f"first departure at {first.name}: {first.error:.3e}, "
                f"{first.share:.1f} x the tolerance {first.note}"
            )
        if not self.comparisons:
            raise GoldenMismatch("nothing was compared")
