"""The optimiser of the nano networks against direct computation."""

import math

import pytest
import torch
from torch import Tensor, nn

from training.nano.muon import Average, MuonAdamW, learning_rate_scale, orthogonalize


def newton_schulz(matrix: Tensor) -> Tensor:
    """The published iteration, on one matrix."""
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    # The direction of every singular pair stays.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert (torch.diagonal(u.mT @ found @ v.mT, dim1=1, dim2=2) > 0.6).all()


def test_steps_as_published() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 1))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = MuonAdamW(
        net.named_parameters(), lr=0.01, adamw_lr=0.003, weight_decay=0.1, adamw_names=["3."]
    )
    momentum = {name: torch.zeros_like(p) for name, p in before.items()}
    expected = dict(before)
    for scale in (1.0, 0.5):
        net(torch.randn(2, 4, 9, 9)).square().mean().backward()
        for name in ("0.weight", "1.weight", "2.weight"):
            p = net.get_parameter(name)
            assert p.grad is not None
            momentum[name] = 0.95 * momentum[name] + 0.05 * p.grad
            mixed = (0.05 * p.grad + 0.95 * momentum[name]).flatten(1)
            update = newton_schulz(mixed) * 0.2 * math.sqrt(max(mixed.shape))
            decayed = expected[name] * (1 - 0.01 * scale * 0.1)
            expected[name] = decayed - 0.01 * scale * update.view(p.shape)
        optimizer.step(scale)
    for name in ("0.weight", "1.weight", "2.weight"):
        torch.testing.assert_close(net.get_parameter(name).detach(), expected[name], rtol=1e-4, atol=1e-5)
    # AdamW moves every weight by about its learning rate at first.
    for name in ("3.weight", "0.bias", "3.bias"):
        moved = (net.get_parameter(name).detach() - before[name]).abs()
        assert 0 < moved.max() < 0.0046
    assert all(p.grad is None for p in net.parameters())


def test_masters_of_narrow_parameters() -> None:
    """Updates far below the spacing of bfloat16 add up."""
    net = nn.Linear(8, 8).bfloat16()
    before = net.weight.detach().clone()
    optimizer = MuonAdamW(net.named_parameters(), lr=1e-3)
    for _ in range(200):
        torch.autograd.backward([net.weight.float().sum(), net.bias.float().sum()])
        optimizer.step()
    assert net.weight.dtype == torch.bfloat16
    moved = (before - net.weight.detach()).float()
    # A gradient of equal numbers has rank one: its update is .2 sqrt(8) / 8 in every place.
    assert moved.mean() == pytest.approx(200 * 1e-3 * 0.2 * math.sqrt(8) / 8, rel=0.35)


def test_schedule() -> None:
    scales = [learning_rate_scale(step, 100, warm_up=10, flat=0.5, floor=0.2) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[10:51] == [1.0] * 41
    assert scales[75] == pytest.approx(0.6)
    assert scales[99] == pytest.approx(0.2, abs=0.01)


def test_average() -> None:
    net = nn.Linear(2, 2, bias=False)
    average = Average(net, decay=0.9)
    with torch.no_grad():
        for value in range(200):
            net.weight.fill_(value % 2)
            average.update()
    average.swap()
    assert net.weight.detach().mean() == pytest.approx(0.5, abs=0.06)
    average.swap()
    assert (net.weight == 1).all()
