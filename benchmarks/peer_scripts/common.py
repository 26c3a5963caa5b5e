"""What the scripts share that measure other programs.

They run in another program's environment, in which this project's package is not: only torch and the standard
library may be imported here.
"""

import json
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

POOL_VALUES = 2**24 + 43


def run(build: Callable[[dict[str, Any]], Callable[[], None]]) -> None:
    """Measure the step that ``build`` makes, and print the result as the last line.

    The argument of the script is a JSON object: ``transformer`` (section of the metadata), ``latent``
    (frames, height, width), ``audio_tokens``, ``text_tokens``, ``passes``, ``steps``, ``cap_bytes``,
    ``device``, ``variant``.
    """
    task = json.loads(sys.argv[1])
    device = torch.device(task["device"])
    try:
        result = _measure(task, device, build)
    except ImportError as error:
        result = {"not_available": f"{type(error).__name__}: {error}"}
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError) as error:
        result = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))


def _measure(
    task: dict[str, Any], device: torch.device, build: Callable[[dict[str, Any]], Callable[[], None]]
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    if cuda and task["cap_bytes"]:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, task["cap_bytes"] / total))
    started = time.perf_counter()
    with torch.inference_mode():
        step = build(task)
        built_s = time.perf_counter() - started
        times = []
        for _ in range(task["steps"] + 1):
            _wait(cuda)
            begun = time.perf_counter()
            step()
            _wait(cuda)
            times.append(time.perf_counter() - begun)
    return {
        "built_s": built_s,
        "step_s": statistics.median(times[1:]),
        "step_s_all": times,
        "peak_vram_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_vram_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "torch": torch.__version__,
    }


def fill(model: nn.Module, dtype: torch.dtype, device: str = "cpu") -> None:
    """Give a module on the meta device random weights, every tensor in ``dtype``."""
    pool = torch.randn(POOL_VALUES, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for owner_name, owner in model.named_modules():
        for store in (owner._parameters, owner._buffers):
            for key, old in store.items():
                if old is None or not old.is_meta:
                    continue
                values = _draw(pool, f"{owner_name}.{key}", tuple(old.shape)).to(dtype).to(device)
                store[key] = (
                    nn.Parameter(values, requires_grad=False) if store is owner._parameters else values
                )


def _draw(pool: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    numel = 1
    for size in shape:
        numel *= size
    values = torch.empty(numel, dtype=torch.bfloat16)
    begin, done = zlib.crc32(name.encode()) % POOL_VALUES, 0
    while done < numel:
        count = min(numel - done, POOL_VALUES - begin)
        values[done : done + count] = pool[begin : begin + count]
        done, begin = done + count, 0
    fan_in = numel // shape[0] if len(shape) > 1 else 10_000
    return values.mul_(0.7 * fan_in**-0.5).reshape(shape)


def inputs(task: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Latent tokens (1, N, C), text states (1, T, W) and positions of both streams."""
    device = torch.device(task["device"])
    section = task["transformer"]
    frames, height, width = task["latent"]
    width_of_text = section["caption_channels"]
    grid = torch.stack(
        torch.meshgrid(*(torch.arange(n, device=device).float() for n in task["latent"]), indexing="ij")
    ).reshape(1, 3, -1)
    scale = torch.tensor([8 / 24, 32.0, 32.0], device=device).reshape(1, 3, 1)
    time_of_audio = 0.04 * torch.arange(task["audio_tokens"], device=device).float().reshape(1, 1, -1)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    return {
        "video": made(1, frames * height * width, section.get("in_channels", 128)),
        "audio": made(1, task["audio_tokens"], section.get("audio_in_channels", 128)),
        "video_text": made(1, task["text_tokens"], width_of_text),
        "audio_text": made(1, task["text_tokens"], width_of_text),
        "video_positions": torch.stack([grid * scale, (grid + 1) * scale], dim=-1),
        "audio_positions": torch.stack([time_of_audio, time_of_audio + 0.04], dim=-1),
    }


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
