"""The dry run must count exactly what a real run would hold."""

import torch
from torch import Tensor, nn

from diffsynth.vram.dry_run import peak_bytes, without_data


def test_chain_holds_two_tensors_at_a_time() -> None:
    def chain(x: Tensor) -> Tensor:
        y = x + 1
        del x
        z = y * 2
        del y
        return z - 1

    one = 1000 * 4
    # The input stays with the caller; beside it a step holds its operand and its result.
    assert peak_bytes(chain, torch.empty(1000)) == 3 * one


def test_views_and_in_place_operations_cost_nothing() -> None:
    def run(x: Tensor) -> Tensor:
        return x.view(10, 100).transpose(0, 1).mul_(2)

    assert peak_bytes(run, torch.empty(1000)) == 4000


def test_freed_tensors_do_not_count() -> None:
    def run(x: Tensor) -> Tensor:
        total = torch.zeros(1)
        for _ in range(50):
            total = total + (x * 2).sum()
        return total

    assert peak_bytes(run, torch.empty(100_000)) < 3 * 400_000


def test_module_at_a_size_that_no_test_machine_could_hold() -> None:
    with torch.device("meta"):
        layer = nn.Linear(100_000, 100_000, dtype=torch.bfloat16)
    without_data(layer)
    tokens = torch.empty(200_000, 100_000, dtype=torch.bfloat16, device="meta")
    assert peak_bytes(layer, tokens) == 2 * tokens.nbytes


def test_dtype_of_parameters_can_be_chosen() -> None:
    layer = without_data(nn.Linear(8, 4, device="meta"), torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.weight.shape == (4, 8)
