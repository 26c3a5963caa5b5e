"""Golden cases of the transformer: RoPE, timestep embedding, one block, whole forward passes."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.models.ltx2.modulation import AdaLNSingle, Modulation, sinusoid
from diffsynth.models.ltx2.rope import (
    GridPrecision,
    RopeLayout,
    RopeTable,
    frequency_grid,
    interval_fractions,
    rope_angles,
    rope_table,
)
from diffsynth.models.ltx2.streams import Skips, context_bias
from diffsynth.models.ltx2.transformer import (
    EXCLUDED_PREFIXES,
    KEY_PREFIXES,
    CrossTimestep,
    LTX2Transformer,
    Modality,
    PassState,
    Perturbation,
    Perturbations,
    SkipKind,
    StreamState,
    TransformerBlock,
    TransformerConfig,
)
from tests.runners.case import Case, Tolerance
from tests.runners.transformer_trace import (
    STREAMS,
    BlockRecorder,
    as_recorded,
    from_recorded,
    record_network,
    recorded_order,
    rotated,
)

PREFIX = next(iter(KEY_PREFIXES))


def network_weights(case: Case) -> dict[str, Tensor]:
    """The weights of the case by module name, without what belongs to the text side."""
    kept = {k: v for k, v in case.weights().items() if not k.startswith(EXCLUDED_PREFIXES)}
    return {key.removeprefix(PREFIX): value for key, value in kept.items()}


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    module.load_state_dict(weights, strict=True, assign=True)


def build(case: Case, dtype: torch.dtype = torch.float32) -> LTX2Transformer:
    """The network of the case, made on the meta device as the loader makes it."""
    weights = network_weights(case)
    config = TransformerConfig.from_sections(case.meta["config"], keys=weights)
    with torch.device("meta"):
        network = LTX2Transformer(config)
    load(network, {key: value.to(dtype) for key, value in weights.items()})
    return network


def modality(
    tensors: dict[str, Tensor], stream: str, dtype: torch.dtype = torch.float32, **more: Any
) -> Modality | None:
    """The record of a stream from tensors named ``{stream}_{field}``; None when the case has none of it."""
    if f"{stream}_latent" not in tensors:
        return None
    names = ("sigma", "timesteps", "positions", "context_mask", "attention_mask")
    given: dict[str, Any] = {
        name: tensors[f"{stream}_{name}"] for name in names if f"{stream}_{name}" in tensors
    }
    return Modality(
        latent=tensors[f"{stream}_latent"].to(dtype),
        context=tensors[f"{stream}_context"].to(dtype),
        **given,
        **more,
    )


# ---------------------------------------------------------------------------------------------- RoPE


def rope(case: Case) -> None:
    config = case.meta["config"]["transformer"]
    heads, layout = config["num_attention_heads"], RopeLayout(config["rope_type"])
    widths = {
        "video": heads * config["attention_head_dim"],
        "audio": config["audio_num_attention_heads"] * config["audio_attention_head_dim"],
        "video_cross": config["audio_cross_attention_dim"],
        "audio_cross": config["audio_cross_attention_dim"],
    }
    video_max = config["positional_embedding_max_pos"]
    audio_max = config["audio_positional_embedding_max_pos"]
    latest = [max(video_max[0], audio_max[0])]
    limits = {"video": video_max, "audio": audio_max, "video_cross": latest, "audio_cross": latest}
    settings = {
        "theta": config["positional_embedding_theta"],
        "precision": GridPrecision(config["frequencies_precision"]),
    }
    for name, width in widths.items():
        positions = f"in/{name.split('_')[0]}_positions"
        if positions not in case:
            continue
        fractions = interval_fractions(case[positions], limits[name])
        grid = frequency_grid(width, len(limits[name]), **settings)
        table = rope_table(fractions, width=width, heads=heads, layout=layout, **settings)
        computed = {
            f"mid/{name}_freq_grid": grid,
            f"mid/{name}_fractional": fractions,
            f"mid/{name}_angles": rope_angles(fractions, grid),
            f"out/{name}_cos": as_recorded(table.cos, layout),
            f"out/{name}_sin": as_recorded(table.sin, layout),
        }
        for key, value in computed.items():
            if key in case:
                case.check(key, value)
    if "in/apply_x" in case:
        _rope_application(case, settings["theta"], video_max)


def _rope_application(case: Case, theta: float, max_pos: list[int]) -> None:
    """``out/apply_{layout}[_f32]``: rotation of ``in/apply_x`` by tables made from the video positions."""
    x = case["in/apply_x"]
    split = (v for k, v in case.tensors.items() if re.fullmatch(r"mid/apply_split.*_cos", k))
    heads = next((v.shape[1] for v in split), 1)  # interleaved pairs do not depend on the heads
    fractions = interval_fractions(case["in/video_positions"], max_pos)
    for name in case.group("out/apply_"):
        layout = RopeLayout(name.split("_")[0])
        precision = GridPrecision.FLOAT32 if name.endswith("_f32") else GridPrecision.FLOAT64
        table = rope_table(
            fractions, width=x.shape[-1], heads=heads, theta=theta, precision=precision, layout=layout
        )
        for part, value in (("cos", table.cos), ("sin", table.sin)):
            case.check(f"mid/apply_{name}_{part}", as_recorded(value, layout))
        case.check(f"out/apply_{name}", rotated(x, table))


# --------------------------------------------------------------------------------- timestep embedding


def timestep_embedding(case: Case) -> None:
    (prefix,) = {
        key.partition("emb.timestep_embedder.")[0]
        for key in case.weights()
        if "emb.timestep_embedder." in key
    }
    weights = {key.removeprefix(prefix): value for key, value in case.weights().items()}
    rows_times_dim, dim = weights["linear.weight"].shape
    network = AdaLNSingle(dim, rows_times_dim // dim)
    load(network, weights)
    scaled = case["in/sigma"].flatten() * case.meta["config"]["transformer"]["timestep_scale_multiplier"]
    case.check("mid/scaled_timestep", scaled)
    case.check("mid/sinusoid", sinusoid(scaled))
    embedder = network.emb.timestep_embedder
    case.check("mid/linear_1", embedder.linear_1(sinusoid(scaled)))
    modulation, embedded = network(scaled, torch.float32)
    case.check("out/embedded_timestep", embedded)
    case.check("out/modulation", modulation.flatten(1))


# ------------------------------------------------------------------------------------------ one block


def block(case: Case) -> None:
    weights = network_weights(case)
    config = TransformerConfig.from_sections(case.meta["config"])
    (index,) = {int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks.")}
    prefix = f"transformer_blocks.{index}."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    network = TransformerBlock(replace(config, has_audio="audio_scale_shift_table" in own), index)
    load(network, own)
    given = case.group("in/")
    state = PassState(
        video=prepared_stream(given, "video", config),
        audio=prepared_stream(given, "audio", config),
        skips=Skips(None, 0, next(iter(given.values())).device),
    )
    seen = BlockRecorder(network, state).seen
    network([state])
    for name in recorded_order(case, seen):
        case.check(f"mid/{name}", seen[name])
    for stream, kept in (("video", state.video), ("audio", state.audio)):
        if kept is not None:
            case.check(f"out/{stream}_x", kept.hidden)


def prepared_stream(given: dict[str, Tensor], stream: str, config: TransformerConfig) -> StreamState | None:
    """A state from what the case records for one block."""
    if f"{stream}_x" not in given:
        return None
    own = {k.removeprefix(f"{stream}_"): v for k, v in given.items() if k.startswith(f"{stream}_")}
    width = own["x"].shape[-1]

    def modulation(name: str) -> Modulation | None:
        return per_token(own[name], width) if name in own else None

    def table(name: str) -> RopeTable | None:
        if f"{name}_cos" not in own:
            return None
        layout, heads = RopeLayout(config.rope_type), config.num_attention_heads
        cos, sin = (from_recorded(own[f"{name}_{part}"], layout, heads) for part in ("cos", "sin"))
        return RopeTable(cos, sin, layout)

    main, rope_self = modulation("modulation"), table("rope")
    assert main is not None and rope_self is not None
    return StreamState(
        hidden=own["x"].clone(),
        modulation=main,
        embedded=main,
        prompt=modulation("prompt_modulation"),
        cross_scale_shift=modulation("cross_scale_shift_modulation"),
        cross_gate=modulation("cross_gate_modulation"),
        context=own["context"],
        context_bias=context_bias(own["context_bias"], main.values.dtype) if "context_bias" in own else None,
        attention_bias=own.get("attention_bias", own.get("self_attention_bias")),
        rope=rope_self,
        cross_rope=table("cross_rope"),
    )


def per_token(flat: Tensor, width: int) -> Modulation:
    """The recorded plain form (B, T or 1, K*D) as rows with an index."""
    batch, tokens, _ = flat.shape
    index = torch.arange(batch * tokens, device=flat.device).view(batch, tokens)
    return Modulation(flat.reshape(batch * tokens, -1, width), index if tokens > 1 else None)


# -------------------------------------------------------------------------------- whole forward passes


def full(case: Case) -> None:
    network = build(case)
    inputs = case.group("in/")
    primary = partial(check_velocities, case, network, inputs, "out/", CrossTimestep.TOKENWISE)
    seen = record_network(network, primary)
    for name in recorded_order(case, seen):
        recorded = case[f"mid/{name}"]
        if name.endswith("context_bias"):
            # A float mask is recorded as it came, perhaps without an axis of heads.
            recorded = context_bias(recorded, recorded.dtype)
        case.compare(f"mid/{name}", seen[name].expand_as(recorded), recorded)
    # Intermediates first: put the outputs that the traced run compared behind them.
    outputs = [c for c in case.comparisons if c.name.startswith("out/")]
    case.comparisons[:] = [c for c in case.comparisons if not c.name.startswith("out/")] + outputs
    tags = sorted({key.split("/")[0] for key in case.group("out/") if "/" in key})
    for tag in tags:
        check_tagged(case, network, inputs, tag)


def check_tagged(case: Case, network: LTX2Transformer, inputs: dict[str, Tensor], tag: str) -> None:
    """``out/<tag>/*``: another cross-timestep rule, other inputs (``in_<tag>/*``), or another dtype."""
    other = case.group(f"in_{tag}/")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    modes = set(CrossTimestep)
    if other:
        # With one common sigma every mode has the same result.
        for mode in modes if has_one_sigma(inputs | other) else {CrossTimestep.TOKENWISE}:
            check_velocities(case, network, inputs | other, f"out/{tag}/", mode)
    elif tag in modes:
        check_velocities(case, network, inputs, f"out/{tag}/", CrossTimestep(tag))
    else:
        dtype = dtypes[tag]
        low = build(case, dtype)
        velocities = low(modality(inputs, "video", dtype), modality(inputs, "audio", dtype))
        limit = mean_limit(case, tag)
        for stream, velocity in zip(STREAMS, velocities, strict=True):
            name = f"out/{tag}/{stream}_velocity"
            if name in case:
                assert velocity is not None and velocity.dtype is dtype
                error = (velocity.cpu().float() - case[name].cpu()).abs().mean()
                case.compare(name, error, torch.zeros(()), limit)


def has_one_sigma(inputs: dict[str, Tensor]) -> bool:
    """All tokens of a sample, of both streams, are at one noise level."""
    sigma = torch.stack([inputs[f"{s}_sigma"].reshape(-1) for s in STREAMS if f"{s}_sigma" in inputs])
    levels = [v.flatten(1) for k, v in inputs.items() if k.endswith("_timesteps")]
    return all(bool((level == row[:, None]).all()) for level in levels for row in sigma)


def mean_limit(case: Case, tag: str) -> Tolerance:
    """Low-precision runs state a limit on the mean absolute difference in the text of the output."""
    match = re.search(r"mean abs difference \(<= ([0-9.e-]+)\)", case.meta["outputs"][f"out/{tag}/*"])
    assert match, f"no limit stated for out/{tag}/*"
    return Tolerance(float(match[1]))


def check_velocities(
    case: Case, network: LTX2Transformer, inputs: dict[str, Tensor], prefix: str, mode: CrossTimestep
) -> None:
    """``{prefix}{stream}_velocity`` and ``{prefix}{stream}_x0``, as far as the case has them."""
    velocities = network(modality(inputs, "video"), modality(inputs, "audio"), cross_timestep=mode)
    for stream, velocity in zip(STREAMS, velocities, strict=True):
        if velocity is None:
            continue
        if f"{prefix}{stream}_velocity" in case:
            case.check(f"{prefix}{stream}_velocity", velocity)
        if f"{prefix}{stream}_x0" in case:
            timesteps = inputs[f"{stream}_timesteps"].reshape(len(velocity), -1, 1)
            case.check(f"{prefix}{stream}_x0", inputs[f"{stream}_latent"] - timesteps * velocity)


def video_only(case: Case) -> None:
    assert "in/audio_latent" not in case, "the case holds an audio stream"
    full(case)


# ---------------------------------------------------------------------------------------- perturbations


def perturbations(case: Case) -> None:
    network = build(case)
    inputs = case.group("in/")
    stated = stated_perturbations(case)
    both = modality(inputs, "video"), modality(inputs, "audio")
    for stream, velocity in zip(STREAMS, network(*both, stated), strict=True):
        if f"out/{stream}_velocity" in case:
            assert velocity is not None
            case.check(f"out/{stream}_velocity", velocity)
    first = {name: value[:1] for name, value in inputs.items()}
    tags = sorted({key.split("/")[0] for key in case.group("out/") if "/" in key})
    for tag in tags:
        off, single = meaning(tag, stg_blocks(stated))
        streams = [modality(first, name, enabled=name != off) for name in STREAMS]
        velocities = network(*streams, (single,))
        for stream, velocity in zip(STREAMS, velocities, strict=True):
            if f"out/{tag}/{stream}_velocity" in case:
                case.check(f"out/{tag}/{stream}_velocity", velocity)


def stated_perturbations(case: Case) -> Perturbations:
    def one(name: str, blocks: list[int] | None) -> Perturbation:
        kind = SkipKind[name.removeprefix("SKIP_")]
        return Perturbation(kind, None if blocks is None else tuple(blocks))

    return tuple(tuple(one(*item) for item in sample) for sample in case.meta["perturbations"])


def stg_blocks(stated: Perturbations) -> tuple[int, ...]:
    """The block list of the case: that of its self-attention perturbations."""
    kinds = (SkipKind.VIDEO_SELF_ATTN, SkipKind.AUDIO_SELF_ATTN)
    return next((p.blocks for sample in stated for p in sample if p.type in kinds and p.blocks), ())


def meaning(tag: str, blocks: tuple[int, ...]) -> tuple[str | None, tuple[Perturbation, ...]]:
    """What a tag of the case stands for: a disabled stream, or one perturbation."""
    if tag.endswith("_disabled"):
        return tag.removesuffix("_disabled"), ()
    match = re.fullmatch(r"(?:stg_(video|audio)|skip_(a2v|v2a))_(all_blocks|only|block)", tag)
    assert match, f"unknown tag {tag!r}"
    self_attention, cross, where = match.groups()
    kind = SkipKind(f"{self_attention}_self_attn" if self_attention else f"{cross}_cross_attn")
    return None, (Perturbation(kind, blocks if where == "block" else None),)
