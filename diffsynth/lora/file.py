"""Reading LoRA files of every layout into one form: canonical layer name -> update of that layer."""

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.loader import SafetensorsFile
from diffsynth.lora.fuse import LoraUpdate
from diffsynth.lora.keys import KeyStyle, LayerTable, ParsedKey, Role, refuse_other_methods

logger = logging.getLogger(__name__)

LayerShapes = Mapping[str, tuple[int, ...]]
"""Layer name -> (out, in) of its weight."""

_NAMES_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceScale:
    """How much smaller and sparser the reference clip of an in-context LoRA is than the target."""

    factor: int = 1
    """Target size / reference size."""
    temporal_factor: int = 1
    """Spacing of the reference frames in target frames."""
    source: str = "default"
    """Where ``factor`` comes from: "metadata", "file name" or "default"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraReport:
    """What became of the keys of a file."""

    source: str
    format: str
    """The spelling of the keys; several joined by " + "."""
    matched: int
    """Number of layers that the file updates."""
    ranks: tuple[int, ...]
    """Distinct ranks, ascending."""
    alpha: str
    """Where alpha comes from: "tensors", "metadata", "adapter_config.json", or "none" (scale 1)."""
    unmatched: tuple[str, ...] = ()
    """Keys that no layer of the model answers to."""
    incomplete: tuple[str, ...] = ()
    """Layers with half of a pair."""
    wrong_shape: tuple[str, ...] = ()
    """Layers whose tensors do not fit the model, with the shapes."""
    text_side: tuple[str, ...] = ()
    """Keys for the text encoder or its connectors; they are skipped."""
    made_for: str | None = None
    """"LTX-2" or "LTX-2.3" when the file's name or metadata says so."""

    @property
    def rank(self) -> int:
        """The largest rank, 0 when the file holds full differences only."""
        return max(self.ranks, default=0)

    def __str__(self) -> str:
        text = f"{self.source}: {self.format} format, {self.matched} layers, rank {self.rank}"
        for count, what in (
            (len(self.unmatched), "unknown keys"),
            (len(self.incomplete), "incomplete layers"),
            (len(self.wrong_shape), "layers of another shape"),
            (len(self.text_side), "text-side keys skipped"),
        ):
            text += f", {count} {what}" if count else ""
        return text


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lora:
    """A LoRA file in canonical form.  ``updates``: layer name of the model -> its update."""

    updates: Mapping[str, LoraUpdate]
    report: LoraReport
    metadata: Mapping[str, str] = field(default_factory=dict)
    reference: ReferenceScale = field(default_factory=ReferenceScale)

    @property
    def nbytes(self) -> int:
        """Stored size of all updates."""
        return sum(update.nbytes for update in self.updates.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _PeftScale:
    """``alpha`` as PEFT states it beside the tensors."""

    origin: str
    alpha: float
    patterns: Mapping[re.Pattern[str], float]
    """Layers that have another alpha; the first pattern that fits counts."""
    is_rank_stabilised: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], origin: str) -> Self | None:
        """From ``lora_alpha``, ``alpha_pattern``, ``use_rslora``; None when there is no ``lora_alpha``."""
        if config.get("lora_alpha") is None:
            return None
        try:
            stated = (config.get("alpha_pattern") or {}).items()
            patterns = {re.compile(rf"(?:.*\.)?(?:{pattern})"): float(value) for pattern, value in stated}
            alpha = float(config["lora_alpha"])
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise CheckpointError(f"{origin}: alpha is not readable", hint="save the LoRA again") from error
        return cls(
            origin=origin, alpha=alpha, patterns=patterns, is_rank_stabilised=bool(config.get("use_rslora"))
        )

    def scale(self, layer: str, rank: int) -> float:
        alpha = next((v for pattern, v in self.patterns.items() if pattern.fullmatch(layer)), self.alpha)
        return alpha / (rank**0.5 if self.is_rank_stabilised else rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    """Keys, shapes and metadata of a file, with a way to load one tensor."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    load: Callable[[str], Tensor]
    adapter_config: Mapping[str, Any]


def read_lora(
    source: str | Path | Mapping[str, Tensor],
    targets: Collection[str],
    shapes: LayerShapes | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Lora:
    """Read a LoRA of any known key format.

    Args:
        source: a safetensors file, or its tensors by key.
        targets: names of the model's linear layers, without ``.weight``.
        shapes: (out, in) of those layers; without it shapes are only checked against each other.
        metadata: the file's metadata when ``source`` is a mapping.

    Returns: the updates of all layers that match.  Keys that do not are named in ``report`` and, unless they
    belong to the text side, in one warning of the log.

    Raises:
        CheckpointError: no file, no safetensors file (pickles are refused by content), another kind of
            adapter, two updates of one layer, nothing in it matches the model, or it was made for the other
            model version and some of its layers have another shape here.
    """
    shapes = shapes or {}
    if isinstance(source, Mapping):
        content = _Content(
            name="LoRA",
            shapes={key: tuple(tensor.shape) for key, tensor in source.items()},
            metadata=metadata or {},
            load=source.__getitem__,
            adapter_config={},
        )
        return _assemble(content, targets, shapes)
    path = Path(source)
    header = SafetensorsFile(path)
    try:
        with safe_open(path, framework="pt") as file:
            content = _Content(
                name=path.name,
                shapes=header.shapes,
                metadata=header.metadata,
                load=file.get_tensor,
                adapter_config=_json_object(path.with_name("adapter_config.json")),
            )
            return _assemble(content, targets, shapes)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="download the file again") from error


def _json_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON", hint="remove or repair it") from error
    return value if isinstance(value, dict) else {}


def _assemble(content: _Content, targets: Collection[str], shapes: LayerShapes) -> Lora:
    refuse_other_methods(content.shapes, content.name)
    members, unmatched, text_side = _sort_keys(content, LayerTable(targets))
    styles = Counter(parsed.style for group in members.values() for _, parsed in group.values())
    peft = _stated_scale(content, styles)
    updates: dict[str, LoraUpdate] = {}
    incomplete: list[str] = []
    wrong_shape: list[str] = []
    has_alpha_tensor = False
    for target, group in members.items():
        if (Role.DOWN in group) != (Role.UP in group) or group.keys() == {Role.ALPHA}:
            incomplete.append(target)
        elif problem := _shape_problem(target, group, content.shapes, shapes.get(target)):
            wrong_shape.append(problem)
        else:
            updates[target] = _load_update(content, group, peft)
            has_alpha_tensor |= Role.ALPHA in group
    report = LoraReport(
        source=content.name,
        format=" + ".join(style.value for style, _ in styles.most_common()),
        matched=len(updates),
        ranks=tuple(sorted({update.rank for update in updates.values() if update.rank})),
        alpha="tensors" if has_alpha_tensor else peft.origin if peft else "none",
        unmatched=tuple(unmatched),
        incomplete=tuple(incomplete),
        wrong_shape=tuple(wrong_shape),
        text_side=tuple(text_side),
        made_for=_generation_of(content),
    )
    _tell(report, targets)
    return Lora(
        updates=updates, report=report, metadata=dict(content.metadata), reference=_reference_scale(content)
    )


_Group = dict[Role, tuple[str, ParsedKey]]


def _sort_keys(content: _Content, table: LayerTable) -> tuple[dict[str, _Group], list[str], list[str]]:
    members: dict[str, _Group] = defaultdict(dict)
    unmatched: list[str] = []
    text_side: list[str] = []
    for key in content.shapes:
        parsed = table.parse(key)
        if parsed is not None and parsed.target is not None:
            group = members[parsed.target]
            if parsed.role in group:
                raise CheckpointError(
                    f"{content.name} updates {parsed.target} twice: {group[parsed.role][0]} and {key}",
                    hint="split the file, one adapter each",
                )
            group[parsed.role] = (key, parsed)
        elif table.is_text_side(key):
            text_side.append(key)
        else:
            unmatched.append(key)
    return members, unmatched, text_side


def _shape_problem(
    target: str, group: _Group, stored: LayerShapes, expected: tuple[int, ...] | None
) -> str | None:
    """A sentence naming layer and shapes when the tensors fit neither each other nor the model."""
    found = {role: stored[key] for role, (key, _) in group.items() if role is not Role.ALPHA}
    down = found.get(Role.DOWN, ())
    rank = down[0] if down else 0
    if expected is None:
        inputs = [found[role][-1:] for role in (Role.DOWN, Role.WEIGHT_DIFF) if role in found]
        outputs = [shape[:1] for role, shape in found.items() if role is not Role.DOWN]
        expected = (*(outputs or [(0,)])[0], *(inputs or [(0,)])[0])
    wanted = {
        Role.DOWN: (rank, *expected[1:]),
        Role.UP: (*expected[:1], rank),
        Role.WEIGHT_DIFF: expected,
        Role.BIAS_DIFF: expected[:1],
    }
    wrong = [f"{role} {shape}" for role, shape in found.items() if shape != wanted[role]]
    if not wrong and (rank or Role.DOWN not in found):
        return None
    return f"{target} {expected}: {', '.join(wrong) or 'rank 0'}"


def _load_update(content: _Content, group: _Group, peft: _PeftScale | None) -> LoraUpdate:
    tensors = {role: content.load(key) for role, (key, _) in group.items()}
    down = tensors.get(Role.DOWN)
    scale = 1.0
    if down is not None:
        rank = down.shape[0]
        if Role.ALPHA in tensors:
            scale = float(tensors[Role.ALPHA].reshape(-1)[0]) / rank
        elif peft is not None:
            scale = peft.scale(group[Role.DOWN][1].layer, rank)
    return LoraUpdate(
        down=down,
        up=tensors.get(Role.UP),
        scale=scale,
        weight_diff=tensors.get(Role.WEIGHT_DIFF),
        bias_diff=tensors.get(Role.BIAS_DIFF),
    )


def _stated_scale(content: _Content, styles: Counter[KeyStyle]) -> _PeftScale | None:
    """Alpha from the metadata of diffusers, or from the configuration that PEFT saves beside a raw file."""
    text = content.metadata.get("lora_adapter_metadata")
    if text is not None:
        try:
            stated = json.loads(text)
        except ValueError as error:
            raise CheckpointError(
                f"{content.name}: metadata lora_adapter_metadata is not JSON", hint="save the LoRA again"
            ) from error
        if isinstance(stated, dict):
            own = {
                k.removeprefix("transformer."): v for k, v in stated.items() if k.startswith("transformer.")
            }
            return _PeftScale.parse(own or stated, "metadata")
    if KeyStyle.RAW_PEFT in styles:
        return _PeftScale.parse(content.adapter_config, "adapter_config.json")
    return None


def _reference_scale(content: _Content) -> ReferenceScale:
    temporal = _whole_number(content, "reference_temporal_scale_factor") or 1
    for key in ("reference_downscale_factor", "reference_spatial_scale_factor"):
        factor = _whole_number(content, key)
        if factor is not None:
            return ReferenceScale(factor=factor, temporal_factor=temporal, source="metadata")
    named = re.search(r"(?:^|[-_.])ref(0\.\d+)", content.name)
    if named is not None and float(named[1]) > 0:
        factor = round(1 / float(named[1]))
        return ReferenceScale(factor=factor, temporal_factor=temporal, source="file name")
    return ReferenceScale(temporal_factor=temporal)


def _whole_number(content: _Content, key: str) -> int | None:
    text = content.metadata.get(key)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value < 1 or value != int(value):
        raise CheckpointError(
            f"{content.name}: metadata {key}={text!r} is not a whole number from 1",
            hint="a newer diffsynth, or correct the metadata",
        )
    return int(value)


def _generation_of(content: _Content) -> str | None:
    keys = ("modelspec.architecture", "ss_base_model_version", "base_model")
    text = " ".join([content.name, *(content.metadata.get(key, "") for key in keys)]).lower()
    if re.search(r"ltx[-_ ]?v?[-_ ]?2[._]3", text):
        return "LTX-2.3"
    return "LTX-2" if re.search(r"ltx[-_ ]?v?[-_ ]?2(?![._]?\d)", text) else None


def _tell(report: LoraReport, targets: Collection[str]) -> None:
    """Log what the file did, warn about what it did not; raise when it did nothing, or fits by half only
    because it belongs to the other model version."""
    if not report.matched:
        reasons = (*report.wrong_shape, *report.incomplete, *report.unmatched, *report.text_side)
        raise CheckpointError(
            f"{report.source}: nothing in it fits this model ({_some(reasons)})",
            hint="a LoRA made for this model: `diffsynth inspect FILE` shows what the file holds",
        )
    # Only LTX-2.3 has gated attention.
    model = "LTX-2.3" if any(name.endswith(".to_gate_logits") for name in targets) else "LTX-2"
    foreign = report.made_for not in {None, model}
    if foreign and report.wrong_shape:
        raise CheckpointError(
            f"{report.source} was made for {report.made_for}, the model is {model}, and "
            f"{len(report.wrong_shape)} layers have another shape ({_some(report.wrong_shape)})",
            hint=f"a LoRA for {model}",
        )
    logger.info("%s", report)
    lost = (*report.wrong_shape, *report.incomplete, *report.unmatched)
    if lost:
        logger.warning("%s: %d entries are not applied: %s", report.source, len(lost), _some(lost))
    if foreign:
        logger.warning("%s was made for %s, not for %s", report.source, report.made_for, model)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
