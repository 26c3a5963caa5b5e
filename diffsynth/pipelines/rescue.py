"""The final latents on the disk while they are decoded: a failure at the very end does not cost the run.

Decoding is where runs die: after minutes or hours of denoising, with the largest activations of all.  The
latents are a few megabytes.  They are written before the first decoder starts, and deleted when the last one
has ended; whatever happens in between, ``diffsynth decode FILE`` or ``pipe.decode(file)`` goes on from them.
"""

import contextlib
import json
import logging
import secrets
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.errors import CheckpointError, OutputError, RequestError
from diffsynth.pipelines.result import Result
from diffsynth.pipelines.stages import keeps_audio
from diffsynth.request import GenerateRequest
from diffsynth.utils.audio import Waveform
from diffsynth.utils.files import atomic_file
from diffsynth.vram.cache import default_folder

logger = logging.getLogger(__name__)

FORMAT = "diffsynth latents 1"
SUFFIX = ".safetensors"
_VIDEO, _AUDIO, _SOUND = "video_latent", "audio_latent", "sound"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalLatents:
    """What a generation has when only decoding is left.

    Attributes:
        video: normalised latent (1, C, F, H, W); None when only sound is made.
        audio: normalised latent (1, C, T, M); None for a model without sound.
        sound: a sound that was given and is handed back as it came, instead of ``audio``.
        record: what made them, as in :attr:`~diffsynth.pipelines.result.Result.record`.
    """

    video: Tensor | None
    audio: Tensor | None
    record: Mapping[str, Any]
    sound: Waveform | None = None

    @classmethod
    def of(cls, result: Result) -> Self:
        """Those of a finished generation."""
        request = result.request
        return cls(
            video=result.video_latent,
            audio=result.audio_latent,
            sound=result.waveform if keeps_audio(request) else None,
            record=result.record,
        )

    @property
    def request(self) -> GenerateRequest:
        """The request in the record.

        Raises:
            CheckpointError: there is none that can be read.
        """
        try:
            return GenerateRequest.from_dict(self.record["request"]).validate()
        except (KeyError, TypeError, RequestError) as error:
            raise CheckpointError(
                f"the record of the latents holds no valid request: {error}",
                hint="the record that came with them, or the diffsynth that wrote them",
            ) from error

    def save(self, path: str | Path) -> None:
        """Write a file, float32, complete or not at all.

        Raises:
            OutputError: the folder is not writable or the disk is full.
        """
        samples = None if self.sound is None else self.sound.samples
        named = {_VIDEO: self.video, _AUDIO: self.audio, _SOUND: samples}
        tensors = {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in named.items()
            if tensor is not None
        }
        metadata = {"format": FORMAT, "record": json.dumps(dict(self.record), ensure_ascii=False)}
        if self.sound is not None:
            metadata["sampling_rate"] = str(self.sound.sampling_rate)
        metadata["crc32"] = _checksum(tensors, metadata)
        with atomic_file(path) as temporary:
            try:
                save_file(tensors, temporary, metadata)
            except SafetensorError as error:
                raise OutputError(
                    f"{path} could not be written: {error}", hint=f"free space in {Path(path).parent}"
                ) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            CheckpointError: it is missing, damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error})", hint="a file of the folder `latents` in the cache"
            ) from error
        if metadata.get("format") != FORMAT or not tensors.keys() <= {_VIDEO, _AUDIO, _SOUND}:
            raise CheckpointError(
                f"{path} does not hold the latents of a generation", hint=f"diffsynth inspect {path}"
            )
        if metadata.pop("crc32", "") != _checksum(tensors, metadata):
            raise CheckpointError(f"{path}: damaged: it does not have its checksum", hint="generate again")
        samples = tensors.get(_SOUND)
        sound = None if samples is None else Waveform(samples, int(metadata["sampling_rate"]))
        return cls(
            video=tensors.get(_VIDEO),
            audio=tensors.get(_AUDIO),
            sound=sound,
            record=json.loads(metadata["record"]),
        )

    def check_model(self, model: str) -> None:
        """Make sure that decoders belong to these latents.

        Raises:
            CheckpointError: they were made by the other model.
        """
        made_by = self.record.get("model")
        if made_by != model:
            raise CheckpointError(
                f"the latents were made by {made_by}, the model is {model}",
                hint=f"a checkpoint of {made_by}",
            )


def latents_folder() -> Path:
    """Where latents lie while they are decoded: beside the packed weights in the user's cache."""
    return default_folder().parent / "latents"


def keep(latents: FinalLatents) -> Path | None:
    """Write latents under a new name in :func:`latents_folder`.

    Returns: the path; None when it cannot be written, which costs a line in the log and not the run.
    """
    path = _new_path()
    return path if _saved(latents, path) else None


@contextlib.contextmanager
def kept(latents: FinalLatents, decoders: Sequence[Path]) -> Iterator[None]:
    """Keep latents in a file for the length of a ``with`` block, and beyond it if the block fails.

    ``decoders``: files that decode them, which the user is told then.
    """
    path = _new_path()
    try:
        _saved(latents, path)
        yield
    except BaseException:
        if path.exists():
            logger.error("decoding did not come to its end; %s", way_out(path, latents.record, decoders))
        raise
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def way_out(path: Path, record: Mapping[str, Any], decoders: Sequence[Path]) -> str:
    """Where the latents are and what to do with them, see :func:`kept`."""
    output = "sound.wav" if record["request"].get("audio_only") else "video.mp4"
    files = [f"--checkpoint {shlex.quote(str(file))}" for file in decoders or ("CHECKPOINT",)]
    command = f"diffsynth decode {shlex.quote(str(path))} --output {output} {' '.join(files)}"
    return f"the latents are in {path}.  Try: {command}"


def _new_path() -> Path:
    name = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}{SUFFIX}"
    return latents_folder() / name


def _saved(latents: FinalLatents, path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        latents.save(path)
    except (OSError, OutputError) as error:
        logger.warning("the latents cannot be kept in case that decoding fails: %s", error)
        return False
    return True


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, shapes and bytes of the tensors and of the metadata."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    checksum = zlib.crc32(json.dumps([shapes, dict(metadata)], sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
