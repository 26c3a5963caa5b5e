"""A transformer whose streams are wider than its latents, as those of the released models are.

The streams of the tiny set are 32 and 16 wide, its latents have 128 channels: three quarters of the noise in
a token cannot pass, so no training could predict it.
"""

from pathlib import Path

import torch

from diffsynth.conditioning.text import PromptContext
from diffsynth.training.samples import Sample, write_index
from tests.pipelines.tiny import DEV, sections, tensors, write_checkpoint

PREFIX = "model.diffusion_model."
CHANNELS, AUDIO_CHANNELS, MEL = 12, 3, 2


def write_narrow(file: Path, blocks: int | None = None) -> Path:
    """The transformer of the tiny set with other first and last layers, and ``blocks`` blocks if given."""
    config = sections()
    own = {k: v for k, v in tensors(DEV).items() if k.startswith(PREFIX) and "_connector." not in k}
    random = torch.Generator().manual_seed(3)
    for stream, channels in (("", CHANNELS), ("audio_", AUDIO_CHANNELS * MEL)):
        config["transformer"] |= {
            f"{stream}in_channels": channels,
            f"{stream}out_channels": channels,
        }
        width = own[f"{PREFIX}{stream}patchify_proj.weight"].shape[0]
        own |= {
            f"{PREFIX}{stream}patchify_proj.weight": torch.randn(width, channels, generator=random) / 4,
            f"{PREFIX}{stream}proj_out.weight": torch.randn(channels, width, generator=random) / 8,
            f"{PREFIX}{stream}proj_out.bias": torch.zeros(channels),
        }
    if blocks is not None:
        there = config["transformer"]["num_layers"]
        config["transformer"]["num_layers"] = blocks
        for number in range(there, blocks):
            like = f"{PREFIX}transformer_blocks.{number % there}."
            name = f"{PREFIX}transformer_blocks.{number}."
            own |= {
                key.replace(like, name): tensor.clone() for key, tensor in own.items() if key.startswith(like)
            }
    return write_checkpoint(file, own, config)


def write_samples(folder: Path, count: int = 1, *, repeated: int = 1) -> Path:
    """Samples for it: noise of unit variance, as latents nearly are; each named so often in the index."""
    folder.mkdir()
    random = torch.Generator().manual_seed(4)
    entries = []
    for number in range(count):
        sample = Sample(
            video=torch.randn(1, CHANNELS, 2, 2, 2, generator=random),
            audio=torch.randn(1, AUDIO_CHANNELS, 6, MEL, generator=random),
            context=PromptContext(
                torch.randn(1, 4, 16, generator=random), torch.randn(1, 4, 16, generator=random)
            ),
            fps=24.0,
        )
        path = folder / f"{number}.safetensors"
        sample.save(path, source="none", caption="noise")
        entries.append(sample.entry(path.name, source="none", caption="noise"))
    write_index(folder, entries * repeated)
    return folder
