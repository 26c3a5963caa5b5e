"""The text side of nano in batches, and as the package runs it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from diffsynth.conditioning.text import PromptTokenizer, encode_prompts
from diffsynth.loader import NetworkKind, WeightFiles, load_network
from diffsynth.nano.world import VOCABULARY
from training.nano.dit import TransformerSizes, config_section
from training.nano.prompts import (
    TextModel,
    TextSettings,
    gemma_section,
    token_ids,
    write_gemma,
    write_tokenizer,
)

PROMPTS = [
    "a red circle moves left over a blue background, a high beep",
    "",
    "green triangle, white background, stands still in the center, silence",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("gemma")
    write_tokenizer(folder, VOCABULARY)
    return PromptTokenizer(folder)


def text_model(tokenizer: PromptTokenizer) -> TextModel:
    torch.manual_seed(0)
    settings = TextSettings()
    section = config_section(TransformerSizes(), settings)
    return TextModel(section, gemma_section(settings, tokenizer.tokenizer.get_vocab_size()))


def test_words_are_tokens_and_the_rest_leaves_no_trace(tokenizer: PromptTokenizer) -> None:
    ids = tokenizer.encode(PROMPTS[0])
    assert ids[0] == tokenizer.token_id("<bos>") == 2
    assert len(ids) == 1 + 12
    assert tokenizer.encode("A big, RED circle: moves   left over a blue background; a high beep!") == ids
    assert tokenizer.decode(ids) == PROMPTS[0].replace(",", "")
    assert tokenizer.encode("redder circles") == tokenizer.encode("") == [2]


def test_transformers_reads_the_tokenizer(tokenizer: PromptTokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(str(tokenizer.files[0].parent), local_files_only=True)
    ids = theirs(PROMPTS[0], padding="max_length", max_length=32)["input_ids"]
    assert ids == [0] * 20 + tokenizer.encode(PROMPTS[0])[1:]


def test_batches_are_encoded_as_the_package_does(tokenizer: PromptTokenizer) -> None:
    text = text_model(tokenizer)
    with torch.no_grad():
        video, audio = text(*token_ids(tokenizer, PROMPTS, 32))
    assert video.shape == audio.shape == (3, 32, 64)
    for row, context in enumerate(encode_prompts(text.gemma, text.connectors, tokenizer, PROMPTS)):
        torch.testing.assert_close(video[row : row + 1], context.video, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(audio[row : row + 1], context.audio, atol=2e-5, rtol=2e-5)


def test_every_parameter_of_the_text_side_learns(tokenizer: PromptTokenizer) -> None:
    text = text_model(tokenizer)
    video, audio = text(*token_ids(tokenizer, PROMPTS, 32))
    (video.sin().sum() + audio.cos().sum()).backward()
    silent = [n for n, p in text.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_the_text_model_loads_by_the_ordinary_loader(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    text = text_model(tokenizer)
    write_gemma(tmp_path, text)
    files = WeightFiles(tmp_path / "model.safetensors")
    loaded = load_network(NetworkKind.GEMMA, files, dtype=torch.float32, device="cpu")
    assert loaded.config == text.gemma.config
    expected = text.gemma.layers[1].mlp.up_proj.weight.bfloat16().float()
    assert torch.equal(loaded.layers[1].mlp.up_proj.weight, expected)
