"""The transformer beside the official one, on random configurations with random weights and inputs.

Skipped without the official package; to run it: ``pip install --no-deps ltx-core==1.0.0 scipy``, then
``pytest tests/oracle``.
"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.conditioning.tokens import audio_positions, video_positions
from diffsynth.models.ltx2.transformer import (
    CrossTimestep,
    LTX2Transformer,
    Modality,
    Perturbation,
    SkipKind,
    TransformerConfig,
)
from tests.runners.transformer import PREFIX

configurators = pytest.importorskip("ltx_core.model.transformer.model_configurator")
modalities = pytest.importorskip("ltx_core.model.transformer.modality")
guidance = pytest.importorskip("ltx_core.guidance.perturbations")
patchifiers = pytest.importorskip("ltx_core.components.patchifiers")
shapes = pytest.importorskip("ltx_core.types")

STATED = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "av_cross_ada_norm": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
"""What the official package insists on."""


class Draw:
    """Everything random of one comparison."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = self.pick.choice([1, 2, 3])
        self.section = self._section()

    def _section(self) -> dict[str, Any]:
        choose = self.pick.choice
        heads, head, audio_head = choose([1, 3, 4]), choose([6, 8, 16]), choose([4, 8, 12])
        newer = choose([False, True])
        return STATED | {
            "num_layers": choose([1, 2, 3]),
            "num_attention_heads": heads,
            "attention_head_dim": head,
            "cross_attention_dim": heads * head,
            "in_channels": choose([1, 6]),
            "out_channels": choose([4, 6]),
            "audio_num_attention_heads": heads,
            "audio_attention_head_dim": audio_head,
            "audio_cross_attention_dim": heads * audio_head,
            "audio_in_channels": choose([3, 4]),
            "audio_out_channels": choose([2, 4]),
            "caption_channels": choose([5, 12]),
            "norm_eps": choose([1e-6, 1e-3]),
            "positional_embedding_theta": choose([10000.0, 100.0]),
            "positional_embedding_max_pos": choose([[20, 2048, 2048], [10, 512, 1024]]),
            "audio_positional_embedding_max_pos": choose([[20], [40]]),
            "timestep_scale_multiplier": choose([1000, 500]),
            "av_ca_timestep_scale_multiplier": choose([1000.0, 1.0]),
            "rope_type": choose(["split", "interleaved"]),
            "frequencies_precision": choose(["float64", "float32"]),
            "apply_gated_attention": newer,
            "cross_attention_adaln": choose([newer, not newer]),
            "caption_proj_before_connector": newer,
        }

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def fill(self, network: nn.Module) -> None:
        """Weights that neither vanish nor explode; norms around one."""
        for parameter in network.parameters():
            width = parameter.shape[-1] if parameter.ndim == 2 else 4
            parameter.copy_(self.normal(*parameter.shape) / width**0.5)

    def stream(self, prefix: str) -> dict[str, Any]:
        """The arguments of a record: those of the two implementations have the same names."""
        batch, section, choose = self.batch, self.section, self.pick.choice
        tokens, words = choose([1, 5, 12]), choose([1, 7])
        width = section[f"{prefix}num_attention_heads"] * section[f"{prefix}attention_head_dim"]
        text = width if section["caption_proj_before_connector"] else section["caption_channels"]
        sigma = torch.tensor([choose([0.0, 1.0, 0.9937, 0.3]) for _ in range(batch)])
        start = self.uniform(batch, 1 if prefix else 3, tokens, 1) * 20
        kept = (self.uniform(batch, tokens, 1) > 0.3).float()
        return {
            "latent": self.normal(batch, tokens, section[f"{prefix}in_channels"]),
            "sigma": sigma,
            "timesteps": choose([kept * sigma[:, None, None], sigma[:, None, None], kept[..., 0]]),
            "positions": torch.cat([start, start + 1], dim=-1),
            "context": self.normal(batch, words, text),
            "context_mask": choose([None, *self._context_masks(tokens, words)]),
            "attention_mask": choose([None, self.uniform(batch, tokens, tokens) * 1.2 - 0.2]),
            "enabled": self.pick.random() < 0.9,
        }

    def _context_masks(self, tokens: int, words: int) -> list[Tensor]:
        batch, heads = self.batch, self.section["num_attention_heads"]
        return [
            (self.uniform(batch, words) > 0.5).long(),
            (self.uniform(batch, tokens, words) > 0.5).long(),
            self.normal(batch, heads, tokens, words),
            self.normal(batch, tokens, words),
            self.normal(batch, 1, words),
        ]

    def perturbations(self) -> list[list[tuple[str, list[int] | None]]]:
        blocks = [None, [0], [self.section["num_layers"] - 1]]
        names = [kind.name for kind in SkipKind]
        counts = [self.pick.choice([0, 1, 2]) for _ in range(self.batch)]
        return [[(self.pick.choice(names), self.pick.choice(blocks)) for _ in range(n)] for n in counts]


def official_perturbations(drawn: list[list[tuple[str, list[int] | None]]]) -> object:
    def one(name: str, blocks: list[int] | None) -> object:
        return guidance.Perturbation(guidance.PerturbationType[f"SKIP_{name}"], blocks)

    samples = [guidance.PerturbationConfig([one(*item) for item in sample]) for sample in drawn]
    return guidance.BatchedPerturbationConfig(samples)


def pair(draw: Draw, *, audio: bool) -> tuple[nn.Module, LTX2Transformer]:
    """The official network and ours with its weights, by the keys of a checkpoint."""
    name = "LTXModelConfigurator" if audio else "LTXVideoOnlyModelConfigurator"
    sections = {"transformer": draw.section}
    official = getattr(configurators, name).from_config(sections).to_empty(device="cpu")
    draw.fill(official)
    weights = official.state_dict()
    config = TransformerConfig.from_sections(sections, keys=[f"{PREFIX}{key}" for key in weights])
    ours = LTX2Transformer(config)
    ours.load_state_dict(weights, strict=True)
    return official, ours


@pytest.mark.parametrize("present", ["both", "video", "audio", "video network"])
@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_velocities(seed: int, present: str) -> None:
    draw = Draw(seed)
    official, ours = pair(draw, audio=present != "video network")
    video = None if present == "audio" else draw.stream("")
    audio = draw.stream("audio_") if present in {"both", "audio"} else None
    drawn = draw.perturbations()
    expected = official(
        *(stream and modalities.Modality(**stream) for stream in (video, audio)),
        official_perturbations(drawn),
    )
    found = ours(
        *(stream and Modality(**stream) for stream in (video, audio)),
        tuple(tuple(Perturbation(SkipKind[n], b and tuple(b)) for n, b in sample) for sample in drawn),
        cross_timestep=CrossTimestep.CROSS,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 5), (16, 1, 3)])
@pytest.mark.parametrize("fps", [24.0, 29.97, 60.0])
def test_positions(grid: tuple[int, int, int], fps: float) -> None:
    patchifier = patchifiers.VideoLatentPatchifier(1)
    bounds = patchifier.get_patch_grid_bounds(shapes.VideoLatentShape(2, 4, *grid), device="cpu")
    factors = shapes.SpatioTemporalScaleFactors.default()
    expected = patchifiers.get_pixel_coords(bounds, factors, causal_fix=True).float()
    expected[:, 0] /= fps
    assert torch.equal(video_positions(grid, fps, batch=2), expected)
    audio = patchifiers.AudioPatchifier(1).get_patch_grid_bounds(shapes.AudioLatentShape(2, 8, grid[0], 16))
    assert torch.equal(audio_positions(grid[0], batch=2), audio)
