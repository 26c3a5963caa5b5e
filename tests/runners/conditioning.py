"""Runner of the cases about conditioning states."""

import re
from typing import Any

import torch
from torch import Tensor

from diffsynth.conditioning import items
from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.tokens import unpatchify
from diffsynth.sampling.conventions import OFFICIAL, OFFICIAL_1_0, Conventions
from diffsynth.sampling.noise import add_noise, noise_source
from tests.runners.case import Case


def state(case: Case) -> None:
    """Apply ``params.items`` in order, under the rules of every version from which the case comes."""
    params = case.meta["params"]
    if "in/pixel_mask" in case:
        frames, rows, columns = params["target_latent"]
        weights = items.token_weights(case["in/pixel_mask"], (frames, rows, columns))
        case.check("out/latent_mask", weights)
    if "video_shape" not in params and "audio_shape" not in params:
        return
    for conventions in _versions(case.meta["source"]):
        _check_state(case, _initial(case, params), conventions)


def _versions(source: str) -> list[Conventions]:
    known = {"1.0.0": OFFICIAL_1_0, "1.2.0": OFFICIAL}
    named = [conventions for version, conventions in known.items() if version in source]
    return named or [OFFICIAL]


def _initial(case: Case, params: dict[str, Any]) -> ModalityState:
    latent = case.tensors.get("in/initial_latent")
    if "video_shape" in params:
        return ModalityState.video(tuple(params["video_shape"]), params["fps"], latent=latent)
    return ModalityState.audio(tuple(params["audio_shape"]), latent=latent)


def _check_state(case: Case, initial: ModalityState, conventions: Conventions) -> None:
    params = case.meta["params"]
    made = [_item(case, described) for described in params["items"]]
    conditioned = items.apply_items(initial, made, conventions)
    source = noise_source(conventions.noise_source, params["noiser_seed"])
    noised = add_noise(conditioned, source, params["noise_scale"], conventions.noiser)
    cleared = noised.cleared()
    results: dict[str, Tensor | None] = {
        "positions": conditioned.positions,
        "clean_latent": conditioned.clean,
        "denoise_mask": conditioned.mask,
        "attention_mask": conditioned.attention,
        "latent_before_noise": conditioned.latent,
        "latent_noised": noised.latent,
        "cleared_latent": cleared.unpatchified(),
        "cleared_denoise_mask": unpatchify(cleared.mask, cleared.target_shape),
    }
    for name, actual in results.items():
        recorded = f"out/{name}" in case
        if name == "attention_mask":
            case.check_equal("has attention mask", actual is not None, recorded)
        if recorded and actual is not None:
            case.check(f"out/{name}", actual)


def _item(case: Case, described: dict[str, Any]) -> items.ConditioningItem:
    """One row of ``params.items``."""
    kind, strength = described["item"], described.get("strength", 1.0)
    if kind == "temporal region":
        return items.TemporalRegion(regions=((described["start"], described["end"]),))
    latent = _tensor(case, described["tensor"])
    item: items.ConditioningItem
    if kind == "latent at index":
        item = items.LatentAtIndex(latent=latent, strength=strength, latent_index=described["latent_idx"])
    elif kind == "keyframe":
        item = items.Keyframe(
            latent=latent,
            strength=strength,
            frame_index=described["frame_idx"],
            num_pixel_frames=_leading_number(described.get("num_pixel_frames", 1)),
        )
    elif kind == "reference clip":
        item = items.ReferenceClip(
            latent=latent,
            strength=strength,
            downscale_factor=described.get("downscale_factor", 1),
            temporal_scale_factor=described.get("temporal_scale_factor", 1),
        )
    elif kind == "free mask":
        item = items.FreeMask(latent=latent, keep=_tensor(case, described["mask"]), strength=strength)
    else:
        assert kind == "reference audio", f"no item is called {kind!r}"
        aligned = not described.get("negative_positions", True)
        item = items.ReferenceAudio(latent=latent, strength=strength, aligned=aligned)
    if "attention" in described:
        assert isinstance(item, items.Keyframe | items.ReferenceClip), kind
        weight = described["attention"]
        return items.AttentionWeighted(
            item=item, weight=_tensor(case, weight) if isinstance(weight, str) else weight
        )
    return item


def _tensor(case: Case, text: str) -> Tensor:
    """``in/name``, ``0.5 * in/name``, or a name followed by an explanation."""
    match = re.match(r"(?:([\d.]+) \* )?(in/\S+)", text)
    assert match, f"no tensor is named by {text!r}"
    factor = float(match[1]) if match[1] else 1.0
    return torch.mul(case[match[2]], factor)


def _leading_number(value: int | str) -> int:
    return value if isinstance(value, int) else int(value.split()[0])
