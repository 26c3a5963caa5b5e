"""Encodings from the disk are as good as new ones, to the last bit of what is made of them."""

from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.text import PromptContext
from diffsynth.pipelines.prompt_cache import PromptCache
from tests.pipelines.tiny import call, load, same


def test_what_comes_back_lies_where_new_tensors_lie(tmp_path: Path) -> None:
    """Matrix products may round differently where the data begin at an odd address."""
    cache = PromptCache(tmp_path, files=(), settings="")
    context = PromptContext(torch.randn(1, 5, 3), torch.randn(1, 5, 7))
    cache.put("a boat", context)
    found = cache.get("a boat")
    assert found is not None
    for new, old in ((found.video, context.video), (found.audio, context.audio)):
        assert torch.equal(new, old)
        assert new.data_ptr() % 64 == 0


def test_a_known_prompt_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path))
    pipe = load(vram_limit=1.0)
    size = {"height": 128, "width": 128, "use_two_stage_pipeline": True}
    first = call(pipe, **size)
    assert len(list((tmp_path / "prompts").glob("*.safetensors"))) == 2
    assert same(call(pipe, **size), first)
