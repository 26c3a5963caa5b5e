import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.text import PromptTokenizer, encode_prompts
from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.ltx2.connectors import TextConnectors
from tests.runners.case import Case
from tests.runners.text import build_connectors, build_gemma

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "text" / "tiny_tokenizer"
TINY = GOLDEN / "pipelines" / "tiny_ltx2"
GEMMA = TINY / "gemma"


@pytest.fixture(scope="module")
def gemma() -> Gemma3TextModel:
    config = json.loads((GEMMA / "config.json").read_text())
    file = Case.load(GEMMA / "model-00001-of-00001.safetensors")
    return build_gemma(config, {key: tensor.float() for key, tensor in file.tensors.items()})


@pytest.fixture(scope="module")
def connectors() -> TextConnectors:
    file = Case.load(TINY / "ltx-2-tiny-dev.safetensors")
    weights = {key: tensor.float() for key, tensor in file.tensors.items()}
    return build_connectors(json.loads(file.meta["metadata"]["config"]), weights)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(GEMMA)


def test_contexts_are_those_of_the_official_pipeline(
    gemma: Gemma3TextModel, connectors: TextConnectors, tokenizer: PromptTokenizer
) -> None:
    expected = Case.load(TINY / "expected" / "official_contexts.safetensors")
    arguments = Case.load(TINY / "expected" / "official_one_stage_t2v.safetensors").meta["inputs"]["args"]
    prompts = [arguments["prompt"], arguments["negative_prompt"]]
    for name, context in zip(
        ("pos", "neg"), encode_prompts(gemma, connectors, tokenizer, prompts), strict=True
    ):
        expected.check(f"out/context/{name}_video", context.video)
        expected.check(f"out/context/{name}_audio", context.audio)
    expected.finish()
    assert len(expected.comparisons) == 4


def test_encoding_together_equals_encoding_alone(
    gemma: Gemma3TextModel, connectors: TextConnectors, tokenizer: PromptTokenizer
) -> None:
    prompts = ["A dog is barking behind the fence.", "", "rain " * 60]
    together = encode_prompts(gemma, connectors, tokenizer, prompts, length=256)
    for prompt, context in zip(prompts, together, strict=True):
        (alone,) = encode_prompts(gemma, connectors, tokenizer, [prompt], length=256)
        assert context.video.shape == (1, 256, 16)
        assert torch.equal(alone.video, context.video)
        assert torch.equal(alone.audio, context.audio)
        assert not context.video.requires_grad
    assert not torch.equal(together[0].video, together[1].video)
    assert encode_prompts(gemma, connectors, tokenizer, [], length=256) == []


def test_the_length_is_that_of_the_checkpoint(
    gemma: Gemma3TextModel, connectors: TextConnectors, tokenizer: PromptTokenizer
) -> None:
    short = TextConnectors(replace(connectors.config, text_length=256))
    short.load_state_dict(connectors.state_dict())
    (context,) = encode_prompts(gemma, short, tokenizer, ["a prompt"])
    (expected,) = encode_prompts(gemma, connectors, tokenizer, ["a prompt"], length=256)
    assert context.video.shape == (1, 256, 16)
    assert torch.equal(context.video, expected.video)
    assert torch.equal(context.audio, expected.audio)


def test_compute_dtype_is_that_of_the_call(
    gemma: Gemma3TextModel, connectors: TextConnectors, tokenizer: PromptTokenizer
) -> None:
    weights: dict[str, Tensor] = {key: tensor.bfloat16() for key, tensor in gemma.state_dict().items()}
    with torch.device("meta"):
        half = Gemma3TextModel(gemma.config)
    half.load_state_dict(weights, assign=True)
    half.to(torch.float32).embed_tokens.to(torch.bfloat16)
    (mixed,) = encode_prompts(half, connectors, tokenizer, ["a prompt"], length=128, dtype=torch.float32)
    (exact,) = encode_prompts(gemma, connectors, tokenizer, ["a prompt"], length=128)
    assert mixed.video.dtype == torch.float32
    torch.testing.assert_close(mixed.video, exact.video)


def test_tables_may_stay_on_the_cpu_while_layers_compute_elsewhere(
    gemma: Gemma3TextModel, connectors: TextConnectors, tokenizer: PromptTokenizer
) -> None:
    """The meta device stands for another one: it refuses to be mixed with the CPU as any other does."""
    other = torch.device("meta")
    with other:
        layers = Gemma3TextModel(gemma.config).bfloat16()
        blocks = TextConnectors(connectors.config).bfloat16()
    layers.embed_tokens.weight = gemma.embed_tokens.weight
    blocks.text_embedding_projection = connectors.text_embedding_projection
    (context,) = encode_prompts(layers, blocks, tokenizer, ["a prompt"], length=128)
    for tensor in (context.video, context.audio):
        assert (tensor.device, tensor.dtype, tensor.shape) == (other, torch.bfloat16, (1, 128, 16))


@pytest.mark.gpu
def test_contexts_of_a_gpu_with_tables_on_the_cpu(
    gemma: Gemma3TextModel, connectors: TextConnectors, tokenizer: PromptTokenizer
) -> None:
    device = torch.device("cuda")
    prompts = ["A dog is barking behind the fence.", ""]
    expected = encode_prompts(gemma, connectors, tokenizer, prompts)
    table, projection = gemma.embed_tokens, connectors.text_embedding_projection
    moved, blocks = copy.deepcopy(gemma).to(device), copy.deepcopy(connectors).to(device)
    moved.embed_tokens, blocks.text_embedding_projection = table, projection
    for own, context in zip(encode_prompts(moved, blocks, tokenizer, prompts), expected, strict=True):
        torch.testing.assert_close(own.video.cpu(), context.video, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(own.audio.cpu(), context.audio, atol=1e-3, rtol=1e-3)


def test_parts_of_other_models_are_refused(gemma: Gemma3TextModel, connectors: TextConnectors) -> None:
    case = Case.load(GOLDEN / "text" / "path_ltx2.safetensors")
    other = build_gemma(case.meta["gemma_config"], case.weights())
    with pytest.raises(
        CheckpointError, match="read 4 states of width 16, the text model gives 5 of width 32"
    ):
        encode_prompts(other, connectors, PromptTokenizer(TOKENIZER), ["a"])
    with pytest.raises(CheckpointError, match="token 512 lies outside the vocabulary of 512"):
        encode_prompts(gemma, connectors, PromptTokenizer(TOKENIZER), ["<image_soft_token>"])


def test_prompt_is_stripped_and_starts_with_bos() -> None:
    tokenizer = PromptTokenizer(TOKENIZER)
    assert tokenizer.encode("") == tokenizer.encode(" \n\t ") == [2]
    assert tokenizer.encode("  q\n") == tokenizer.encode("q") == [2, 511]
    assert tokenizer.encode_padded("q", 4) == ([0, 0, 2, 511], [0, 0, 1, 1])


def test_a_long_prompt_is_cut_at_its_end_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = PromptTokenizer(TOKENIZER)
    text = "A small red boat drifts across a quiet lake."
    whole = tokenizer.encode(text)
    assert len(whole) == 27
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert tokenizer.encode(text, 16) == whole[:16]
    (record,) = caplog.records
    assert record.getMessage() == "the prompt has 27 tokens; the last 11 are cut off, the model reads 16"


def test_bos_is_added_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GEMMA / name, tmp_path)
    path = tmp_path / "tokenizer.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"post_processor": None}), encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    bare = PromptTokenizer(tmp_path)
    assert bare.tokenizer.encode("a dog").ids[:1] != [2]
    assert bare.encode("a dog") == PromptTokenizer(GEMMA).encode("a dog")
    assert len(bare.encode("a dog " * 9, 8)) == 8


@pytest.mark.parametrize("folder", [TOKENIZER, GEMMA])
def test_ids_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, oracle = PromptTokenizer(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    pieces = ["A", "lake", "  ", "\n", "\t", "7", "\u00e9", "\u6f22", "\u2581", "\U0001f600", "."]
    pieces += ["<bos>", "<eos>", "<pad>", "<start_of_image>", "<0x0A>", "[multimodal]"]
    random = Random(0)
    for count in range(200):
        text = "".join(random.choices(pieces, k=count % 20))
        assert ours.encode(text) == oracle(text.strip())["input_ids"], repr(text)
    assert ours.encode_padded("")[0][0] == oracle.pad_token_id


def test_padding_and_cutting_that_the_file_asks_for_do_not_happen(tmp_path: Path) -> None:
    shutil.copy(GEMMA / "tokenizer_config.json", tmp_path)
    library = PromptTokenizer(GEMMA).tokenizer
    library.enable_truncation(4)
    library.enable_padding(length=32)
    library.save(str(tmp_path / "tokenizer.json"))
    for text in ("q", "a dog by a lake at night"):
        assert PromptTokenizer(tmp_path).encode(text) == PromptTokenizer(GEMMA).encode(text)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    shutil.copy(TOKENIZER / "tokenizer_config.json", tmp_path)
    text = (TOKENIZER / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("<bos>", "<s>"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no <bos>, it is not Gemma's"):
        PromptTokenizer(tmp_path)


def test_tokenizer_is_found_in_a_nested_folder(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "deep" / "er" / "tokenizer")
    shutil.copytree(TOKENIZER, tmp_path / "a" / "b" / "c" / "other")
    (tmp_path / "a" / "b" / "c" / "other" / "tokenizer.json").write_text("broken")
    assert PromptTokenizer(tmp_path).encode("q") == [2, 511]


def test_missing_or_broken_tokenizer_names_the_way_out(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"no tokenizer there.*download tokenizer\.json"):
            PromptTokenizer(folder)
    shutil.copy(TOKENIZER / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        PromptTokenizer(tmp_path)
