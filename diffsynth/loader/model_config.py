"""Which weights to use, where they come from, and in which states they are kept: the public API's names."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.loader.download import HUBS, Hub, fetch, is_folder, matches, pending_mark
from diffsynth.loader.weight_files import WeightFiles, index_shards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATES = ("offload", "onload", "preparing", "computation")
_DISK_STATES = frozenset({"offload", "onload"})
_MODEL_ID = re.compile(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*")
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\..+)")
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}


@dataclass(kw_only=True)
class ModelConfig:
    """One model: files on this machine, files of a hub, or tensors in memory.

    Where from:
        path: a file, a folder of shards, or a list of files.  If given, nothing is fetched.
        model_id: repository on a hub, ``owner/name``.
        origin_file_pattern: file or glob in that repository, or a list of them; None, "" or a name ending in
            "/" means a folder with a tokenizer (weights in it are not fetched).
        download_source: "modelscope" or "huggingface"; None: ``DIFFSYNTH_DOWNLOAD_SOURCE``, else modelscope.
        local_model_path: folder of all models, files lie at ``local_model_path/model_id/...``; None:
            ``DIFFSYNTH_MODEL_BASE_PATH``, else ``./models``.
        skip_download: use only what is there; None: ``DIFFSYNTH_SKIP_DOWNLOAD``, else False.
        state_dict: tensors by checkpoint key, instead of reading the files.

    States (``offload``: at rest; ``onload``: wanted soon; ``preparing``: about to compute; ``computation``):
        each has a ``*_device`` (name or torch.device) and a ``*_dtype``; "disk" is allowed for offload and
        onload.  None leaves the choice to the planner.
    """

    path: str | Path | list[str | Path] | None = None
    model_id: str | None = None
    origin_file_pattern: str | list[str] | None = None
    download_source: str | None = None
    local_model_path: str | Path | None = None
    skip_download: bool | None = None
    offload_device: "str | torch.device | None" = None
    offload_dtype: "torch.dtype | str | None" = None
    onload_device: "str | torch.device | None" = None
    onload_dtype: "torch.dtype | str | None" = None
    preparing_device: "str | torch.device | None" = None
    preparing_dtype: "torch.dtype | str | None" = None
    computation_device: "str | torch.device | None" = None
    computation_dtype: "torch.dtype | str | None" = None
    state_dict: "Mapping[str, Tensor] | None" = field(default=None, repr=False, compare=False)

    @classmethod
    def named(cls, name: str) -> Self:
        """``MODEL_ID:FILE_PATTERN`` as on the hubs, or the path of a file or folder."""
        model_id, colon, pattern = name.partition(":")
        if colon and not Path(name).exists() and _MODEL_ID.fullmatch(model_id):
            return cls(model_id=model_id, origin_file_pattern=pattern)
        return cls(path=name)

    @classmethod
    def tokenizer_of(cls, name: str) -> Self:
        """Where the tokenizer of a text model lies: with its weights, which are named as in :meth:`named`."""
        config = cls.named(name)
        if config.model_id is not None:
            return cls(model_id=config.model_id)
        return cls(path=name if Path(name).is_dir() else Path(name).parent)

    def validate(self) -> None:
        """Check the arguments alone, without looking at the disk.

        Raises:
            RequestError: names the argument that cannot work.
        """
        if self.path is None and self.model_id is None and self.state_dict is None:
            hint = "path='model.safetensors', or model_id='Lightricks/LTX-2'"
            raise RequestError("path, model_id and state_dict are all missing", hint=hint)
        paths = self._paths()
        if self.path is not None and not (paths and all(isinstance(p, str | Path) and str(p) for p in paths)):
            hint = "path='model.safetensors', or a list of files"
            raise RequestError(f"path={self.path!r} is not a file name", hint=hint)
        if self.model_id is not None and not _MODEL_ID.fullmatch(self.model_id):
            hint = "model_id='Lightricks/LTX-2'"
            raise RequestError(f"model_id={self.model_id!r} is not OWNER/NAME", hint=hint)
        if self.origin_file_pattern is not None and self.model_id is None:
            hint = "model_id='Lightricks/LTX-2'; a local file is named by path"
            raise RequestError("origin_file_pattern is given without model_id", hint=hint)
        for pattern in self.patterns():
            if not isinstance(pattern, str) or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                hint = "'ltx-2-19b-dev.safetensors' or 'model-*.safetensors'"
                raise RequestError(
                    f"origin_file_pattern={pattern!r} is no name inside the repository", hint=hint
                )
        self.hub_name()
        self._validate_states()

    def resolve(self, hub: Hub | None = None) -> list[Path]:
        """The files, fetched first if they are not all there; a whole folder is a list with that folder.

        Args:
            hub: where to fetch from instead of the one that ``download_source`` names.

        Raises:
            RequestError: see :meth:`validate`.
            CheckpointError: a file is missing and may not be fetched.
            DownloadError: a file could not be fetched.
        """
        self.validate()
        if self.path is not None:
            return self._existing_paths()
        if self.model_id is None:
            return []
        folder = self.folder()
        lacking = [pattern for pattern in self.patterns() if self._missing(folder, pattern)]
        if lacking and self.may_download():
            fetch(hub or HUBS[self.hub_name()](), self.model_id, lacking, folder)
        missing = [file for pattern in lacking for file in self._missing(folder, pattern)]
        if missing:
            raise CheckpointError(
                f"{self.model_id}: not on this machine: {', '.join(missing)}",
                hint="put it there, or set local_model_path or DIFFSYNTH_MODEL_BASE_PATH to where it is; "
                "or allow the download: skip_download=False, without DIFFSYNTH_SKIP_DOWNLOAD",
            )
        return list(dict.fromkeys(place for pattern in self.patterns() for place in _local(folder, pattern)))

    def open(self, hub: Hub | None = None) -> WeightFiles:
        """The weights, headers read; a ``state_dict`` is taken instead of files."""
        if self.state_dict is not None:
            self.validate()
            return WeightFiles(state_dict=self.state_dict)
        return WeightFiles(self.resolve(hub))

    def patterns(self) -> list[str]:
        """``origin_file_pattern`` as a list; "" stands for the whole folder."""
        given = self.origin_file_pattern
        listed = [given] if given is None or isinstance(given, str) else given
        return ["" if pattern in {None, "./", "*"} else pattern for pattern in listed] or [""]

    def folder(self) -> Path:
        """Where the repository's files lie on this machine."""
        base = self.local_model_path or os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "./models"
        return Path(base).expanduser() / (self.model_id or "")

    def hub_name(self) -> str:
        """The hub that will be asked.

        Raises:
            RequestError: no such hub.
        """
        argument, name = "download_source", self.download_source
        if name is None:
            argument, name = (
                "DIFFSYNTH_DOWNLOAD_SOURCE",
                os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE") or "modelscope",
            )
        if str(name).lower() not in HUBS:
            raise RequestError(f"{argument}={name!r} is not known", hint=" or ".join(HUBS))
        return str(name).lower()

    def may_download(self) -> bool:
        """Whether missing files may be fetched.

        Raises:
            RequestError: ``DIFFSYNTH_SKIP_DOWNLOAD`` is neither yes nor no.
        """
        if self.skip_download is not None:
            return not self.skip_download
        text = os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "")
        if text.strip().lower() not in _FLAGS:
            raise RequestError(
                f"DIFFSYNTH_SKIP_DOWNLOAD={text!r} is neither true nor false", hint="true or false"
            )
        return not _FLAGS[text.strip().lower()]

    def vram_config(self) -> "dict[str, torch.dtype | torch.device | str | None]":
        """The eight state arguments by name, as other models of the same run can take them."""
        return {
            f"{state}_{what}": getattr(self, f"{state}_{what}")
            for state in STATES
            for what in ("device", "dtype")
        }

    def _validate_states(self) -> None:
        if not any(value is not None for value in self.vram_config().values()):
            return
        import torch

        for state in STATES:
            device, dtype = getattr(self, f"{state}_device"), getattr(self, f"{state}_dtype")
            names = "a name such as 'cpu' or 'cuda:0'" + (", or 'disk'" if state in _DISK_STATES else "")
            known = isinstance(device, str) and re.fullmatch(r"[a-z]+(:\d+)?", device)
            if not (device is None or isinstance(device, torch.device) or known):
                raise RequestError(f"{state}_device={device!r} is not a device", hint=names)
            if device == "disk" and state not in _DISK_STATES:
                raise RequestError(f"{state}_device='disk': nothing can be computed there", hint=names)
            on_disk = dtype == "disk" and device == "disk"
            if not (dtype is None or isinstance(dtype, torch.dtype) or on_disk):
                hint = "a torch dtype such as torch.bfloat16" + (
                    "; 'disk' only where the device is" if dtype == "disk" else ""
                )
                raise RequestError(f"{state}_dtype={dtype!r} cannot be used", hint=hint)

    def _paths(self) -> list[str | Path]:
        return self.path if isinstance(self.path, list) else [] if self.path is None else [self.path]

    def _existing_paths(self) -> list[Path]:
        paths = [Path(path).expanduser() for path in self._paths()]
        for path in paths:
            if not path.exists():
                raise CheckpointError(
                    f"path: {path} does not exist",
                    hint="check the name, or give model_id to fetch it (MODEL_ID:FILE_PATTERN)",
                )
        return paths

    def _missing(self, folder: Path, pattern: str) -> list[str]:
        """What a pattern still lacks on the disk: files that should be there; empty when it is satisfied."""
        found = _local(folder, pattern)
        if not found:
            return [str(folder / pattern)]
        if is_folder(pattern):
            return []
        expected = {name for file in found for name in _siblings(file)}
        index = found[0].parent / "model.safetensors.index.json"
        if index.is_file():
            shards = {found[0].parent / name for name in index_shards(index)}
            expected |= {s for s in shards if matches(s.relative_to(folder).as_posix(), pattern)}
        return sorted(str(file) for file in expected if not file.is_file())


def _local(folder: Path, pattern: str) -> list[Path]:
    """What fits a pattern on the disk: files, or the folder itself if it holds a tokenizer."""
    if is_folder(pattern):
        inside = [file.relative_to(folder).as_posix() for file in (folder / pattern).rglob("tokenizer.*")]
        complete = (
            any(matches(file, pattern) for file in inside) and not pending_mark(folder, pattern).exists()
        )
        return [folder / pattern] if complete else []
    files = sorted(folder.glob(pattern))
    return [
        file for file in files if matches(file.relative_to(folder).as_posix(), pattern) and file.is_file()
    ]


def _siblings(file: Path) -> list[Path]:
    """All shards of the set to which a file named ``...-00002-of-00005...`` belongs."""
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return []
    before, _, count, after = match.groups()
    return [file.with_name(f"{before}{number:05d}-of-{count}{after}") for number in range(1, int(count) + 1)]
