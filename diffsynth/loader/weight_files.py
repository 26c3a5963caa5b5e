"""Several weight files, or a state dict in memory, seen as one set of named tensors."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.errors import CheckpointError
from diffsynth.loader.safetensors_file import SafetensorsFile, WeightSource, safetensors_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StateDictSource:
    """Tensors that the caller already holds.  Reading copies only what must change dtype or device."""

    def __init__(self, state_dict: "Mapping[str, Tensor]", name: str = "state_dict") -> None:
        self._tensors = state_dict
        self.name = name
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {k: tuple(v.shape) for k, v in state_dict.items()}
        self.dtypes: dict[str, str] = {k: safetensors_dtype(v.dtype) for k, v in state_dict.items()}

    def read(
        self, key: str, dtype: "torch.dtype | None" = None, device: "torch.device | str | None" = None
    ) -> "Tensor":
        """The tensor itself, or a converted copy."""
        return self._tensors[key].detach().to(device=device or "cpu", dtype=dtype)

    def pieces(self, key: str) -> "Iterator[tuple[slice, Tensor]]":
        """The whole tensor as one piece on the CPU."""
        tensor = self._tensors[key].detach().cpu()
        rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
        yield slice(0, rows.shape[0]), rows


class WeightFiles:
    """One key space over several sources.

    Args:
        paths: files, or folders of one sharded model (``*.safetensors`` with an index, or a Gemma 3 folder).
        state_dict: tensors in memory, instead of or beside files.

    Raises:
        CheckpointError: a file cannot be read; two sources hold the same key; a folder is no set of shards.
    """

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path] = (),
        *,
        state_dict: "Mapping[str, Tensor] | None" = None,
    ) -> None:
        given = [paths] if isinstance(paths, str | Path) else list(paths)
        self.paths = tuple(file for path in given for file in shard_files(Path(path)))
        sources: list[WeightSource] = [SafetensorsFile(path) for path in self.paths]
        if state_dict is not None:
            sources.append(StateDictSource(state_dict))
        if not sources:
            raise CheckpointError("no weight files were given", hint="name at least one .safetensors file")
        self._unite(sources)

    @classmethod
    def of(cls, sources: Iterable[WeightSource]) -> "WeightFiles":
        """The same view over sources that are open already."""
        files = cls.__new__(cls)
        opened = list(sources)
        files.paths = tuple(s.path for s in opened if isinstance(s, SafetensorsFile))
        files._unite(opened)
        return files

    def _unite(self, sources: list[WeightSource]) -> None:
        self.sources = tuple(sources)
        self._source: dict[str, WeightSource] = {}
        for source in sources:
            for key in source.shapes:
                if key in self._source:
                    raise CheckpointError(
                        f"{self._source[key].name} and {source.name} both hold {key!r}",
                        hint="give files of one model together only when they are its parts",
                    )
                self._source[key] = source
        self.shapes = {key: source.shapes[key] for key, source in self._source.items()}
        self.dtypes = {key: source.dtypes[key] for key, source in self._source.items()}

    @property
    def name(self) -> str:
        """What the tensors come from, for messages."""
        names = [source.name for source in self.sources]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    @property
    def keys(self) -> list[str]:
        """All tensor names, source by source."""
        return list(self._source)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return sum(source.bytes_read for source in self.sources if isinstance(source, SafetensorsFile))

    def holding(self, keys: Iterable[str]) -> "WeightFiles":
        """The sources that hold any of ``keys``, with all their other keys."""
        wanted = {id(self._source[key]) for key in keys}
        return WeightFiles.of(source for source in self.sources if id(source) in wanted)

    @property
    def metadata(self) -> dict[str, str]:
        """Text entries of all sources; of equal names the first source counts, see :meth:`sections`."""
        merged: dict[str, str] = {}
        for source in self.sources:
            merged = {**source.metadata, **merged}
        return merged

    def sections(self) -> dict[str, Any] | None:
        """The parsed metadata entry ``config``, united over the sources; None when no source has one.

        Raises:
            CheckpointError: an entry is not JSON, or two sources state different things.
        """
        united: dict[str, Any] | None = None
        for source in self.sources:
            text = source.metadata.get("config")
            if text is None:
                continue
            section = _parse(text, source.name)
            united = {} if united is None else united
            differing = [key for key in section if key in united and united[key] != section[key]]
            if differing:
                raise CheckpointError(
                    f"{self.name}: the files state different configurations of {differing}",
                    hint="give files of one model only",
                )
            united.update(section)
        return united

    def read(
        self, key: str, dtype: "torch.dtype | None" = None, device: "torch.device | str | None" = None
    ) -> "Tensor":
        """One tensor, see :meth:`SafetensorsFile.read`."""
        return self._source[key].read(key, dtype, device)

    def pieces(self, key: str) -> "Iterator[tuple[slice, Tensor]]":
        """One tensor in pieces of whole rows, see :meth:`SafetensorsFile.pieces`."""
        return self._source[key].pieces(key)


def shard_files(path: Path) -> list[Path]:
    """The files that a path stands for: itself, or the shards of the model in a folder.

    Raises:
        CheckpointError: the folder is in the diffusers format, lacks shards, or holds several models.
    """
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = [path / name for name in index_shards(index)]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(f"{path}: missing shards {missing}", hint="fetch the missing files")
        return shards
    if (path / "model_index.json").is_file() or any(path.glob("diffusion_pytorch_model*")):
        raise CheckpointError(
            f"{path} is a folder in the diffusers format",
            hint="use the single file of the same model, e.g. ltx-2-19b-dev.safetensors of Lightricks/LTX-2",
        )
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 or (files and all(f.name.startswith("model-") for f in files)):
        return files
    found = f"it holds {[f.name for f in files]}" if files else "it holds no .safetensors file"
    raise CheckpointError(f"{path} is a folder; {found}", hint="name the file itself")


def index_shards(index: Path) -> list[str]:
    """File names that a ``model.safetensors.index.json`` lists, sorted."""
    weight_map = _parse(index.read_text(encoding="utf-8"), str(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no table of shards", hint="delete the file and fetch it again")
    return sorted({str(name) for name in weight_map.values()})


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{name}: not JSON ({error})", hint="fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: not a JSON object", hint="fetch the file again")
    return value
