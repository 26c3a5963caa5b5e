"""Checkpoints of the released dimensions with random weights, for measurements where no real file is.

    python -m benchmarks.synthetic --model ltx-2 --folder /data/synthetic [--layers 4]

writes a complete set: the single file, a Gemma folder with its tokenizer, the spatial upsampler and the
distilled LoRA.  A run that was stopped goes on where it was.  :func:`open_synthetic` needs no such files: it
makes each tensor at the moment it is read, from its name and a seed, and leaves only a small file that stands
for them, so that packed files can be kept and found again.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.errors import OutputError
from diffsynth.loader import ModelConfig, NetworkKind, SafetensorsFile, WeightFiles, find_network
from diffsynth.loader.meta import without_weights
from diffsynth.loader.networks import network_spec
from diffsynth.lora import Lora, linear_shapes, read_lora
from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.ltx2.connectors import TextConnectorsConfig
from diffsynth.models.ltx2.transformer_config import TransformerConfig
from diffsynth.pipelines.assemble import OpenedModels, open_models
from diffsynth.pipelines.parts import ModelVersion
from diffsynth.pipelines.released import GEMMA, released_config

Shapes = Mapping[str, tuple[int, ...]]

MODELS: Mapping[str, ModelVersion] = {"ltx-2": "2.0", "ltx-2.3": "2.3", "tiny": "2.0"}
"""``tiny`` has the dimensions of the models that the tests use."""
LORA_RANK = {"ltx-2": 384, "ltx-2.3": 384, "tiny": 2}
_APART = (NetworkKind.GEMMA, NetworkKind.GEMMA_VISION, NetworkKind.UPSAMPLER, NetworkKind.LORA)
"""What no single-file checkpoint holds."""

_GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
_TINY = _GOLDEN / "pipelines" / "tiny_ltx2"
_TOKENIZER = _TINY / "gemma"
_POOL_VALUES = 2**24 + 43  # not a power of two, so that rows of weights do not repeat each other
_SHARD_BYTES = 5 * 10**9
_MARGIN_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """What stands in the metadata of a set of checkpoints."""

    model: str
    version: ModelVersion
    sections: Mapping[str, Any]
    upsampler: Mapping[str, Any]
    gemma: Mapping[str, Any]

    @classmethod
    def of(cls, model: str, layers: int | None = None) -> "Dimensions":
        """Those of a model.

        Args:
            model: one of :data:`MODELS`.
            layers: so many blocks of the transformer instead of what it has, and at most so many layers of
                the text model.
        """
        if model == "tiny":
            sections = _sections(_TINY / "ltx-2-tiny-dev.safetensors")
            upsampler = _sections(_TINY / "ltx-2-tiny-spatial-upscaler-x2.safetensors")
            gemma = json.loads((_TINY / "gemma" / "config.json").read_text(encoding="utf-8"))
        else:
            sections, gemma = released_config(model), released_config(GEMMA)
            upsampler = released_config(f"{model}-spatial-upscaler-x2")
        sections, gemma = deepcopy(sections), deepcopy(gemma)
        if layers is not None:
            text = gemma.get("text_config", gemma)
            text["num_hidden_layers"] = min(layers, text["num_hidden_layers"])
            if "layer_types" in text:
                text["layer_types"] = text["layer_types"][: text["num_hidden_layers"]]
            sections["transformer"]["num_layers"] = layers
        return cls(model=model, version=MODELS[model], sections=sections, upsampler=upsampler, gemma=gemma)

    def shapes(self, kind: NetworkKind) -> dict[str, tuple[int, ...]]:
        """Official key -> shape, of one network."""
        if kind is NetworkKind.GEMMA:
            config: Any = Gemma3Config.from_dict(self.gemma)
            spec, prefixes = network_spec(kind, ()), {"language_model.model.": ""}
        elif kind is NetworkKind.UPSAMPLER:
            spec = network_spec(kind, ())
            config, prefixes = spec.configure(self.upsampler, {}), {"": ""}
        else:
            marks = ["vocoder.bwe_generator."] if self.version == "2.3" else []
            spec = network_spec(kind, marks)
            prefixes = dict(spec.prefixes)
            if kind is NetworkKind.TEXT_CONNECTORS:
                config = TextConnectorsConfig.from_sections(self.sections, self._projection())
            elif kind is NetworkKind.TRANSFORMER:
                config = TransformerConfig.from_sections(self.sections)
            else:
                config = spec.configure(self.sections, {})
        with without_weights():
            state = spec.module(config).state_dict()
        return {_official(name, prefixes): tuple(tensor.shape) for name, tensor in state.items()}

    def single_file(self) -> dict[str, tuple[int, ...]]:
        """Official key -> shape, of all networks of the single file."""
        found: dict[str, tuple[int, ...]] = {}
        for kind in NetworkKind:
            found |= {} if kind in _APART else self.shapes(kind)
        return found

    def lora(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape, of the distilled LoRA: every linear layer of the blocks but the gates."""
        rank = LORA_RANK[self.model]
        found: dict[str, tuple[int, ...]] = {}
        prefix = "model.diffusion_model."
        for key, shape in self.shapes(NetworkKind.TRANSFORMER).items():
            if "transformer_blocks." in key and key.endswith(".weight") and len(shape) == 2:
                layer = "diffusion_model." + key.removeprefix(prefix).removesuffix(".weight")
                if "gate" not in layer:
                    found[f"{layer}.lora_A.weight"] = (rank, shape[1])
                    found[f"{layer}.lora_B.weight"] = (shape[0], rank)
        return found

    def _projection(self) -> Shapes:
        """The shapes that tell how many hidden states the text projection reads."""
        gemma = Gemma3Config.from_dict(self.gemma)
        inputs = gemma.hidden_size * gemma.num_hidden_states
        names = ("aggregate_embed", "video_aggregate_embed", "audio_aggregate_embed")
        return {f"text_embedding_projection.{name}.weight": (1, inputs) for name in names}


class RandomSource:
    """Named tensors that are made when they are read: equal names and seeds give equal values.

    Weights are windows on one pool of Gaussian numbers, scaled as a fresh layer is; so they cost no more than
    a copy.  Norms and deviations are one.
    """

    def __init__(
        self,
        name: str,
        shapes: Shapes,
        *,
        metadata: Mapping[str, str] | None = None,
        seed: int = 0,
        pool: Tensor | None = None,
    ) -> None:
        """``pool``: of :func:`random_pool` with the same seed; None makes one."""
        self.name = name
        self.metadata: dict[str, str] = dict(metadata or {})
        self.shapes = dict(shapes)
        self.dtypes = dict.fromkeys(shapes, "BF16")
        self._seed = seed
        self._pool = random_pool(seed) if pool is None else pool

    def read(
        self, key: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """One tensor: a copy of its own."""
        shape = self.shapes[key]
        values = torch.empty(math.prod(shape), dtype=torch.bfloat16)
        constant = _constant(key)
        if constant is not None:
            values.fill_(constant)
        else:
            self._draw(key, values)
            values.mul_(_deviation(key, shape))
        return values.reshape(shape).to(device=device or "cpu", dtype=dtype)

    def pieces(self, key: str) -> Iterator[tuple[slice, Tensor]]:
        """The whole tensor as one piece."""
        tensor = self.read(key)
        rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
        yield slice(0, rows.shape[0]), rows

    def _draw(self, key: str, out: Tensor) -> None:
        begin = zlib.crc32(f"{self._seed}:{key}".encode()) % _POOL_VALUES
        done = 0
        while done < out.numel():
            count = min(out.numel() - done, _POOL_VALUES - begin)
            out[done : done + count] = self._pool[begin : begin + count]
            done, begin = done + count, 0


def random_pool(seed: int) -> Tensor:
    """What sources of one seed may share: Gaussian numbers, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        return torch.randn(_POOL_VALUES, generator=generator).to(torch.bfloat16)


def open_synthetic(dimensions: Dimensions, folder: Path, *, seed: int = 0, text: bool = True) -> OpenedModels:
    """All networks with weights that are made when they are read; no weight file is needed.

    Args:
        dimensions: of the model.
        folder: gets the small files that stand for the weights.
        seed: of the weights.
        text: whether there is a text model.
    """
    metadata = {"config": json.dumps(dimensions.sections), "model_version": _stated_version(dimensions)}
    marks = {"model_version": _stated_version(dimensions)}
    sources = {
        "checkpoint": (dimensions.single_file(), metadata),
        "upsampler": (
            dimensions.shapes(NetworkKind.UPSAMPLER),
            {"config": json.dumps(dimensions.upsampler)},
        ),
        "gemma": (dimensions.shapes(NetworkKind.GEMMA), {}),
    }
    networks, configs, pool = {}, {}, random_pool(seed)
    for name, (shapes, stated) in sources.items():
        if name == "gemma" and not text:
            continue
        files = WeightFiles.of([RandomSource(name, shapes, metadata=stated, seed=seed, pool=pool)])
        stand_in = _stand_in(folder / f"{dimensions.model}-{name}.safetensors", shapes, marks, seed)
        files.paths = (stand_in,)
        for kind in _kinds_of(name):
            networks[kind] = find_network(kind, files)
            configs[kind] = ModelConfig(path=stand_in)
    tokenizer = PromptTokenizer(_TOKENIZER) if text else None
    return OpenedModels(networks=networks, configs=configs, version=dimensions.version, tokenizer=tokenizer)


def open_written(dimensions: Dimensions, folder: Path) -> OpenedModels:
    """The set that :func:`write_set` wrote: a first start then reads it as users' first starts do."""
    model, gemma = dimensions.model, folder / "gemma"
    paths = [
        folder / f"{model}-dev.safetensors",
        folder / f"{model}-spatial-upscaler-x2.safetensors",
        sorted(gemma.glob("*.safetensors")),
    ]
    return open_models([ModelConfig(path=path) for path in paths], ModelConfig(path=gemma))


def synthetic_lora(dimensions: Dimensions, transformer: nn.Module, folder: Path, *, seed: int = 0) -> Lora:
    """The distilled LoRA, written to the folder first if it is not there: its factors stay in the file."""
    path = folder / f"{dimensions.model}-distilled-lora.safetensors"
    write_file(path, RandomSource("lora", dimensions.lora(), seed=seed))
    shapes = linear_shapes(transformer)
    return read_lora(path, shapes.keys(), shapes)


def write_set(dimensions: Dimensions, folder: Path, *, seed: int = 0) -> list[Path]:
    """Write the whole set; what is there already stays.

    Raises:
        OutputError: the disk has too little space; what was written before is kept.
    """
    model = dimensions.model
    metadata = {"config": json.dumps(dimensions.sections), "model_version": _stated_version(dimensions)}
    upsampler = {"config": json.dumps(dimensions.upsampler)}
    sources = {
        f"{model}-dev.safetensors": RandomSource(
            "checkpoint", dimensions.single_file(), metadata=metadata, seed=seed
        ),
        f"{model}-spatial-upscaler-x2.safetensors": RandomSource(
            "upsampler", dimensions.shapes(NetworkKind.UPSAMPLER), metadata=upsampler, seed=seed
        ),
        f"{model}-distilled-lora.safetensors": RandomSource("lora", dimensions.lora(), seed=seed),
    }
    gemma = folder / "gemma"
    gemma.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(dimensions.shapes(NetworkKind.GEMMA)))
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        sources[f"gemma/{name}"] = RandomSource(name, shapes, seed=seed)
        index |= dict.fromkeys(shapes, name)
    _write_text(gemma / "config.json", dimensions.gemma)
    _write_text(gemma / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    for file in _TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens")):
            shutil.copy(file, gemma / file.name)
    for name, source in sources.items():
        write_file(folder / name, source)
    return [folder / name for name in sources]


def write_file(path: Path, source: RandomSource) -> None:
    """Write a safetensors file, tensor by tensor, and go on with one that was begun.

    Raises:
        OutputError: the disk has too little space.
    """
    if path.is_file():
        return
    header, ends = _header(source)
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("r+b" if part.is_file() else "w+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        begun = file.read(len(header)) == header
        done = sum(end <= size - len(header) for end in ends) if begun else 0
        position = len(header) + (ends[done - 1] if done else 0)
        total = len(header) + (ends[-1] if ends else 0)
        _check_space(path, total - position)
        file.seek(0 if not begun else position)
        file.truncate()
        if not begun:
            file.write(header)
        for key in list(source.shapes)[done:]:
            content = source.read(key).reshape(-1).view(torch.uint8).numpy().data
            while len(content):
                content = content[file.write(content) :]
    part.replace(path)


def _header(source: RandomSource) -> tuple[bytes, list[int]]:
    """The header of a file, and where each tensor ends behind it."""
    entries: dict[str, Any] = {"__metadata__": source.metadata} if source.metadata else {}
    ends, end = [], 0
    for key, shape in source.shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        ends.append(end)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ends


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed + _MARGIN_BYTES:
        raise OutputError(
            f"{path} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
            hint="another --folder, or fewer --layers",
        )


def _stand_in(path: Path, shapes: Shapes, metadata: Mapping[str, str], seed: int) -> Path:
    """A small file for weights that are made when they are read; equal weights leave it as it is."""
    digest = zlib.crc32(json.dumps(sorted(shapes.items())).encode())
    stated = {**metadata, "synthetic": f"seed {seed}, shapes {digest:08x}"}
    if not (path.is_file() and SafetensorsFile(path).metadata == stated):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"synthetic": torch.zeros(1)}, path, stated)
    return path


def _shards(shapes: Shapes) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    nbytes = 0
    for key, shape in shapes.items():
        if shard and nbytes + 2 * math.prod(shape) > _SHARD_BYTES:
            yield shard
            shard, nbytes = {}, 0
        shard[key] = shape
        nbytes += 2 * math.prod(shape)
    yield shard


def _kinds_of(source: str) -> tuple[NetworkKind, ...]:
    apart = {"gemma": (NetworkKind.GEMMA,), "upsampler": (NetworkKind.UPSAMPLER,)}
    return apart.get(source, tuple(kind for kind in NetworkKind if kind not in _APART))


def _official(name: str, prefixes: Mapping[str, str]) -> str:
    """The key under which a file holds a tensor of a module; the first prefix of a module is the official."""
    fitting = [(file, module) for file, module in prefixes.items() if name.startswith(module)]
    file, module = max(fitting, key=lambda pair: len(pair[1]))
    return file + name.removeprefix(module)


def _constant(key: str) -> float | None:
    """The value of tensors that are no random numbers."""
    if "std-of-means" in key:
        return 1.0
    if "mean-of-means" in key or key.endswith(("layernorm.weight", "model.norm.weight")):
        return 0.0  # the norms of the text model add one to their weight
    if key.endswith(".weight") and "norm" in key.rsplit(".", 2)[-2]:
        return 1.0
    return None


def _deviation(key: str, shape: tuple[int, ...]) -> float:
    if len(shape) >= 2:
        return 0.7 / math.sqrt(math.prod(shape[1:]))
    return 0.01


def _sections(path: Path) -> dict[str, Any]:
    return dict(json.loads(SafetensorsFile(path).metadata["config"]))


def _stated_version(dimensions: Dimensions) -> str:
    return f"{dimensions.version}.0"


def _write_text(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(
    folder: Annotated[Path, typer.Option(help="where the files go")],
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "ltx-2",
    layers: Annotated[int | None, typer.Option(min=1, help="so many blocks instead of all")] = None,
    seed: Annotated[int, typer.Option(help="of the weights")] = 0,
) -> None:
    """Write synthetic checkpoints of a model's dimensions."""
    if model not in MODELS:
        raise typer.BadParameter(f"model is one of {', '.join(MODELS)}")
    try:
        for path in write_set(Dimensions.of(model, layers), folder, seed=seed):
            typer.echo(f"{path}  {path.stat().st_size / 1e9:.2f} GB")
    except OutputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
