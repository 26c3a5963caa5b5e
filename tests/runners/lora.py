"""Golden cases of the LoRA room: updates fused into weights, and every key format of a file."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffsynth.lora import LoraUpdate, WeightedUpdates, dequantise, fuse_scaled, read_lora
from diffsynth.lora import fuse as fuse_weight
from tests.runners.case import Case, Tolerance

LORA_ENDING = re.compile(r"\.(lora_(A|B|up|down)(\..*)?|diff(_b)?)$")
PREFIX = "model.diffusion_model."
BF16_EPS = torch.finfo(torch.bfloat16).eps

Base = dict[str, Tensor]
"""Layer name -> weight."""


def fuse_case_beside(path: Path) -> Path | None:
    """The case in the folder of ``path`` that holds the result which LoRA files of all formats must give."""
    for sibling in sorted(path.parent.glob("*.safetensors")):
        with safe_open(sibling, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("case", "{}"))
        if meta.get("component") == "lora fuse" and "formats" in meta:
            return sibling
    return None


def fuse(case: Case) -> None:
    """Compare every ``out/`` group with the base that it belongs to, updated by the LoRAs of the case."""
    if "formats" in case.meta:
        files = [path for path in sorted(case.path.parent.glob("*.safetensors")) if _is_plain_lora(path)]
        assert files, f"no LoRA files beside {case.path.name}"
        for path in files:
            _compare_formats(case, case, path)
        return
    base = _base(case.group("weights/"))
    loras = _lora_groups(case, base)
    strengths = _strengths(case)
    assert len(strengths) >= len(loras), f"{len(loras)} LoRAs, strengths {strengths}"
    weighted = list(zip(loras, strengths, strict=False))
    fp8_count = 1 if "first LoRA only" in case.variant else len(weighted)
    sources = {name.split("/")[1] for name in case.tensors if name.startswith("in/")}
    for group in sorted({name.split("/")[1] for name in case.tensors if name.startswith("out/")}):
        # An output is named after the input that it comes from; the others come from ``weights/``.
        source = max((s for s in sources if group.startswith(s)), key=len, default=None)
        if source is None:
            _compare_plain(case, group, base, weighted)
        else:
            _compare_fp8(case, group, case.group(f"in/{source}/"), weighted[:fp8_count])


def file(case: Case) -> None:
    """A LoRA file put on the base of the fuse case beside it, at its strength, must give its result."""
    sibling = fuse_case_beside(case.path)
    assert sibling is not None, f"no fuse case beside {case.path.name}"
    _compare_formats(case, Case.load(sibling), case.path)


def _compare_formats(case: Case, reference: Case, lora_path: Path) -> None:
    base = _base(reference.group("weights/"))
    (strength,) = _strengths(reference)
    lora = read_lora(lora_path, base, {name: tuple(weight.shape) for name, weight in base.items()})
    case.check_equal(f"keys without a layer in {lora_path.name}", lora.report.unmatched, ())
    for name, expected in reference.group("out/").items():
        layer = name.removesuffix(".weight")
        update = [(lora.updates[layer], strength)] if layer in lora.updates else []
        result = fuse_weight(base[layer], update, dtype=expected.dtype)
        case.compare(f"out/{name}", result, expected, reference.tolerance())


def _compare_plain(
    case: Case, group: str, base: Base, weighted: list[tuple[Mapping[str, LoraUpdate], float]]
) -> None:
    for name, expected in case.group(f"out/{group}/").items():
        layer = name.removesuffix(".weight")
        result = fuse_weight(base[layer], _updates(weighted, layer), dtype=expected.dtype)
        case.check(f"out/{group}/{name}", result, _stated(case, expected.dtype))


def _compare_fp8(
    case: Case, group: str, source: Base, weighted: list[tuple[Mapping[str, LoraUpdate], float]]
) -> None:
    """Scales as bf16 results; weights within one step of e4m3 as in :func:`_compare_steps`."""
    recorded = case.group(f"out/{group}/")
    new_scale: Tensor | None
    for name in (name for name in recorded if name.endswith(".weight")):
        updates = _updates(weighted, _layer(name))
        scale_name = f"{name}_scale"
        if scale_name not in source:
            before, result = source[name].float(), fuse_weight(source[name], updates).float()
            new_scale = None
        elif group.endswith("_dequantised"):
            # The stored weight before any update.
            actual = dequantise(source[name], source[scale_name])
            case.check(f"out/{group}/{name}", actual, _stated(case, torch.float32))
            continue
        else:
            before = dequantise(source[name], source[scale_name])
            weight, new_scale = fuse_scaled(source[name], source[scale_name], updates)
            case.check(f"out/{group}/{scale_name}", new_scale, _stated(case, torch.bfloat16))
            result = dequantise(weight, new_scale)
        computed = (result, new_scale)
        _compare_steps(case, f"out/{group}/{name}", before, computed, recorded.get(scale_name))


def _compare_steps(
    case: Case, name: str, before: Tensor, computed: tuple[Tensor, Tensor | None], scale: Tensor | None
) -> None:
    """The dequantised values may differ by one e4m3 step, as wide as it is at each element.

    The recorded product, and without a scale also the sum, were rounded to bf16 first: an element near the
    border of two e4m3 values falls to the other side, a step away, and that bf16 rounding comes on top.
    """
    result, new_scale = computed
    one = torch.ones(())
    recorded_scale, new_scale = (one, one) if scale is None or new_scale is None else (scale, new_scale)
    expected = case[name].float() * recorded_scale
    steps = (_e4m3_step(value / by) * by for value, by in ((result, new_scale), (expected, recorded_scale)))
    allowed = torch.maximum(*steps) + BF16_EPS * (expected - before).abs()
    if scale is None:
        allowed = allowed + BF16_EPS * expected.abs()
    case.compare(name, result / allowed, expected / allowed, Tolerance(1.0))


def _e4m3_step(value: Tensor) -> Tensor:
    """Distance of neighbouring e4m3 values at each element: 3 bits of mantissa, smallest exponent -6."""
    exponent = torch.floor(torch.log2(value.abs().clamp(min=2.0**-6)))
    return torch.exp2(exponent - 3)


def _stated(case: Case, dtype: torch.dtype) -> Tolerance:
    """The tolerance that the text states for bf16; float32 results are held to float32 precision."""
    stated = case.meta["tolerance"]
    match = re.search(r"atol ([0-9.e-]+) rtol ([0-9.e-]+)", str(stated))
    if match is None:
        return case.tolerance()
    return Tolerance(1e-6, 1e-6) if dtype == torch.float32 else Tolerance(float(match[1]), float(match[2]))


def _strengths(case: Case) -> list[float]:
    """From the description, such as "strength 0.8 and -0.35"."""
    text = f"{case.meta.get('params', '')} {case.variant} {case.meta.get('inputs', '')}"
    match = re.search(r"strengths?[\s:=(\['\"]*(-?\d*\.?\d+(?:\s*(?:,|and|,\s*and)\s*-?\d*\.?\d+)*)", text)
    assert match is not None, f"no strength in {text!r}"
    return [float(number) for number in re.findall(r"-?\d*\.?\d+", match[1])]


def _base(weights: Mapping[str, Tensor]) -> Base:
    return {_layer(key): tensor for key, tensor in weights.items() if key.endswith(".weight")}


def _layer(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix("_scale").removesuffix(".weight")


def _lora_groups(case: Case, base: Base) -> list[Mapping[str, LoraUpdate]]:
    groups = sorted({name.split("/")[1] for name in case.tensors if name.startswith("in/")})
    members = [case.group(f"in/{group}/") for group in groups]
    shapes = {name: tuple(weight.shape) for name, weight in base.items()}
    return [read_lora(keys, base, shapes).updates for keys in members if is_lora(keys)]


def _updates(weighted: list[tuple[Mapping[str, LoraUpdate], float]], layer: str) -> WeightedUpdates:
    return [(updates[layer], strength) for updates, strength in weighted if layer in updates]


def is_lora(keys: Mapping[str, object]) -> bool:
    """Whether the keys of a file end like those of a LoRA."""
    return any(LORA_ENDING.search(key) for key in keys)


def _is_plain_lora(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        keys = dict.fromkeys(file.keys())
    return is_lora(keys) and not any(key.startswith(("in/", "out/")) for key in keys)
