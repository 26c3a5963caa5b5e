"""Training that breaks off and goes on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.nano.loop import Loop
from training.nano.muon import MuonAdamW, learning_rate_scale


class PowerCutError(Exception):
    pass


def train(state: Path, *, steps: int = 6, breaks_at: int | None = None) -> Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).bfloat16()

    def loss_at(step: int, steps: int) -> Tensor:
        if step == breaks_at:
            raise PowerCutError
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        return net(x.bfloat16()).float().square().mean() * steps

    loop = Loop(
        name="net",
        steps=steps,
        schedule=lambda step, steps: learning_rate_scale(step, steps),
        state=state,
        report=lambda: "as expected",
        report_s=0.0,
    )
    loop.run(MuonAdamW(net.named_parameters(), lr=0.02), loss_at)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_goes_on_where_it_broke_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(tmp_path / "whole.pt")
    with pytest.raises(PowerCutError):
        train(tmp_path / "broken.pt", breaks_at=4)
    # The number of steps is that of the run that broke off.
    assert torch.equal(train(tmp_path / "broken.pt", steps=99), whole)
    assert "net 6/6" in capsys.readouterr().out
