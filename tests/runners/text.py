"""Golden cases of text conditioning: tokenizer, text model, feature extractor, connectors, the whole path."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from diffsynth.conditioning.text import PromptTokenizer, find_tokenizer
from diffsynth.models.gemma3 import DecoderLayer, Gemma3TextModel
from diffsynth.models.gemma3_config import Gemma3Config, text_key
from diffsynth.models.ltx2.connectors import (
    KEY_PREFIXES,
    ConnectorBlock,
    EmbeddingsConnector,
    TextConnectors,
    TextConnectorsConfig,
)
from diffsynth.models.ltx2.feature_extractor import FeatureExtractor, PromptFeatures
from diffsynth.models.ltx2.layers import TextProjection
from tests.runners.case import Case
from tests.runners.transformer_trace import as_recorded

TRANSFORMER = "model.diffusion_model."


def build(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load strictly into a module made on the meta device; nothing may stay there."""
    module.load_state_dict(dict(weights), strict=True, assign=True)
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    assert not left, f"still on the meta device: {left}"
    module.eval()


def build_gemma(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> Gemma3TextModel:
    with torch.device("meta"):
        model = Gemma3TextModel(Gemma3Config.from_dict(config))
    build(model, {key: tensor for name, tensor in weights.items() if (key := text_key(name)) is not None})
    return model


def connector_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        module + key.removeprefix(file): tensor
        for key, tensor in weights.items()
        for file, module in KEY_PREFIXES.items()
        if key.startswith(file)
    }


def build_connectors(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> TextConnectors:
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    with torch.device("meta"):
        model = TextConnectors(TextConnectorsConfig.from_sections(config, shapes))
    build(model, connector_weights(weights))
    return model


class Recorder:
    """Outputs of modules by name; a module that runs row by row gives a list."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Tensor]] = {}

    def watch(self, name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | list[Tensor]) -> None:
            rows = [output] if isinstance(output, Tensor) else output
            self.outputs.setdefault(name, []).extend(rows)

        module.register_forward_hook(hook)


def padded(rows: Iterable[Tensor], mask: Tensor, fill: Tensor | None = None) -> Tensor:
    """Put the rows [n, ...] of valid tokens where ``mask`` [B, T] has them, ``fill`` (or zero) elsewhere."""
    rows = list(rows)
    out = torch.zeros(*mask.shape, *rows[0].shape[1:], dtype=rows[0].dtype)
    if fill is not None:
        out += fill
    for target, valid, row in zip(out, mask.bool(), rows, strict=True):
        target[valid] = row
    return out


def gemma3(case: Case) -> None:
    model = build_gemma(case.meta["gemma_config"], case.weights())
    mask = case["in/attention_mask"]
    recorder = Recorder()
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        recorder.watch(f"mid/layer{i}_input_layernorm", layer.input_layernorm)
        recorder.watch(f"mid/layer{i}_self_attn_out", layer.self_attn)
        recorder.watch(f"mid/layer{i}_mlp_out", layer.mlp)
        recorder.watch(f"mid/layer{i}_out", layer)
    recorder.watch("mid/last_layer_out_before_final_norm", model.layers[-1])
    states = hidden_states(model, case["in/input_ids"], mask)

    check_rope(case, model, mask.shape[1])
    for name, rows in recorder.outputs.items():
        if name in case:
            case.check(name, padded([row[0] for row in rows], mask))
    check_valid(case, "out/hidden_states", states, mask)


def check_rope(case: Case, model: Gemma3TextModel, length: int) -> None:
    tables = model.rope_tables(torch.arange(length), device=torch.device("cpu"), dtype=torch.float32)
    for kind, (cos, sin) in tables.items():
        for function, table in (("cos", cos), ("sin", sin)):
            if (name := f"mid/rope_{function}_{kind}") in case:
                case.check(name, torch.cat((table, table), dim=-1))


def check_valid(case: Case, name: str, actual: Tensor, mask: Tensor) -> None:
    """Compare the rows of valid tokens: what stands in the others is of no meaning."""
    valid = mask.bool()
    assert actual.shape == case[name].shape, f"{name}: {tuple(actual.shape)}"
    case.compare(name, actual[valid], case[name][valid])


def hidden_states(model: Gemma3TextModel, ids: Tensor, mask: Tensor) -> Tensor:
    """All states stacked on the last axis, [B, T, D, L], zero at padding."""
    rows = [row[valid] for row, valid in zip(ids, mask.bool(), strict=True)]
    states: list[list[Tensor]] = [[] for _ in rows]

    def collect(index: int, prompt: int, state: Tensor) -> None:
        assert len(states[prompt]) == index
        states[prompt].append(state[0])

    model.hidden_states(rows, collect, length=ids.shape[1])
    return padded([torch.stack(row, dim=-1) for row in states], mask)


def features(extractor: FeatureExtractor, states: Tensor, mask: Tensor) -> list[PromptFeatures]:
    rows = [row[valid] for row, valid in zip(states, mask.bool(), strict=True)]
    sums = extractor.begin(len(rows))
    for index in range(states.shape[-1]):
        for prompt, row in enumerate(rows):
            sums.add(index, prompt, row[None, ..., index])
    return sums.finish()


def post(case: Case) -> None:
    weights = case.weights()
    model = build_connectors(case.meta["config"], weights)
    states, mask = case["in/hidden_states"], case["in/attention_mask"]
    recorder = Recorder()
    for stream in ("video", "audio"):
        connector: EmbeddingsConnector = getattr(model, f"{stream}_embeddings_connector")
        for i, block in enumerate(connector.transformer_1d_blocks):
            assert isinstance(block, ConnectorBlock)
            recorder.watch(f"mid/{stream}_block{i}_attn1", block.attn1)
            recorder.watch(f"mid/{stream}_block{i}", block)

    rows = features(model.text_embedding_projection, states, mask)
    check_features(case, model.text_embedding_projection, states, mask, rows)
    contexts = model(rows, mask.shape[1])
    for stream in ("video", "audio"):
        check_connector(case, stream, getattr(model, f"{stream}_embeddings_connector"), mask, rows, recorder)
        context = torch.cat([getattr(row, stream) for row in contexts])
        case.check(f"out/{stream}_context", context)
        if (name := f"out/{stream}_context_projected") in case:
            prefix = f"{TRANSFORMER}{'' if stream == 'video' else 'audio_'}caption_projection."
            case.check(name, project(weights, prefix, context))
    check_mask(case, mask)


def check_features(
    case: Case, extractor: FeatureExtractor, states: Tensor, mask: Tensor, rows: list[PromptFeatures]
) -> None:
    """The input of each projection, flattened as the checkpoint counts its columns, and its output."""
    for projection, stream in zip(extractor.projections(), ("video", "audio"), strict=False):
        name = next(n for n, module in extractor.named_children() if module is projection)
        if f"mid/{name}_input" in case:
            normalised = [
                torch.stack([extractor.normalise(state) for state in row[valid].unbind(-1)], dim=-1)
                for row, valid in zip(states, mask.bool(), strict=True)
            ]
            flat = [row.flatten(1) * extractor.rescale(projection) for row in normalised]
            case.check(f"mid/{name}_input", padded(flat, mask))
        if f"mid/{name}_output" in case:
            results = [getattr(row, stream) for row in rows]
            case.check(f"mid/{name}_output", padded(results, mask, projection.bias))


def check_connector(
    case: Case,
    stream: str,
    connector: EmbeddingsConnector,
    mask: Tensor,
    rows: list[PromptFeatures],
    recorder: Recorder,
) -> None:
    length = mask.shape[1]
    if (name := f"mid/{stream}_after_registers") in case:
        case.check(name, torch.cat([connector.with_registers(getattr(row, stream), length) for row in rows]))
    rope = connector.rope(length, torch.device("cpu"))
    for function in ("cos", "sin"):
        if (name := f"mid/{stream}_rope_{function}") in case:
            case.check(name, as_recorded(getattr(rope, function), rope.layout))
    names = [name for name in case.tensors if re.fullmatch(rf"mid/{stream}_block\d+(_attn1)?", name)]
    for name in sorted(names, key=list(recorder.outputs).index):
        case.check(name, torch.cat(recorder.outputs[name]))


def project(weights: Mapping[str, Tensor], prefix: str, context: Tensor) -> Tensor:
    own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    dim, text_dim = own["linear_1.weight"].shape
    with torch.device("meta"):
        projection = TextProjection(text_dim, dim)
    build(projection, own)
    return projection(context)


def check_mask(case: Case, mask: Tensor) -> None:
    """Every position of a context is valid, whatever the prompt's length."""
    if "out/attention_mask" in case:
        case.check("out/attention_mask", torch.ones_like(mask))


def path(case: Case) -> None:
    weights = case.weights()
    gemma = build_gemma(case.meta["gemma_config"], weights)
    model = build_connectors(case.meta["config"], weights)
    ids, mask = case["in/input_ids"], case["in/attention_mask"]
    length = ids.shape[1]
    if "mid/hidden_states" in case:
        check_valid(case, "mid/hidden_states", hidden_states(gemma, ids, mask), mask)
    rows = [row[valid] for row, valid in zip(ids, mask.bool(), strict=True)]
    sums = model.text_embedding_projection.begin(len(rows))
    gemma.hidden_states(rows, sums.add, length=length)
    contexts = model(sums.finish(), length)
    case.check("out/video_context", torch.cat([row.video for row in contexts]))
    case.check("out/audio_context", torch.cat([row.audio for row in contexts]))
    check_mask(case, mask)


def tokenizer(case: Case) -> None:
    folder = case.path.parent
    named = folder / str(case.meta["tokenizer"])
    prompts = PromptTokenizer(find_tokenizer(named if named.is_dir() else folder))
    for i, expected in enumerate(case.meta["cases"]):
        text, max_length = expected["prompt"], expected["max_length"]
        input_ids, attention_mask = prompts.encode_padded(text, max_length)
        num_valid = sum(attention_mask)
        actual = {
            "valid_ids": input_ids[max_length - num_valid :],
            "n_valid": num_valid,
            "n_pad": max_length - num_valid,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
        for key in actual.keys() & expected.keys():
            case.check_equal(f"{i}/{key}", actual[key], expected[key])
