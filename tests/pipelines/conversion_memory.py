"""A process that converts a text network with large projections and reports what memory that took.

``python -m tests.pipelines.conversion_memory FOLDER SLICES_BYTES``: the output is JSON.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.footprint import Watch, held
from diffsynth.device import backend_for
from diffsynth.loader import NetworkKind, NetworkWeights, WeightFiles
from diffsynth.loader.load import StoredTensor
from diffsynth.loader.networks import NetworkSpec
from diffsynth.models.ltx2.feature_extractor import FeatureExtractor, FeatureExtractorConfig
from diffsynth.pipelines import packing
from diffsynth.pipelines.storage import Storage
from diffsynth.vram.cache import PackedCache
from tests.loader.headers import write_sparse

PART = "text_encoder_post_modules"
SIZES = FeatureExtractorConfig(
    hidden_size=384, num_states=49, separate=True, video_width=4096, audio_width=2048
)
WIDTH = 2048


class Connector(nn.Module):
    """A stack of blocks, as long as its weights are concerned."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.ModuleDict({"ff": nn.Linear(WIDTH, 2 * WIDTH)}) for _ in range(2))
        self.transformer_1d_blocks = nn.ModuleList(blocks)


class Network(nn.Module):
    """Named as the text connectors of LTX-2.3 are."""

    def __init__(self) -> None:
        super().__init__()
        self.text_embedding_projection = FeatureExtractor(SIZES)
        self.video_embeddings_connector = Connector()


def network(folder: Path) -> NetworkWeights:
    """In a file of zeros."""
    with torch.device("meta"):
        state = Network().state_dict()
    path = folder / "source.safetensors"
    write_sparse(path, {name: ("BF16", tuple(tensor.shape)) for name, tensor in state.items()})
    spec = NetworkSpec(
        kind=NetworkKind.TEXT_CONNECTORS,
        module=lambda _: Network(),
        configure=lambda sections, shapes: None,
        prefixes={},
    )
    return NetworkWeights(
        kind=spec.kind,
        config=None,
        files=WeightFiles(path),
        entries={name: StoredTensor(name) for name in state},
        spec=spec,
    )


def run(folder: Path, slices_bytes: int) -> dict[str, Any]:
    """Convert, watched."""
    packing.SLICES_BYTES = slices_bytes
    weights = network(folder)
    backend = backend_for(torch.device("cpu"))
    packed = packing.PackedWeights(
        {PART: weights},
        Storage.named("int8"),
        torch.bfloat16,
        backend,
        cache=PackedCache(folder),
    )
    planned = packing.conversion_bytes(packed.layouts(PART), torch.bfloat16)
    gc.collect()
    base = held().own
    with Watch(0.002) as watch:
        packed.convert(PART)
        peak = watch.peak.own
    packed.close()
    shapes = (shape for name, shape in weights.files.shapes.items() if "aggregate_embed.weight" in name)
    return {
        "planned": planned,
        "grown": peak - base,
        "projections": sum(2 * rows * columns for rows, columns in shapes),
        "source_reads": weights.files.bytes_read,
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
