"""The block streaming of the official ltx-core, where the installed package has it.

The package that is published (1.0.0) has none: the module below is missing from it, and the measurement ends
with that reason.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import fill, inputs, run


def build(task: dict[str, Any]) -> Callable[[], None]:
    """One step: all passes through the transformer."""
    from ltx_core.block_streaming import BlockStreamingWrapper
    from ltx_core.model.transformer.modality import Modality
    from ltx_core.model.transformer.model_configurator import LTXModelConfigurator

    with torch.device("meta"):
        model = LTXModelConfigurator.from_config({"transformer": task["transformer"]})
    fill(model, torch.bfloat16)
    device = torch.device(task["device"])
    streamed = BlockStreamingWrapper(model, device=device)
    given = inputs(task)
    sigma = torch.full((1,), 0.5, device=device)

    def modality(stream: str) -> Any:
        latent = given[stream]
        return Modality(
            latent=latent,
            sigma=sigma,
            timesteps=sigma.expand(1, latent.shape[1]),
            positions=given[f"{stream}_positions"],
            context=given[f"{stream}_text"],
        )

    def step() -> None:
        for _ in range(task["passes"]):
            streamed(video=modality("video"), audio=modality("audio"), perturbations=None)

    return step


if __name__ == "__main__":
    run(build)
