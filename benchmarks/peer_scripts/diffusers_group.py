"""Group offloading of diffusers on its LTX-2 transformer, variants ``leaf`` and ``block``, with a stream.

Weights are bfloat16, which is what the pipeline's documentation offloads.  As in its pipeline, conditional
and unconditional pass are one batch, and further passes run alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import fill, inputs, run

SAME_NAMES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "cross_attention_dim",
    "caption_channels",
    "audio_num_attention_heads",
    "audio_attention_head_dim",
    "audio_in_channels",
    "audio_out_channels",
    "audio_cross_attention_dim",
)


def build(task: dict[str, Any]) -> Callable[[], None]:
    """One step: all passes through the transformer."""
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.hooks import apply_group_offloading

    section = task["transformer"]
    sizes = {key: section[key] for key in SAME_NAMES if key in section}
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**sizes, rope_type=section.get("rope_type", "split"))
    fill(model, torch.bfloat16)
    model.eval()
    device = torch.device(task["device"])
    if device.type != "cpu":
        how: dict[str, Any] = {"offload_type": "leaf_level"}
        if task["variant"] == "block":
            how = {"offload_type": "block_level", "num_blocks_per_group": 1}
        apply_group_offloading(
            model, onload_device=device, offload_device=torch.device("cpu"), use_stream=True, **how
        )
    given = inputs(task)
    frames, height, width = task["latent"]
    passes = task["passes"]
    batches = [2, *[1] * (passes - 2)] if passes > 1 else [1]

    def step() -> None:
        for size in batches:
            model(
                hidden_states=given["video"].repeat(size, 1, 1),
                audio_hidden_states=given["audio"].repeat(size, 1, 1),
                encoder_hidden_states=given["video_text"].repeat(size, 1, 1),
                audio_encoder_hidden_states=given["audio_text"].repeat(size, 1, 1),
                timestep=torch.full((size, given["video"].shape[1]), 500.0, device=device),
                audio_timestep=torch.full((size, given["audio"].shape[1]), 500.0, device=device),
                sigma=torch.full((size,), 500.0, device=device),
                num_frames=frames,
                height=height,
                width=width,
                audio_num_frames=task["audio_tokens"],
                return_dict=False,
            )

    return step


if __name__ == "__main__":
    run(build)
