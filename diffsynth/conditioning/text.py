"""Prompt -> token ids -> hidden states -> features -> the contexts that the diffusion model reads.

n valid tokens of a prompt, T context length: it belongs to the checkpoint, 1024 in the released ones.

No chat template and no system prompt: the bare prompt is encoded, as in official ltx-core 1.0.0.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.ltx2.connectors import TEXT_LENGTH, TextConnectors
from diffsynth.models.ltx2.feature_extractor import PromptFeatures, Slices

logger = logging.getLogger(__name__)

_HINT = (
    "download tokenizer.json and tokenizer_config.json of google/gemma-3-12b-it-qat-q4_0-unquantized "
    "into one folder"
)


@dataclass(frozen=True, slots=True)
class PromptContext:
    """One encoded prompt: ``video`` [1, T, Wv], ``audio`` [1, T, Wa].  All positions count: no mask."""

    video: Tensor
    audio: Tensor

    def to(self, device: torch.device | str) -> "PromptContext":
        """The same on a device: between phases contexts wait on the host."""
        return PromptContext(self.video.to(device), self.audio.to(device))


class PromptTokenizer:
    """The Gemma tokenizer under the rules of LTX-2: stripped text, ``<bos>`` in front, nothing at the end."""

    def __init__(self, folder: Path | str) -> None:
        """Load from ``folder`` or the nearest folder below it that holds a tokenizer.

        Raises:
            CheckpointError: no tokenizer, or one that cannot be read.
        """
        path = find_tokenizer(Path(folder))
        self.files = [p for p in (path / "tokenizer.json", path / "tokenizer.model") if p.is_file()]
        """What decides the ids."""
        self.tokenizer = _read_tokenizer(path)
        self._bos_id = self._special_id(path, "<bos>")
        self._pad_id = self._special_id(path, "<pad>", "<eos>")

    def encode(self, text: str, max_length: int = TEXT_LENGTH) -> list[int]:
        """Valid token ids, 1 (an empty prompt: just ``<bos>``) to ``max_length`` of them.

        A longer prompt loses its end, and a warning is logged.
        """
        ids = self._ids(text)
        if len(ids) > max_length:
            logger.warning(
                "the prompt has %d tokens; the last %d are cut off, the model reads %d",
                len(ids),
                len(ids) - max_length,
                max_length,
            )
        return ids[:max_length]

    def count(self, text: str, max_length: int = TEXT_LENGTH) -> int:
        """How many ids :meth:`encode` gives; nothing is logged."""
        return min(len(self._ids(text)), max_length)

    def encode_verbatim(self, text: str) -> list[int]:
        """All token ids of a text that is neither stripped nor cut, ``<bos>`` in front."""
        return [self._bos_id, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token such as ``<end_of_turn>``; None if there is no such token."""
        found: int | None = self.tokenizer.token_to_id(token)
        return found

    def encode_padded(self, text: str, max_length: int = TEXT_LENGTH) -> tuple[list[int], list[int]]:
        """Ids padded on the left to ``max_length``, and their attention mask (1 = valid)."""
        ids = self.encode(text, max_length)
        num_pad = max_length - len(ids)
        return [self._pad_id] * num_pad + ids, [0] * num_pad + [1] * len(ids)

    def _ids(self, text: str) -> list[int]:
        return [self._bos_id, *self.tokenizer.encode(text.strip(), add_special_tokens=False).ids]

    def _special_id(self, path: Path, *names: str) -> int:
        """The id of the first of ``names`` that is there."""
        found = [i for name in names if (i := self.tokenizer.token_to_id(name)) is not None]
        if not found:
            raise CheckpointError(f"{path}: the tokenizer has no {names[0]}, it is not Gemma's", hint=_HINT)
        return found[0]


def find_tokenizer(folder: Path) -> Path:
    """The folder with the tokenizer's files: ``folder`` itself or the least deep one below it.

    Raises:
        CheckpointError: there is none.
    """
    if folder.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            found = [p.parent for p in folder.rglob(name) if (p.parent / "tokenizer_config.json").is_file()]
            if found:
                return min(found, key=lambda p: (len(p.parts), p))
    raise CheckpointError(f"{folder}: no tokenizer there", hint=_HINT)


def _read_tokenizer(folder: Path) -> Tokenizer:
    """From ``tokenizer.json``, or converted from ``tokenizer.model``; it neither pads nor cuts."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else _converted(folder)
    except Exception as error:  # the library's parser raises nothing more specific
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}", hint=_HINT) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _converted(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds to import

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    return tokenizer


def encode_prompts(
    gemma: Gemma3TextModel,
    connectors: TextConnectors,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    *,
    length: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    slices: Slices | None = None,
) -> list[PromptContext]:
    """Encode prompts together.  The context of each is bit-equal to that of encoding it alone.

    Args:
        gemma: its embedding table may lie on another device than its layers.
        connectors: feature extractor and connectors of the same checkpoint family.
        tokenizer: of the text model.
        prompts: positive and negative ones alike.
        length: T, a multiple of the number of registers; the one of the checkpoint if not given.
        device: where everything computes; the device of Gemma's final norm if not given.
        dtype: compute dtype and that of the results; the one of Gemma's final norm if not given.
        slices: source of the projection's slices where they are streamed.

    Raises:
        CheckpointError: text model, tokenizer and connectors do not belong together.
    """
    features = prompt_features(
        gemma, connectors, tokenizer, prompts, length=length, device=device, dtype=dtype, slices=slices
    )
    return contexts_from_features(connectors, features, length=length)


def prompt_features(
    gemma: Gemma3TextModel,
    connectors: TextConnectors,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    *,
    length: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    slices: Slices | None = None,
) -> list[PromptFeatures]:
    """First half of :func:`encode_prompts`, with the same arguments: all that needs the text model."""
    if not prompts:
        return []
    reads, gives = connectors.config.features, gemma.config
    if (reads.hidden_size, reads.num_states) != (gives.hidden_size, gives.num_hidden_states):
        raise CheckpointError(
            f"the connectors read {reads.num_states} states of width {reads.hidden_size}, the text model "
            f"gives {gives.num_hidden_states} of width {gives.hidden_size}",
            hint="LTX-2 needs Gemma 3 12B",
        )
    device, dtype = device or gemma.norm.weight.device, dtype or gemma.norm.weight.dtype
    length = length or connectors.config.text_length
    ids = [tokenizer.encode(prompt, length) for prompt in prompts]
    check_vocabulary([i for row in ids for i in row], gives)
    sums = connectors.text_embedding_projection.begin(len(ids), slices=slices)
    rows = [torch.tensor(row, dtype=torch.int64) for row in ids]
    with torch.no_grad():
        gemma.hidden_states(rows, sums.add, length=length, device=device, dtype=dtype)
        features = sums.finish()
    return [PromptFeatures(row.video.to(dtype), row.audio.to(dtype)) for row in features]


def check_vocabulary(ids: Sequence[int], config: Gemma3Config) -> None:
    """Whether a text model knows tokens.

    Raises:
        CheckpointError: the tokenizer is that of another model.
    """
    largest = max(ids, default=0)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"token {largest} lies outside the vocabulary of {config.vocab_size}",
            hint="take the tokenizer from the folder of the text model",
        )


def contexts_from_features(
    connectors: TextConnectors, features: Sequence[PromptFeatures], *, length: int | None = None
) -> list[PromptContext]:
    """Second half of :func:`encode_prompts`: the text model is not needed any more."""
    if not features:
        return []
    length = length or connectors.config.text_length
    with torch.no_grad():
        return [PromptContext(row.video, row.audio) for row in connectors(features, length)]
