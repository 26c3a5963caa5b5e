"""The tiny model set: where it lies, how to load it, and its LTX-2.3 sister, made on the fly."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.loader import NetworkKind
from diffsynth.loader.networks import network_spec
from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.progress import Progress

TINY = Path(__file__).parents[1] / "golden" / "pipelines" / "tiny_ltx2"
DEV = TINY / "ltx-2-tiny-dev.safetensors"
GEMMA = TINY / "gemma"
UPSCALER = TINY / "ltx-2-tiny-spatial-upscaler-x2.safetensors"
LORA = TINY / "ltx-2-tiny-distilled-lora-2.safetensors"
PICTURES = (TINY / "cond_image_0.png", TINY / "cond_image_1.png")

APART = {NetworkKind.GEMMA, NetworkKind.GEMMA_VISION, NetworkKind.LORA, NetworkKind.UPSAMPLER}
"""What no single-file checkpoint holds."""

SMALL: Mapping[str, Any] = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
"""The smallest call that does everything."""


def load(
    *models: Path,
    stage2_lora: Path | None = LORA,
    tokenizer: Path = GEMMA,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **arguments: Any,
) -> LTX2AudioVideoPipeline:
    """The whole set, or ``models`` instead of it."""
    return LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=dtype,
        device=device,
        model_configs=[ModelConfig(path=path) for path in models or (DEV, GEMMA, UPSCALER)],
        tokenizer_config=ModelConfig(path=tokenizer),
        stage2_lora_config=None if stage2_lora is None else ModelConfig(path=stage2_lora),
        **arguments,
    )


def call(pipe: LTX2AudioVideoPipeline, **arguments: Any) -> tuple[Any, Any]:
    """A small call without a progress bar."""
    given = {"prompt": "a boat on a lake", "negative_prompt": "blurry", "seed": 43, **SMALL, **arguments}
    return pipe(progress_bar_cmd=lambda steps: steps, **given)


def pixels(frames: Sequence[Image.Image]) -> bytes:
    """Every bit of a video."""
    return b"".join(frame.tobytes() for frame in frames)


def same(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    """Whether two results are equal in every bit of picture and sound."""
    return pixels(first[0]) == pixels(second[0]) and torch.equal(first[1], second[1])


class Log:
    """Listens to a run and keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.events.append(progress)

    def phases(self) -> dict[str, list[tuple[int, int]]]:
        """(done, total) of every report, by phase in the order of the phases."""
        found: dict[str, list[tuple[int, int]]] = {}
        for event in self.events:
            found.setdefault(event.phase, []).append((event.done, event.total))
        return found


def sections(file: Path = DEV) -> dict[str, Any]:
    """The configuration in the metadata of a checkpoint."""
    with safe_open(file, framework="pt") as opened:
        return dict(json.loads((opened.metadata() or {})["config"]))


def tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def write_checkpoint(
    file: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], version: str = "2.0.0"
) -> Path:
    save_file(dict(state), file, {"config": json.dumps(config), "model_version": version})
    return file


def write_ltx_2_3(file: Path) -> Path:
    """A checkpoint in the layout of LTX-2.3 with random weights, for the tiny Gemma: gated attention, its own
    text path, the other video decoder and the vocoder of two stages at 48 kHz."""
    config = sections()
    config["transformer"] |= {
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
        "caption_proj_input_norm": False,
        "caption_projection_first_linear": False,
        "caption_projection_second_linear": False,
        "text_encoder_norm_type": "per_token_rms",
        "connector_apply_gated_attention": True,
        "connector_num_attention_heads": 4,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 4,
        "num_layers": 2,
    }
    config["vae"] |= {
        "spatial_padding_mode": "zeros",
        "encoder_base_channels": 8,
        "encoder_blocks": [
            ["compress_space_res", {"multiplier": 2}],
            ["compress_time_res", {"multiplier": 2}],
            ["compress_all_res", {"multiplier": 2}],
            ["compress_all_res", {"multiplier": 1}],
        ],
        "decoder_blocks": [
            ["compress_space", {"multiplier": 2}],
            ["compress_time", {"multiplier": 2}],
            ["compress_all", {"multiplier": 1}],
            ["compress_all", {"multiplier": 2}],
        ],
    }
    generator = {
        "resblock": "AMP1",
        "activation": "snakebeta",
        "stereo": True,
        "resblock_dilation_sizes": [[1, 3, 5]],
        "resblock_kernel_sizes": [3],
        "use_bias_at_final": False,
        "use_tanh_at_final": False,
    }
    config["vocoder"] = {
        "vocoder": generator
        | {
            "upsample_initial_channel": 128,
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
            "upsample_rates": [5, 2, 2, 2, 2, 2],
        },
        "bwe": generator
        | {
            "upsample_initial_channel": 64,
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "upsample_rates": [6, 5, 2, 2, 2],
            "apply_final_activation": False,
            "hop_length": 80,
            "input_sampling_rate": 16000,
            "n_fft": 512,
            "num_mels": 64,
            "output_sampling_rate": 48000,
            "win_size": 512,
        },
    }
    known = {key: tuple(value.shape) for key, value in tensors(DEV).items()}
    # The sizes that stand in no metadata: a projection for each stream over the 4 states of the tiny Gemma.
    known |= {
        f"text_embedding_projection.{stream}_aggregate_embed.weight": (width, 64)
        for stream, width in (("video", 32), ("audio", 16))
    }
    random = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for kind in NetworkKind:
        if kind in APART:
            continue
        spec = network_spec(kind, ["vocoder.bwe_generator."])
        with torch.device("meta"):
            module = spec.module(spec.configure(config, known))
        official = {inside: prefix for prefix, inside in reversed(spec.prefixes.items())}
        for name, tensor in module.state_dict().items():
            prefix = max((p for p in official if name.startswith(p)), key=len)
            value = torch.randn(tensor.shape, generator=random) * 0.05
            positive = tensor.ndim < 2 and name.endswith((".weight", "std-of-means"))
            value = value.abs() + 1 if positive else value
            state[official[prefix] + name.removeprefix(prefix)] = value.bfloat16()
    return write_checkpoint(file, state, config, "2.3.0")


def write_upscaler(file: Path, **config: Any) -> Path:
    """A latent upsampler with random weights and this configuration."""
    stated = {"in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3, **config}
    torch.manual_seed(2)
    module = LatentUpsampler(UpsamplerConfig.from_sections(stated))
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    save_file(state, file, {"config": json.dumps(stated)})
    return file
