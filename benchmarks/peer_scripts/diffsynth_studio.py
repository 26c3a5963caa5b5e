"""DiffSynth-Studio's low-VRAM configuration of the LTX-2 transformer, as its examples state it.

Weights rest on the CPU as float8_e5m2, are kept there or moved to the device as they are while memory lasts,
and are cast to bfloat16 for the computation; guidance passes run one after another.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import fill, inputs, run

PASSED_ON = (
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
CONTEXT_GB = 0.5


def build(task: dict[str, Any]) -> Callable[[], None]:
    """One step: all passes through the transformer."""
    _open_packages()
    from diffsynth.configs.vram_management_module_maps import VRAM_MANAGEMENT_MODULE_MAPS
    from diffsynth.core.vram.layers import enable_vram_management
    from diffsynth.models.ltx2_dit import LTXModel

    section = task["transformer"]
    with torch.device("meta"):
        model = LTXModel(**{key: section[key] for key in PASSED_ON if key in section})
    fill(model, torch.float8_e5m2)
    names = VRAM_MANAGEMENT_MODULE_MAPS["diffsynth.models.ltx2_dit.LTXModel"]
    module_map = {_named(source): _named(target) for source, target in names.items()}
    device, rest = task["device"], torch.float8_e5m2
    states = {
        "offload_dtype": rest,
        "offload_device": "cpu",
        "onload_dtype": rest,
        "onload_device": "cpu",
        "preparing_dtype": rest,
        "preparing_device": device,
        "computation_dtype": torch.bfloat16,
        "computation_device": device,
    }
    cap = task["cap_bytes"]
    limit = cap / 2**30 - CONTEXT_GB if cap and device != "cpu" else None
    model = enable_vram_management(model, module_map, vram_config=states, vram_limit=limit)
    for module in model.modules():
        if hasattr(module, "onload"):
            module.onload()
    given = inputs(task)
    timestep = torch.full((1,), 0.5, device=device)

    def step() -> None:
        for _ in range(task["passes"]):
            model(
                video_latents=given["video"],
                video_positions=given["video_positions"],
                video_context=given["video_text"],
                video_timesteps=timestep.repeat(1, given["video"].shape[1], 1),
                audio_latents=given["audio"],
                audio_positions=given["audio_positions"],
                audio_context=given["audio_text"],
                audio_timesteps=timestep.repeat(1, given["audio"].shape[1], 1),
                sigma=timestep,
            )

    return step


def _open_packages() -> None:
    """Let the transformer be imported alone: the package imports torchvision and more that it never uses.

    Raises:
        ImportError: the package is not there.
    """
    found = importlib.util.find_spec("diffsynth")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("no package diffsynth")
    root = Path(next(iter(found.submodule_search_locations)))
    for name, folder in (("diffsynth", root), ("diffsynth.core", root / "core")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    gradient = importlib.import_module("diffsynth.core.gradient")
    sys.modules["diffsynth.core"].__dict__["gradient_checkpoint_forward"] = (
        gradient.gradient_checkpoint_forward
    )


def _named(path: str) -> type:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    return found


if __name__ == "__main__":
    run(build)
