"""The closed forms of costs against the networks themselves, run without data."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.gemma3_vision import Gemma3Vision, Gemma3VisionConfig
from diffsynth.models.gemma3_writer import Continuation, table_chunks
from diffsynth.models.ltx2.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from diffsynth.models.ltx2.connectors import TextConnectors, TextConnectorsConfig
from diffsynth.models.ltx2.feature_extractor import FeatureExtractor, PromptFeatures
from diffsynth.models.ltx2.transformer import LTX2Transformer, Modality, Pass, TransformerConfig
from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig
from diffsynth.models.ltx2.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from diffsynth.models.ltx2.vocoder import Vocoder, VocoderConfig
from diffsynth.models.ltx2.vocoder_bwe import VocoderBWE, VocoderBWEConfig
from diffsynth.pipelines.costs.audio import audio_decoder_cost, audio_encoder_cost, vocoder_cost
from diffsynth.pipelines.costs.cost import Cost
from diffsynth.pipelines.costs.text import (
    connectors_cost,
    enhance_cost,
    feature_widths,
    gemma_cost,
    picture_cost,
)
from diffsynth.pipelines.costs.transformer import STATE_COPIES, DenoiseSizes, denoise_cost, free_chunk
from diffsynth.pipelines.costs.video import decoder_cost, encoder_cost, upsampler_cost
from diffsynth.pipelines.released import GEMMA, released_config
from diffsynth.vram.dry_run import peak_bytes, without_data
from tests.models.ltx2.tiny import tiny_config

BF16 = torch.bfloat16
MODELS = ("ltx-2", "ltx-2.3")


def test_a_picture_that_the_text_model_looks_at_to_the_byte() -> None:
    config = Gemma3VisionConfig.from_dict(released_config(GEMMA))
    vision = network(Gemma3Vision, replace(config, num_layers=2))
    assert picture_cost(config, 2).nbytes == peak_bytes(vision, empty(1, 3, 896, 896))
    attention = 27 * 4 * 4096**2 * 1152
    assert picture_cost(config, 2).flops == pytest.approx(2 * 4096 * 417e6 + attention, rel=0.02)


@pytest.mark.parametrize("tokens", [300, 900])
def test_writing_at_real_widths(tokens: int) -> None:
    config = Gemma3Config.from_dict(released_config(GEMMA))
    few = replace(config, layer_kinds=config.layer_kinds[4:6], vocab_size=64)
    model = network(Gemma3TextModel, few)
    assert isinstance(model, Gemma3TextModel)

    def start(given: Tensor) -> Tensor:
        how = {"device": torch.device("cpu"), "dtype": BF16}
        return Continuation(model, given, tokens + 512, **how).logits(lambda: table_chunks(model))

    peak = peak_bytes(start, empty(1, tokens, few.hidden_size))
    given = tokens * few.hidden_size * 2  # stays alive here only
    assert peak - given <= enhance_cost(few, tokens, 512, False, 2).nbytes <= 1.02 * peak


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def network(make: Callable[[Any], nn.Module], config: Any, dtype: torch.dtype = BF16) -> nn.Module:
    with torch.device("meta"):
        module = make(config)
    return without_data(module, dtype)


def transformer_peak(config: TransformerConfig, sizes: DenoiseSizes, dtype: torch.dtype) -> int:
    """Of one step, with the inputs of its passes but without the sampler's other copies."""
    module = network(LTX2Transformer, config, dtype)
    assert isinstance(module, LTX2Transformer)
    streams = [(sizes.video, config.in_channels, 3), (sizes.audio, config.audio_in_channels, 1)]
    widths = [config.caption_channels] * 2
    if config.caption_proj_before_connector:
        widths = [config.cross_attention_dim, config.audio_cross_attention_dim]
    latents = [empty(1, tokens, channels, dtype=torch.float32) for tokens, channels, _ in streams]
    positions = [empty(1, axes, tokens, 2, dtype=torch.float32) for tokens, _, axes in streams]
    weights = [empty(1, sizes.video, sizes.video, dtype=torch.float32)] if sizes.weighted else []
    prompts = [[empty(1, sizes.text, width, dtype=dtype) for width in widths] for _ in range(sizes.prompts)]

    def step(
        latents: list[Tensor], positions: list[Tensor], prompts: list[list[Tensor]], weights: list[Tensor]
    ) -> Any:
        sigma = torch.zeros(1)
        given = [
            Modality(
                latent=latent.to(dtype),
                sigma=sigma,
                timesteps=sigma[:, None, None].expand(1, latent.shape[1], 1),
                positions=place,
                context=context,
                attention_mask=weight,
            )
            for latent, place, context, weight in zip(
                latents, positions, prompts[0], (*weights, None, None), strict=False
            )
        ]
        passes = []
        for number in range(sizes.passes):
            contexts = prompts[min(number, sizes.contexts - 1)]
            video, audio = (replace(g, context=c) for g, c in zip(given, contexts, strict=True))
            passes.append(Pass(video=video, audio=audio))
        return module.forward_passes(passes, chunk_tokens=sizes.chunk_tokens)

    return peak_bytes(step, latents, positions, prompts, weights)


def predicted(config: TransformerConfig, sizes: DenoiseSizes) -> int:
    channels = sizes.video * config.in_channels + sizes.audio * config.audio_in_channels
    return denoise_cost(config, sizes).nbytes - (STATE_COPIES - 1) * 4 * channels


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("ltx-2", DenoiseSizes(video=6144, audio=126, text=1024, chunk_tokens=None)),
        ("ltx-2.3", DenoiseSizes(video=1536, audio=126, text=1024, chunk_tokens=512)),
        ("ltx-2.3", DenoiseSizes(video=24576, audio=126, text=1024, passes=2, contexts=2, prompts=2)),
    ],
    ids=("whole", "in-pieces", "two-passes"),
)
def test_a_denoising_step_at_real_widths(model: str, sizes: DenoiseSizes) -> None:
    config = replace(TransformerConfig.from_sections(released_config(model)), num_layers=1)
    peak = transformer_peak(config, sizes, BF16)
    assert peak <= predicted(config, sizes) <= 1.01 * peak


@pytest.mark.parametrize(("model", "passes"), [("ltx-2", 1), ("ltx-2", 3), ("ltx-2.3", 2)])
def test_a_denoising_step_at_tiny_widths(model: str, passes: int) -> None:
    config = tiny_config(model, num_layers=1)
    prompts = min(passes, 2)
    sizes = DenoiseSizes(
        video=384, audio=26, text=128, passes=passes, contexts=prompts, prompts=prompts, itemsize=4
    )
    peak = transformer_peak(config, sizes, torch.float32)
    # Attention counts its sums of exponentials, which the run without data does not show.
    assert peak <= predicted(config, sizes) <= 1.05 * peak


def test_weights_between_tokens_are_counted() -> None:
    config = tiny_config("ltx-2", num_layers=1)
    for dtype, tokens in ((torch.float32, 384), (BF16, 384), (BF16, 1536)):
        sizes = DenoiseSizes(
            video=tokens, audio=26, text=128, itemsize=dtype.itemsize, weighted=True, chunk_tokens=256
        )
        peak = transformer_peak(config, sizes, dtype)
        assert peak <= predicted(config, sizes) <= 1.1 * peak


def test_the_free_chunk_costs_no_memory_and_a_larger_one_does() -> None:
    config = TransformerConfig.from_sections(released_config("ltx-2.3"))
    sizes = DenoiseSizes(video=6144, audio=126, text=1024)
    chunk = free_chunk(6144)
    assert chunk == 2304
    free = denoise_cost(config, replace(sizes, chunk_tokens=chunk)).nbytes
    assert denoise_cost(config, replace(sizes, chunk_tokens=256)).nbytes == free
    assert denoise_cost(config, replace(sizes, chunk_tokens=chunk + 256)).nbytes > free
    peaks = [
        denoise_cost(config, replace(sizes, video=tokens, chunk_tokens=free_chunk(tokens))).nbytes
        for tokens in range(64, 2000, 16)
    ]
    assert peaks == sorted(peaks)
    assert [free_chunk(tokens) for tokens in (256, 257, 682, 1400)] == [None, 256, 256, 512]


@pytest.mark.parametrize(
    ("tokens", "tflops"), [(1536, 47.9), (6144, 198.7), (24576, 1135.6), (27280, 1321.7), (32640, 1713.6)]
)
def test_operations_of_a_pass_are_the_published_ones(tokens: int, tflops: float) -> None:
    config = TransformerConfig.from_sections(released_config("ltx-2"))
    one = denoise_cost(config, DenoiseSizes(video=tokens, audio=126, text=1024))
    assert one.flops / 1e12 == pytest.approx(tflops, rel=0.01)
    two = denoise_cost(config, DenoiseSizes(video=tokens, audio=126, text=1024, passes=2))
    assert two.flops == 2 * one.flops


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pixels", [(25, 64, 64), (33, 320, 512)])
def test_the_video_vae_to_the_byte(model: str, pixels: tuple[int, int, int]) -> None:
    config = VideoVAEConfig.from_sections(released_config(model))
    frames, height, width = pixels
    latent = ((frames - 1) // 8 + 1, height // 32, width // 32)
    decoder, encoder = network(VideoDecoder, config), network(VideoEncoder, config)
    assert decoder_cost(config, latent, 2).nbytes == peak_bytes(decoder, empty(1, 128, *latent))
    assert encoder_cost(config, pixels, 2).nbytes == peak_bytes(encoder, empty(1, 3, *pixels))


@pytest.mark.parametrize("model", MODELS)
def test_a_picture_is_not_underestimated(model: str) -> None:
    config = VideoVAEConfig.from_sections(released_config(model))
    peak = peak_bytes(network(VideoEncoder, config), empty(1, 3, 1, 256, 384))
    assert encoder_cost(config, (1, 256, 384), 2).nbytes == peak
    peak = peak_bytes(network(VideoDecoder, config), empty(1, 128, 1, 8, 12))
    assert peak <= decoder_cost(config, (1, 8, 12), 2).nbytes <= 1.2 * peak


def test_convolutions_of_the_video_decoder_are_counted() -> None:
    config = VideoVAEConfig.from_sections(released_config("ltx-2.3"))
    counted = 0.0

    def count(layer: nn.Module, _: Any, result: Tensor) -> None:
        nonlocal counted
        assert isinstance(layer, nn.Conv3d)
        counted += 2.0 * result.numel() * layer.in_channels * prod(layer.kernel_size)

    decoder = network(VideoDecoder, config)
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv3d):
            layer.register_forward_hook(count)
    peak_bytes(decoder, empty(1, 128, 4, 4, 6))
    assert decoder_cost(config, (4, 4, 6), 2).flops == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("name", ["ltx-2-spatial-upscaler-x2", "ltx-2.3-spatial-upscaler-x1.5"])
def test_the_upsampler(name: str) -> None:
    config = UpsamplerConfig.from_sections(released_config(name))
    peak = peak_bytes(network(LatentUpsampler, config), empty(1, 128, 16, 16, 24))
    assert peak <= upsampler_cost(config, (16, 16, 24), 2).nbytes <= 1.02 * peak


@pytest.mark.parametrize(("model", "tokens", "prompts"), [("ltx-2", 64, 1), ("ltx-2.3", 1024, 2)])
def test_the_text_path(model: str, tokens: int, prompts: int) -> None:
    gemma = Gemma3Config.from_dict(released_config(GEMMA))
    gemma = replace(gemma, layer_kinds=("sliding_attention", "full_attention"))
    config = TextConnectorsConfig.from_sections(released_config(model))
    features = replace(config.features, num_states=3)
    text, connectors = network(Gemma3TextModel, gemma), network(TextConnectors, config)
    extractor = network(FeatureExtractor, features)
    assert isinstance(text, Gemma3TextModel)
    assert isinstance(extractor, FeatureExtractor)
    slices = [empty(width, gemma.hidden_size) for width in feature_widths(features)]

    def encode(*given: Tensor) -> Any:
        ids, stored = list(given[:prompts]), list(given[prompts:])
        sums = extractor.begin(prompts, slices=lambda _: stored)
        text.hidden_states(ids, sums.add, length=1024, dtype=BF16)
        return sums.finish()

    ids = [empty(tokens, dtype=torch.int64) for _ in range(prompts)]
    peak = peak_bytes(encode, *ids, *slices) - sum(each.nbytes for each in slices)
    assert gemma_cost(gemma, features, [tokens] * prompts, 1024, 2).nbytes == pytest.approx(peak, rel=0.1)

    def connect(*given: Tensor) -> Any:
        pairs = zip(given[::2], given[1::2], strict=True)
        return connectors([PromptFeatures(v, a if features.separate else v) for v, a in pairs], 1024)

    widths = (features.video_width, features.audio_width if features.separate else 1)
    peak = peak_bytes(connect, *(empty(tokens, width) for _ in range(prompts) for width in widths))
    assert connectors_cost(config, [tokens] * prompts, 1024, 2).nbytes == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_sound(model: str) -> None:
    sections = released_config(model)
    vae = AudioVAEConfig.from_sections(sections)
    found: list[tuple[Cost, int, float]] = [
        (
            audio_decoder_cost(vae, 126, 2),
            peak_bytes(network(AudioDecoder, vae), empty(1, 8, 126, 16)),
            1.0,
        ),
        (
            audio_encoder_cost(vae, 126, 2),
            peak_bytes(network(AudioEncoder, vae), empty(1, 2, 504, 64)),
            1.0,
        ),
    ]
    mel = empty(1, 2, 504, 64, dtype=torch.float32)
    if model == "ltx-2":
        plain = VocoderConfig.from_sections(sections)
        found.append((vocoder_cost(plain, 504), peak_bytes(network(Vocoder, plain), mel), 1.05))
    else:
        extended = VocoderBWEConfig.from_sections(sections)
        found.append((vocoder_cost(extended, 504), peak_bytes(network(VocoderBWE, extended), mel), 1.05))
    for cost, peak, slack in found:
        assert peak <= cost.nbytes <= slack * peak
        assert cost.flops > 0
