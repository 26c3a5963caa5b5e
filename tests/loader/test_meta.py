import gc

import pytest
import torch
from torch import nn

from diffsynth.loader.meta import without_weights


def layers() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Conv1d(3, 2, 1), nn.GroupNorm(1, 2))


def test_only_the_values_are_missing() -> None:
    whole = layers().state_dict()
    with without_weights():
        bare = layers().state_dict()
    assert {key: (value.shape, value.dtype) for key, value in bare.items()} == {
        key: (value.shape, value.dtype) for key, value in whole.items()
    }
    assert all(value.is_meta for value in bare.values())


def test_layers_outside_have_values() -> None:
    with without_weights():
        layers()
    torch.manual_seed(0)
    first = layers().state_dict()
    torch.manual_seed(0)
    second = layers().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["0.weight"].std() > 0.5


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_left_as_it_was(collecting: bool) -> None:
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(TypeError), without_weights():
            nn.Linear("wide", 3)  # type: ignore[arg-type]
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
