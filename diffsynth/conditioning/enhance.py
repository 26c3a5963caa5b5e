"""Prompt enhancement: the text model rewrites a short prompt into the long kind that the video model knows.

The chat is written out in the turns of Gemma 3, which are the same in every tokenizer folder, and begins with
one ``<bos>``.  Gemma has no system role: the instructions lead the turn of the user.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.conditioning.enhance_instructions import PICTURE_TO_VIDEO, TEXT_TO_VIDEO
from diffsynth.conditioning.text import PromptTokenizer, check_vocabulary
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_writer import Continuation, HeadChunks, table_chunks, write

TEMPERATURE = 0.7
MAX_NEW_TOKENS = 512
STOPS = ("<eos>", "<end_of_turn>")
"""Tokens that end an answer: 1 and 106 in the released tokenizer."""
PICTURE_START, PICTURE_TOKEN, PICTURE_END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"

_ASCII = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u00a0\u202f", " "),
    }
)


@dataclass(frozen=True, slots=True)
class Chat:
    """What the text model is given: ``ids``, and which of them stand for a picture."""

    ids: tuple[int, ...]
    picture: slice | None = None


def chat_of(tokenizer: PromptTokenizer, prompt: str, *, picture_tokens: int = 0) -> Chat:
    """Instructions and prompt as one turn of a user.

    Args:
        tokenizer: of the text model.
        prompt: what is to be rewritten.
        picture_tokens: tokens of the first frame; 0: there is none.
    """
    text, picture = f"user prompt: {prompt.strip()}", ""
    if picture_tokens:
        text = f"User Raw Input Prompt: {prompt.strip()}."
        picture = f"\n\n{PICTURE_START}{PICTURE_TOKEN * picture_tokens}{PICTURE_END}\n\n"
    instructions = (PICTURE_TO_VIDEO if picture_tokens else TEXT_TO_VIDEO).strip()
    ids = tokenizer.encode_verbatim(
        f"<start_of_turn>user\n{instructions}\n\n{picture}{text}<end_of_turn>\n<start_of_turn>model\n"
    )
    if not picture_tokens:
        return Chat(tuple(ids))
    token = tokenizer.token_id(PICTURE_TOKEN)
    assert token is not None, "a tokenizer that cannot mark pictures gets none"
    first = ids.index(token)
    return Chat(tuple(ids), slice(first, first + picture_tokens))


def prepare_picture(picture: Image.Image, size: int) -> Tensor:
    """[1, 3, size, size] float32 in [-1, 1], as the vision tower was trained: the longer side first becomes
    ``size``, then the picture is stretched to a square, both with a bilinear filter."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    smaller = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    square = np.asarray(smaller.resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(square.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0


def rewrite(
    gemma: Gemma3TextModel,
    tokenizer: PromptTokenizer,
    chat: Chat,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    picture: Tensor | None = None,
    chunks: HeadChunks | None = None,
    max_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    on_token: Callable[[int], None] = lambda count: None,
) -> str:
    """The answer of the text model, cleaned; empty when it gave none.

    Args:
        gemma: its embedding table may lie on another device than its layers.
        tokenizer: of the text model.
        chat: see :func:`chat_of`.
        seed: of the draws, 64 bits.
        device: where the layers compute.
        dtype: compute dtype.
        picture: tokens of the picture, [number, D], where the chat has one.
        chunks: of the embedding table as the head reads it; None: where the table lies.
        max_tokens: to write at most.
        temperature: of the draws.
        on_token: called with the number of tokens after each; it may raise to stop.

    Raises:
        CheckpointError: text model and tokenizer do not belong together.
    """
    check_vocabulary(chat.ids, gemma.config)
    continuation = Continuation(
        gemma,
        _embedded(gemma, chat, picture, device, dtype),
        len(chat.ids) + max_tokens,
        device=device,
        dtype=dtype,
        picture=chat.picture,
    )
    ids = write(
        continuation,
        chunks or (lambda: table_chunks(gemma)),
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
        stops=stop_ids(tokenizer),
        on_token=on_token,
    )
    return clean(tokenizer.decode(ids))


def _embedded(
    gemma: Gemma3TextModel, chat: Chat, picture: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[1, n, D]; the tokens of a picture are not scaled."""
    given = gemma.embed(torch.tensor(chat.ids), device=device, dtype=dtype)
    if chat.picture is not None:
        assert picture is not None, "the chat has a place for it"
        given[:, chat.picture] = picture.to(device, dtype)
    return given


def stop_ids(tokenizer: PromptTokenizer) -> frozenset[int]:
    """Ids of :data:`STOPS`, as far as the tokenizer has them."""
    return frozenset(i for i in map(tokenizer.token_id, STOPS) if i is not None)


def clean(text: str) -> str:
    """Plain quotes, hyphens and spaces; everything before the first letter and blanks at the end go."""
    plain = text.translate(_ASCII).rstrip()
    return plain[next((i for i, character in enumerate(plain) if character.isalpha()), len(plain)) :]
