"""Enhanced prompts on disk, beside the encoded ones: the same request never writes twice."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffsynth.conditioning import enhance
from diffsynth.conditioning.enhance import Chat
from diffsynth.errors import OutputError
from diffsynth.pipelines.prompt_cache import digest_of
from diffsynth.utils.files import write_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when the same chat, seed and weights would give another text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """Everything besides the weights that decides an enhanced prompt."""

    chat: Chat
    seed: int
    picture: str = ""
    """A digest of the picture; empty without one."""

    @property
    def key(self) -> str:
        """One text for all of it."""
        limits = f"{enhance.MAX_NEW_TOKENS} {enhance.TEMPERATURE}"
        return f"{limits}\n{self.seed}\n{self.picture}\n{' '.join(map(str, self.chat.ids))}"


class EnhancedPromptCache:
    """One small file per enhanced prompt, named by everything that decides its content."""

    def __init__(self, folder: Path, *, files: Iterable[Path], settings: str) -> None:
        """
        Args:
            folder: where the texts lie; made when the first one is stored.
            files: weights of the text model, and the tokenizer's files.
            settings: storage and computation formats, and how pictures are prepared.
        """
        self.folder = folder
        self._weights = digest_of(files, f"enhanced {FORMAT_VERSION}\n{settings}")

    def path(self, writing: Writing) -> Path:
        """Where an enhanced prompt lies, or would lie."""
        key = hashlib.sha256(f"{self._weights}\n{writing.key}".encode()).hexdigest()
        return self.folder / f"{key[:40]}.json"

    def get(self, writing: Writing) -> str | None:
        """The stored text; None when there is none, or none that can be read."""
        path = self.path(writing)
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return str(stored["enhanced_prompt"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): the prompt is enhanced again", path, error)
            return None

    def put(self, writing: Writing, text: str) -> None:
        """Store a text; a full disk costs a line in the log, not the run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.path(writing), json.dumps({"enhanced_prompt": text}))
        except (OSError, OutputError) as error:
            logger.warning("the enhanced prompt is not kept: %s", error)
