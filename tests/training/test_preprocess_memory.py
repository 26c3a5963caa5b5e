"""Samples made under a limit on device memory: the same as without one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth.device import backend_for, resolve_device
from diffsynth.errors import MemoryBudgetError
from diffsynth.pipelines.demand import demands_for
from diffsynth.pipelines.progress import Progress
from diffsynth.training.config import Bucket, TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.networks import open_all, request_of
from diffsynth.training.preprocess import preprocess
from diffsynth.training.samples import Sample, read_index
from diffsynth.training.texts import encode_texts, text_cache
from diffsynth.vram.planner import PhaseDemand
from tests.pipelines.placed import smallest_of
from tests.pipelines.tiny import DEV, GEMMA
from tests.standin import StandIn
from tests.training.clips import FPS, write_config, write_data_set

ENCODING = ("text", "connectors", "encode audio", "encode inputs 1")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path / "cache"))
    write_data_set(tmp_path, 3)
    yield


def configured(folder: Path, samples: str, device: str = "standin", **memory: object) -> TrainConfig:
    """Over three clips; ``samples`` names their folder."""
    return read_config(
        write_config(
            folder,
            model=f'checkpoint = "{DEV}"\ngemma = "{GEMMA}"\ndevice = "{device}"\ndtype = "float32"',
            data=f'source = "clips"\nfolder = "{samples}"\nbuckets = ["64x64x9"]',
            memory="\n".join(f"{name} = {value!r}" for name, value in memory.items()),
        )
    )


def samples_of(config: TrainConfig) -> list[Sample]:
    return [Sample.load(config.data.folder / entry.file) for entry in read_index(config.data.folder)]


def demands(config: TrainConfig) -> list[PhaseDemand]:
    """Of the phases of preprocessing."""
    parts = open_all(config).outline(resolve_device("standin"), torch.float32).parts
    assert parts.tokenizer is not None
    text = [parts.tokenizer.count(caption, 1024) for caption in captions(config)]
    request = request_of(Bucket(64, 64, 9), FPS, 9 / FPS)
    found = demands_for(request, parts.version, storage="f32", parts=parts, text=text)
    return [demand for demand in found if demand.name in ENCODING]


def leanest(config: TrainConfig, wanted: Sequence[PhaseDemand]) -> int:
    """The smallest limit in bytes that these phases can be planned with."""
    return smallest_of(wanted, config.memory.limits.budget(backend_for(resolve_device("standin"))))


def captions(config: TrainConfig) -> list[str]:
    return [path.read_text().strip() for path in sorted(config.data.source.glob("*.txt"))]


def test_captions_are_encoded_together(tmp_path: Path) -> None:
    """In one trip of blocks for which there is not enough room; the same as one by one."""
    free = configured(tmp_path, "free", storage="f32")
    opened, texts = open_all(free), captions(free)
    with StandIn():
        text, connectors = demands(free)[:2]
        limit = leanest(free, [text, connectors])
    assert (text.name, connectors.name) == ENCODING[:2]
    together = connectors.rest_bytes + sum(block.nbytes for block in connectors.blocks)
    assert limit < together + connectors.choices[0].activation_bytes
    tight = replace(free, memory=replace(free.memory, vram_limit=limit / 2**30))
    cache, told = text_cache(tight, opened), list[Progress]()
    with StandIn(capacity_bytes=limit) as device:
        encode_texts(tight, opened, cache, texts, told.append)
        assert device.current_bytes == 0
    assert [event.done for event in told if event.phase == "encode captions"] == [0, 3]
    assert {event.phase for event in told} > {"convert text_encoder", "convert text_encoder_post_modules"}
    one_by_one = configured(tmp_path, "plain", "cpu")
    other = text_cache(one_by_one, opened)
    encode_texts(one_by_one, opened, other, texts)
    for caption in texts:
        found, wanted = cache.get(caption), other.get(caption)
        assert found is not None
        assert wanted is not None
        assert torch.equal(found.video, wanted.video)
        assert torch.equal(found.audio, wanted.audio)


def test_samples_are_the_same_under_a_limit(tmp_path: Path) -> None:
    plain = configured(tmp_path, "plain", "cpu")
    preprocess(plain)
    free = configured(tmp_path, "free", storage="f32")
    with StandIn():
        limit = leanest(free, demands(free))
    tight = configured(tmp_path, "tight", storage="f32", vram_limit=limit / 2**30)
    with StandIn(capacity_bytes=limit) as device:
        preprocess(tight)
        assert device.current_bytes == 0
    found, wanted = samples_of(tight), samples_of(plain)
    assert len(found) == len(wanted) == 3
    for one, other in zip(found, wanted, strict=True):
        for name in ("video", "audio"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert torch.equal(getattr(one.context, name), getattr(other.context, name)), name


def test_storage_is_part_of_a_sample(tmp_path: Path) -> None:
    """Another format of the text model makes other samples; the same one under another limit does not."""
    first = configured(tmp_path, "samples", "cpu", storage="int8")
    assert preprocess(first).made == 3
    again = configured(tmp_path, "samples", "cpu", storage="int8", vram_limit=4.0)
    assert (preprocess(again).made, preprocess(again).kept) == (0, 3)
    other = configured(tmp_path, "samples", "cpu", storage="f32")
    assert preprocess(other).made == 3


def test_what_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    config = configured(tmp_path, "samples", storage="f32")
    with StandIn():
        limit = leanest(config, demands(config)) // 2
    refused = configured(tmp_path, "samples", storage="f32", vram_limit=limit / 2**30)
    with (
        StandIn(capacity_bytes=limit) as device,
        pytest.raises(MemoryBudgetError, match=r"needs .* of device"),
    ):
        preprocess(refused)
    assert device.current_bytes == 0
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing encoded, nothing converted
