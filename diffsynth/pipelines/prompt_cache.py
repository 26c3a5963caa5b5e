"""Encoded prompts on disk, so that a prompt that was seen before never loads the text model."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffsynth.conditioning.text import PromptContext
from diffsynth.errors import OutputError
from diffsynth.utils.files import atomic_file
from diffsynth.vram.identity import SourceFile

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when the same prompt and weights would give other numbers."""


def digest_of(files: Iterable[Path], settings: str) -> str:
    """Names files, as they are now, and settings."""
    digest = hashlib.sha256(f"{settings}\n".encode())
    for file in sorted(files):
        digest.update(SourceFile.of(file).digest.encode())
    return digest.hexdigest()


class PromptCache:
    """One small file per prompt, named by everything that decides its content."""

    def __init__(self, folder: Path, *, files: Iterable[Path], settings: str) -> None:
        """
        Args:
            folder: where the encodings lie; made when the first one is stored.
            files: weights of the text model and the connectors, and the tokenizer's files.
            settings: storage and computation formats, and the context length.
        """
        self.folder = folder
        self._weights = digest_of(files, f"{FORMAT_VERSION}\n{settings}")

    def path(self, prompt: str) -> Path:
        """Where the encoding of a prompt lies, or would lie."""
        key = hashlib.sha256(f"{self._weights}\n{prompt.strip()}".encode()).hexdigest()
        return self.folder / f"{key[:40]}.safetensors"

    def get(self, prompt: str) -> PromptContext | None:
        """The stored encoding; None when there is none, or none that can be read."""
        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                # Cloned: windows on the file begin anywhere, and there matrix products may round otherwise.
                video, audio = (file.get_tensor(name).clone() for name in ("video", "audio"))
                return PromptContext(video, audio)
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read (%s): the prompt is encoded again", path, error)
            return None

    def put(self, prompt: str, context: PromptContext) -> None:
        """Store an encoding; a full disk costs a line in the log, not the run."""
        tensors = {"video": context.video.cpu().contiguous(), "audio": context.audio.cpu().contiguous()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path(prompt)) as temporary:
                save_file(tensors, temporary)
        except (OSError, OutputError) as error:
            logger.warning("the encoded prompt is not kept: %s", error)
