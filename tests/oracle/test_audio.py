"""The audio networks beside the official ones, on random configurations with random weights and inputs.

Each becomes a golden case in memory, which the runner of its component compares.  Skipped without the
official package; to run it: ``pip install --no-deps ltx-core==1.0.0 scipy torchaudio``, then
``pytest tests/oracle``.
"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle.in_memory import compare
from tests.runners import audio, tokens

configurators = pytest.importorskip("ltx_core.model.audio_vae.model_configurator")
networks = pytest.importorskip("ltx_core.model.audio_vae.audio_vae")
patchifiers = pytest.importorskip("ltx_core.components.patchifiers")
types = pytest.importorskip("ltx_core.types")

SEEDS = pytest.mark.parametrize("seed", range(6))


def randomised(network: nn.Module, gain: float = 0.7) -> Any:
    """Weights that keep the size of activations, or amplify every rounding with a larger ``gain``.

    Filters depart from their formula: files decide.
    """
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape)
        if name.endswith("filter"):
            tensor.mul_(1 + 0.05 * noise)
        elif name.endswith(("std-of-means", "mel_basis")):
            tensor.copy_(noise.abs() * 0.2 + 0.5)
        else:
            tensor.copy_(noise * (gain / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.2))
    return network.eval()


def vae(pick: random.Random, half: str) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """Metadata of a tiny audio VAE, one half of it, and that half's weights by their keys in a checkpoint."""
    levels, bins, channels = pick.choice([1, 2, 3, 4]), pick.choice([2, 3, 4]), pick.choice([1, 2, 3])
    ddconfig = {
        "ch": channels * bins,
        "ch_mult": [pick.choice([1, 2, 3]) for _ in range(levels)],
        "num_res_blocks": pick.choice([1, 2]),
        "z_channels": channels,
        "mel_bins": bins * 2 ** (levels - 1),
        "attn_resolutions": [],
        "mid_block_add_attention": False,
    }
    config = {"audio_vae": {"model": {"params": {"ddconfig": ddconfig}}}}
    network = randomised(getattr(configurators, f"Audio{half.title()}Configurator").from_config(config))
    weights = {
        f"weights/audio_vae.{'' if key.startswith('per_channel') else f'{half}.'}{key}": tensor
        for key, tensor in network.state_dict().items()
    }
    return config, network, weights


def generator(pick: random.Random, kind: str, rates: list[int]) -> dict[str, Any]:
    kernels = pick.sample([3, 5, 7, 11], pick.choice([1, 2, 3]))
    return {
        "resblock": kind,
        "stereo": True,
        "upsample_initial_channel": pick.choice([8, 17, 24]),
        "upsample_rates": rates,
        "upsample_kernel_sizes": [rate + pick.choice([0, 2, 4, 6]) for rate in rates],
        "resblock_kernel_sizes": kernels,
        "resblock_dilation_sizes": [pick.choice([[1, 3, 5], [2, 1, 4]]) for _ in kernels],
        "use_bias_at_final": pick.random() < 0.5,
        "use_tanh_at_final": pick.random() < 0.5,
    }


def with_extension(pick: random.Random) -> dict[str, Any]:
    """Metadata of a vocoder with bandwidth extension; its hop need not divide what the first stage gives."""
    ratio, hop = pick.choice([2, 3]), pick.choice([6, 8])
    snake = {"activation": "snakebeta"}
    first = generator(pick, "AMP1", pick.choice([[5], [3, 2], [5, 2]])) | snake
    second = generator(pick, "AMP1", [hop, ratio]) | snake
    second |= {"n_fft": 16, "hop_length": hop, "num_mels": 64}
    second |= {"input_sampling_rate": 16000, "output_sampling_rate": 16000 * ratio}
    return {"vocoder": {"vocoder": first, "bwe": second}}


def vocoder(config: dict[str, Any], gain: float = 0.7) -> tuple[Any, dict[str, Tensor]]:
    network = randomised(configurators.VocoderConfigurator.from_config(config), gain)
    return network, {f"weights/vocoder.{key}": tensor for key, tensor in network.state_dict().items()}


@SEEDS
@torch.inference_mode()
def test_encoder(seed: int) -> None:
    pick = random.Random(torch.manual_seed(seed).initial_seed())
    config, network, tensors = vae(pick, "encoder")
    mel = torch.randn(pick.choice([1, 2]), 2, pick.choice([1, 2, 9, 22]), network.mel_bins)
    compare(audio.encoder, {"config": config}, tensors | {"in/mel": mel, "out/latent": network(mel)}, 1e-5)


@SEEDS
@torch.inference_mode()
def test_decoder(seed: int) -> None:
    pick = random.Random(torch.manual_seed(seed).initial_seed())
    config, network, tensors = vae(pick, "decoder")
    bins = network.ch // network.z_channels
    for suffix, frames in (("", pick.choice([2, 5])), ("_t1", 1)):
        latent = torch.randn(pick.choice([1, 2]), network.z_channels, frames, bins)
        tensors |= {f"in/latent{suffix}": latent, f"out/mel{suffix}": network(latent)}
    compare(audio.decoder, {"config": config}, tensors, 1e-5)


@SEEDS
@torch.inference_mode()
def test_vocoder(seed: int) -> None:
    pick = random.Random(torch.manual_seed(seed).initial_seed())
    config = {"vocoder": generator(pick, "1", pick.choice([[2], [5, 2], [3, 1, 4]]))}
    network, tensors = vocoder(config)
    mel = torch.randn(pick.choice([1, 2]), 2, pick.choice([1, 5]), 64)
    compare(audio.vocoder, {"config": config}, tensors | {"in/mel": mel, "out/waveform": network(mel)}, 1e-5)


@SEEDS
@pytest.mark.parametrize("gain", [0.7, 1.5])
@torch.inference_mode()
def test_vocoder_with_bandwidth_extension(seed: int, gain: float) -> None:
    pick = random.Random(torch.manual_seed(seed).initial_seed())
    config = with_extension(pick)
    network, tensors = vocoder(config, gain)
    mel = torch.randn(pick.choice([1, 2]), 2, pick.choice([1, 5]), 64)
    compare(
        audio.vocoder_bwe, {"config": config}, tensors | {"in/mel": mel, "out/waveform": network(mel)}, 1e-4
    )


@SEEDS
@torch.inference_mode()
def test_tokens_and_their_times(seed: int) -> None:
    pick = random.Random(torch.manual_seed(seed).initial_seed())
    batch, channels, frames, bins = (pick.choice(sizes) for sizes in ([1, 2], [1, 8], [1, 7], [4, 16]))
    scales = {
        "sample_rate": pick.choice([16000, 24000]),
        "hop_length": pick.choice([160, 256]),
        "audio_latent_downsample_factor": pick.choice([4, 8]),
    }
    shape = types.AudioLatentShape(batch=batch, channels=channels, frames=frames, mel_bins=bins)
    patchifier = patchifiers.AudioPatchifier(1, **scales)
    statistics = randomised(networks.PerChannelStatistics(channels * bins))
    latent = torch.randn(batch, channels, frames, bins)
    folded = patchifier.patchify(latent)
    tensors = {f"weights/per_channel_statistics.{k}": v for k, v in statistics.state_dict().items()}
    tensors |= {"in/latent": latent, "out/tokens": folded, "out/unpatchified": latent}
    tensors["out/normalized"] = patchifier.unpatchify(statistics.normalize(folded), shape)
    tensors["out/denormalized"] = patchifier.unpatchify(statistics.un_normalize(folded), shape)
    for suffix, options in (("", {}), ("_shift3", {"shift": 3}), ("_noncausal", {"is_causal": False})):
        timed = patchifiers.AudioPatchifier(1, **scales, **options)
        tensors[f"out/bounds_seconds{suffix}"] = timed.get_patch_grid_bounds(shape)
    compare(tokens.audio_patchifier, {"config": scales}, tensors, 1e-6)
