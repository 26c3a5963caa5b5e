"""Prompt enhancement: what the text model is told, and what becomes of its answer."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffsynth.conditioning import enhance
from diffsynth.conditioning.enhance import Chat, chat_of, clean, prepare_picture, rewrite, stop_ids
from diffsynth.conditioning.enhance_instructions import PICTURE_TO_VIDEO, TEXT_TO_VIDEO
from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_config import Gemma3Config
from tests.models.test_gemma3 import TINY

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "text" / "tiny_tokenizer"
WITHOUT_TURNS = GOLDEN / "pipelines" / "tiny_ltx2" / "gemma"


def wide_model() -> Gemma3TextModel:
    """As many tokens as the tokenizer has pieces."""
    torch.manual_seed(3)
    model = Gemma3TextModel(Gemma3Config.from_dict({**TINY, "vocab_size": 512}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(TOKENIZER)


def test_the_chat_is_that_of_the_template(
    tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ``<bos>``: texts that were rendered with it and tokenised again get a second one."""
    text, picture = json.loads((TOKENIZER / "expected_encodings.json").read_text())["chat"]
    monkeypatch.setattr(enhance, "TEXT_TO_VIDEO", f"\n{text['messages'][0]['content']}\n")
    chat = chat_of(tokenizer, " a dog barking \n")
    assert chat == Chat(tuple(text["ids_without_adding_special_tokens"]))

    monkeypatch.setattr(enhance, "PICTURE_TO_VIDEO", picture["messages"][0]["content"])
    chat = chat_of(tokenizer, "a dog barking", picture_tokens=3)
    turns = picture["text"].replace(
        "<start_of_image>", "\n\n<start_of_image><image_soft_token><image_soft_token><image_soft_token>"
        "<end_of_image>\n\n"
    )  # fmt: skip
    assert chat.ids == tuple(tokenizer.tokenizer.encode(turns, add_special_tokens=False).ids)
    assert chat.picture is not None
    assert [i for i, token in enumerate(chat.ids) if token == 512] == [*range(1000)[chat.picture]]


def test_a_template_is_not_needed() -> None:
    bare = PromptTokenizer(WITHOUT_TURNS)
    assert "chat_template" not in (WITHOUT_TURNS / "tokenizer_config.json").read_text()
    ids = chat_of(bare, "a dog").ids
    assert ids.count(2) == 1
    assert not bare.token_id("<start_of_turn>"), "they are spelled out"
    assert bare.decode(ids).endswith("user prompt a dogendofturnstartofturnmodel")


def test_stops_are_found_by_their_names(tokenizer: PromptTokenizer) -> None:
    assert stop_ids(tokenizer) == {1, 9}
    assert stop_ids(PromptTokenizer(WITHOUT_TURNS)) == {1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Style: realistic, a dog.", "Style: realistic, a dog."),
        ("  \n**1. A dog runs.  \n", "A dog runs."),
        ("\u201cGo,\u201d \u2014 the dog\u2019s tail\u00a0wags.", 'Go," - the dog\'s tail wags.'),
        ("a 6\u2032 2\u2033 man, \u22125 C, 3\u20134 o\u2018clock", "a 6' 2\" man, -5 C, 3-4 o'clock"),
        ("\u00c9lan, \u96e8", "\u00c9lan, \u96e8"),
        ("... 42 !", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_cleaning(text: str, expected: str) -> None:
    assert clean(text) == expected


@pytest.mark.parametrize("instructions", [TEXT_TO_VIDEO, PICTURE_TO_VIDEO])
def test_instructions_end_with_an_example_that_keeps_their_rules(instructions: str) -> None:
    rules, example = instructions.split("\nExample\n")
    assert instructions.isascii()
    assert "prompt" in rules
    asked, answer = example.strip().rsplit("\n", 1)
    assert ("user prompt:" in asked) or ("User Raw Input Prompt:" in asked)
    assert answer.startswith("Style: ")
    assert clean(answer) == answer
    assert answer.count(" is ") + answer.count(" are ") > 8, "present progressive throughout"


def test_the_answer_is_decoded_and_cleaned(tokenizer: PromptTokenizer) -> None:
    model = wide_model()
    chat = Chat((2, 5, 9, 30))
    how = {"device": torch.device("cpu"), "dtype": torch.float32, "max_tokens": 30}
    counts: list[int] = []
    text = rewrite(model, tokenizer, chat, seed=1, on_token=counts.append, **how)
    assert text == clean(text)
    assert text
    assert counts == list(range(1, len(counts) + 1))
    assert rewrite(model, tokenizer, chat, seed=1, **how) == text
    with pytest.raises(CheckpointError, match="token 512 lies outside"):
        rewrite(model, tokenizer, Chat((2, 512)), seed=1, **how)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 7), (300, 2)])
def test_a_picture_becomes_a_square(size: tuple[int, int]) -> None:
    prepared = prepare_picture(Image.new("RGB", size, (255, 0, 51)), 28)
    assert prepared.shape == (1, 3, 28, 28)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared[0].mean((1, 2)), torch.tensor([1.0, -1.0, -0.6]))


def test_a_picture_is_neither_turned_nor_mirrored() -> None:
    picture = Image.new("L", (56, 56))
    picture.paste(255, (0, 0, 28, 14))
    prepared = prepare_picture(picture, 28)[0, 0]
    assert prepared[:6, :13].min() == 1
    assert prepared[8:].max() == prepared[:, 16:].max() == -1


def test_a_picture_takes_the_place_of_its_tokens(tokenizer: PromptTokenizer) -> None:
    model = wide_model()
    how = {"device": torch.device("cpu"), "dtype": torch.float32, "max_tokens": 16, "temperature": 0.0}
    chat = Chat((2, 5, 60, 60, 60, 9), slice(2, 5))
    texts = {rewrite(model, tokenizer, chat, seed=1, picture=torch.randn(3, 32), **how) for _ in range(6)}
    assert len(texts) > 1
