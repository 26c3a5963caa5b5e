import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.mel import resample
from diffsynth.models.ltx2.vocoder import GeneratorConfig, Vocoder, VocoderConfig, decode_audio
from diffsynth.models.ltx2.vocoder_bwe import (
    SnakeBeta,
    VocoderBWE,
    VocoderBWEConfig,
    hann_upsample,
    kaiser_sinc_filter,
    vocoder_class,
)

MANIFEST = Path(__file__).parents[2] / "manifest"
KINDS: list[tuple[str, type[Vocoder] | type[VocoderBWE]]] = [
    ("ltx-2-19b", Vocoder),
    ("ltx-2.3-22b", VocoderBWE),
]
ONE = {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3, 5),)}
TINY = VocoderConfig(
    upsample_initial_channel=8,
    upsample_rates=(5, 2),
    upsample_kernel_sizes=(15, 4),
    **ONE,  # type: ignore[arg-type]
)
TINY_FIRST = GeneratorConfig(
    upsample_initial_channel=8,
    upsample_rates=(5, 2),
    upsample_kernel_sizes=(11, 4),
    use_tanh_at_final=False,
    use_bias_at_final=False,
    **ONE,  # type: ignore[arg-type]
)
TINY_BWE = VocoderBWEConfig(
    vocoder=TINY_FIRST,
    bwe=replace(TINY_FIRST, upsample_rates=(6, 2), upsample_kernel_sizes=(12, 4)),
    n_fft=16,
    hop_length=4,
)


def sections(name: str) -> dict[str, Any]:
    return json.loads((MANIFEST / f"config.{name}.vocoder.json").read_text(encoding="utf-8"))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    manifest = json.loads((MANIFEST / f"{name}.vocoder.json").read_text(encoding="utf-8"))
    return {key: tuple(shape) for key, (_, shape) in manifest.items()}


def randomised(net: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not name.endswith("filter"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.6 - 0.3)
    return net.eval()


def tiny() -> Any:
    return randomised(Vocoder(TINY))


def tiny_bwe() -> Any:
    return randomised(VocoderBWE(TINY_BWE))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_keys_and_shapes_of_the_released_files(name: str, kind: Any) -> None:
    with torch.device("meta"):
        net = kind(kind.config_class.from_sections(sections(name)))
    found = {"vocoder." + key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    assert dict(kind.KEY_PREFIXES) == {"vocoder.": ""}
    assert found == shapes(name)


@pytest.mark.parametrize("make", [tiny, tiny_bwe])
def test_loading_leaves_nothing_on_the_meta_device(make: Callable[[], Any]) -> None:
    loaded = make()
    with torch.device("meta"):
        net = type(loaded)(loaded.config)
    net.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    assert all(t.device.type == "cpu" for t in (*net.parameters(), *net.buffers()))
    mel = noise(1, 2, 3, 64)
    with torch.inference_mode():
        assert torch.equal(net(mel), loaded(mel))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_infer_by_file_and_module_keys(name: str, kind: Any) -> None:
    expected = kind.config_class.from_sections(sections(name))
    assert kind.config_class.infer(shapes(name)) == expected
    module_keys = {key.removeprefix("vocoder."): shape for key, shape in shapes(name).items()}
    assert kind.config_class.infer(module_keys) == expected


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_infer_refuses_the_other_vocoder(name: str, kind: Any) -> None:
    other = next(other for _, other in KINDS if other is not kind)
    with pytest.raises(CheckpointError, match="not those of a vocoder"):
        other.config_class.infer(shapes(name))


def test_infer_refuses_rates_that_it_cannot_know() -> None:
    tensors = {**shapes("ltx-2-19b"), "vocoder.ups.1.weight": (512, 256, 13)}
    with pytest.raises(CheckpointError, match="never"):
        VocoderConfig.infer(tensors)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_which_vocoder(name: str, kind: Any) -> None:
    assert vocoder_class(sections(name)) is kind
    assert vocoder_class(keys=shapes(name)) is kind
    assert vocoder_class({"vae": {}}, shapes(name)) is kind


def test_no_vocoder() -> None:
    with pytest.raises(CheckpointError, match="no vocoder"):
        vocoder_class({"vae": {}}, ["vae.encoder.conv_in.weight"])
    for config in (VocoderConfig, VocoderBWEConfig):
        with pytest.raises(CheckpointError, match="no section"):
            config.from_sections({})


def test_output_rates() -> None:
    with torch.device("meta"):
        assert Vocoder(VocoderConfig.from_sections(sections("ltx-2-19b"))).output_sampling_rate == 24000
        two_stage = VocoderBWE(VocoderBWEConfig.from_sections(sections("ltx-2.3-22b")))
    assert two_stage.output_sampling_rate == 48000


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("ltx-2-19b", (), {"new_behaviour": 1}),
        ("ltx-2-19b", (), {"resblock": "2"}),
        ("ltx-2-19b", (), {"stereo": False}),
        ("ltx-2-19b", (), {"upsample_rates": [6, 5]}),
        ("ltx-2.3-22b", (), {"third": {}}),
        ("ltx-2.3-22b", ("vocoder",), {"new_behaviour": 1}),
        ("ltx-2.3-22b", ("bwe",), {"new_behaviour": 1}),
        ("ltx-2.3-22b", ("bwe",), {"activation": "snake"}),
        ("ltx-2.3-22b", ("vocoder",), {"resblock": "AMP2"}),
        ("ltx-2.3-22b", ("bwe",), {"output_sampling_rate": 44100}),
        ("ltx-2.3-22b", ("bwe",), {"hop_length": 160}),
        ("ltx-2.3-22b", ("bwe",), {"num_mels": 80}),
    ],
)
def test_unknown_metadata_is_refused(name: str, path: tuple[str, ...], value: dict[str, Any]) -> None:
    config = sections(name)
    section = config["vocoder"]
    for key in path:
        section = section[key]
    section.update(value)
    kind = vocoder_class(config)
    with pytest.raises(CheckpointError):
        kind.config_class.from_sections(config)


@pytest.mark.parametrize("part", ["vocoder", "bwe"])
def test_absent_sizes_of_a_generator_are_those_of_the_format(part: str) -> None:
    config = sections("ltx-2.3-22b")
    del config["vocoder"][part]["resblock_kernel_sizes"]
    del config["vocoder"][part]["resblock_dilation_sizes"]
    assert VocoderBWEConfig.from_sections(config) == VocoderBWEConfig.from_sections(sections("ltx-2.3-22b"))


def test_each_parser_refuses_the_other_section() -> None:
    with pytest.raises(CheckpointError, match="bwe"):
        VocoderConfig.from_sections(sections("ltx-2.3-22b"))
    with pytest.raises(CheckpointError, match="expected the two parts"):
        VocoderBWEConfig.from_sections(sections("ltx-2-19b"))


@torch.inference_mode()
def test_lengths_and_range() -> None:
    mel = 20 * noise(2, 2, 7, 64)
    sound = tiny()(mel)
    assert sound.shape == (2, 2, 70) and sound.abs().max() <= 1
    wide = tiny_bwe()(mel)
    # 70 samples are no multiple of the hop 4: the padding must not show in the length.
    assert wide.shape == (2, 2, 210) and wide.abs().max() <= 1


@torch.inference_mode()
def test_stereo_channels_come_left_then_right() -> None:
    net, mel = tiny(), noise(1, 2, 3, 64)
    taken: list[Tensor] = []
    net.conv_pre.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    net(mel)
    assert torch.equal(taken[0][0, :64], mel[0, 0].T) and torch.equal(taken[0][0, 64:], mel[0, 1].T)


@pytest.mark.parametrize("make", [tiny, tiny_bwe])
@torch.inference_mode()
def test_bfloat16_storage_computes_in_float32(make: Callable[[], Any]) -> None:
    stored = make().bfloat16()
    exact = make()
    exact.load_state_dict({key: tensor.float() for key, tensor in stored.state_dict().items()})
    mel = noise(1, 2, 5, 64).bfloat16()
    sound = stored(mel.float())
    assert torch.equal(sound, exact(mel.float())) and sound.dtype == torch.float32
    assert torch.equal(stored(mel), sound.bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.state_dict().values())


@torch.inference_mode()
def test_stored_tables_are_used() -> None:
    mel = noise(1, 2, 5, 64)
    before = tiny_bwe()(mel)
    for name in (
        "vocoder.resblocks.0.acts1.0.upsample.filter",
        "bwe_generator.act_post.downsample.lowpass.filter",
        "mel_stft.mel_basis",
        "mel_stft.stft_fn.forward_basis",
    ):
        net = tiny_bwe()
        net.get_buffer(name).mul_(1.5)
        assert not torch.allclose(net(mel), before, atol=1e-4), name
    net = tiny_bwe()
    net.get_buffer("mel_stft.stft_fn.inverse_basis").mul_(1.5)
    assert torch.equal(net(mel), before)


def test_kaiser_filter() -> None:
    kernel = kaiser_sinc_filter(2, 12).flatten()
    rounded = torch.tensor([0.0020, 0.0094, -0.0255, -0.0577, 0.1286, 0.4432])
    torch.testing.assert_close(kernel, torch.cat([rounded, rounded.flip(0)]), atol=5e-5, rtol=0)
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_every_activation_has_a_filter_of_its_own() -> None:
    filters = [buffer for name, buffer in VocoderBWE(TINY_BWE).named_buffers() if name.endswith(".filter")]
    assert all(torch.equal(each, kaiser_sinc_filter(2, 12)) for each in filters)
    assert len({each.data_ptr() for each in filters}) == len(filters) > 4


@pytest.mark.parametrize("ratio", [2, 3])
def test_hann_upsampling_is_the_resampler_away_from_the_ends(ratio: int) -> None:
    x = noise(1, 2, 200)
    wide = hann_upsample(x, ratio)
    assert wide.shape == (1, 2, 200 * ratio)
    inner = slice(10 * ratio, -10 * ratio)
    expected = resample(x, 16000, 16000 * ratio)
    torch.testing.assert_close(wide[..., inner], expected[..., inner], atol=2e-6, rtol=0)
    constant = hann_upsample(torch.ones(1, 1, 9), ratio)
    torch.testing.assert_close(constant, torch.ones_like(constant), atol=5e-3, rtol=0)


@torch.inference_mode()
def test_snake_rounds_as_the_original() -> None:
    snake = SnakeBeta(3)
    snake.load_state_dict({"alpha": noise(3), "beta": noise(3)})
    x, a, b = 30 * noise(2, 3, 50), snake.alpha.exp()[:, None], snake.beta.exp()[:, None]
    assert torch.equal(snake(x), x + (1 / (b + 1e-9)) * torch.sin(x * a) ** 2)


@torch.inference_mode()
def test_anti_aliasing_keeps_a_slow_wave() -> None:
    block = tiny_bwe().vocoder.act_post
    x = torch.sin(torch.arange(200) * 0.05 * math.pi).expand(1, 2, -1)
    wide = block.upsample(x)
    assert wide.shape == (1, 2, 400)
    narrow = block.downsample(wide)
    torch.testing.assert_close(narrow[..., 10:-10], x[..., 10:-10], atol=2e-2, rtol=0)


@torch.inference_mode()
def test_decode_audio_gives_float32_without_batch() -> None:
    def decoder(latent: Tensor) -> Tensor:
        return latent.expand(-1, 2, -1, -1)

    latent = noise(1, 1, 5, 64).bfloat16()
    sound = decode_audio(decoder, tiny(), latent)
    assert sound.shape == (2, 50) and sound.dtype == torch.float32
    assert not torch.equal(sound, sound.bfloat16().float())
    with pytest.raises(RequestError, match="2 generations"):
        decode_audio(decoder, tiny(), latent.expand(2, -1, -1, -1))


@pytest.mark.parametrize("make", [tiny, tiny_bwe])
@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 1, 5, 64), (1, 2, 5, 63)])
def test_other_shapes_are_refused(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="frames, 64"):
        make()(torch.zeros(shape))
