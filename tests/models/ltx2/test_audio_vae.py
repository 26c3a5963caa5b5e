import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from diffsynth.models.ltx2.mel import MelConfig

MANIFEST = Path(__file__).parents[2] / "manifest"
LENGTHS = json.loads((Path(__file__).parents[2] / "golden/audio/lengths.json").read_text(encoding="utf-8"))
RELEASED = ["ltx-2-19b", "ltx-2.3-22b"]
TINY = AudioVAEConfig(ch=8, z_channels=2, num_res_blocks=1, mel=MelConfig(mel_bins=16))

Net = AudioEncoder | AudioDecoder


def sections(name: str) -> dict[str, Any]:
    return json.loads((MANIFEST / f"config.{name}.audio_vae.json").read_text(encoding="utf-8"))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    manifest = json.loads((MANIFEST / f"{name}.audio_vae.json").read_text(encoding="utf-8"))
    return {key: tuple(shape) for key, (_, shape) in manifest.items()}


def below(prefixes: Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        new + key.removeprefix(old): value
        for key, value in tensors.items()
        for old, new in prefixes.items()
        if key.startswith(old)
    }


def randomise(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        net.get_submodule("per_channel_statistics").get_buffer("std-of-means").abs_().add_(1.0)


def tiny(kind: type[Net], config: AudioVAEConfig = TINY) -> Any:
    net = kind(config)
    randomise(net)
    return net.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("kind", [AudioEncoder, AudioDecoder])
def test_keys_and_shapes_of_the_released_files(name: str, kind: type[Net]) -> None:
    with torch.device("meta"):
        net = kind(AudioVAEConfig.from_sections(sections(name)))
    found = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    assert found == below(kind.KEY_PREFIXES, shapes(name))


@pytest.mark.parametrize("kind", [AudioEncoder, AudioDecoder])
def test_loading_leaves_nothing_on_the_meta_device(kind: type[Net]) -> None:
    state = {key: tensor.bfloat16() for key, tensor in tiny(kind).state_dict().items()}
    with torch.device("meta"):
        net = kind(TINY)
    net.load_state_dict(state, strict=True, assign=True)
    assert all(t.device.type == "cpu" for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("halves", [("encoder", "decoder"), ("encoder",), ("decoder",)])
def test_infer_from_whole_and_half_files(name: str, halves: tuple[str, ...]) -> None:
    kept = tuple(f"audio_vae.{part}." for part in (*halves, "per_channel_statistics"))
    tensors = {key: shape for key, shape in shapes(name).items() if key.startswith(kept)}
    assert AudioVAEConfig.infer(tensors) == AudioVAEConfig.from_sections(sections(name)) == AudioVAEConfig()


@pytest.mark.parametrize("kind", [AudioEncoder, AudioDecoder])
def test_infer_from_module_keys_of_another_size(kind: type[Net]) -> None:
    config = AudioVAEConfig(ch=12, ch_mult=(1, 3), num_res_blocks=2, z_channels=3, mel=MelConfig(mel_bins=8))
    assert AudioVAEConfig.infer({k: tuple(t.shape) for k, t in kind(config).state_dict().items()}) == config


@pytest.mark.parametrize("kind", [AudioEncoder, AudioDecoder])
def test_a_narrow_network_states_the_bins_of_its_latent(kind: type[Net]) -> None:
    ddconfig = {"ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3, "mel_bins": 8}
    config = AudioVAEConfig.from_sections(
        {"audio_vae": {"model": {"params": {"ddconfig": {**ddconfig, "latent_bins": 4}}}}}
    )
    state = {key: tuple(t.shape) for key, t in kind(config).state_dict().items()}
    assert config.widths == (4, 8)
    assert state["per_channel_statistics.mean-of-means"] == (12,)
    assert AudioVAEConfig.infer(state) == config
    with pytest.raises(CheckpointError, match="latent_bins"):
        AudioVAEConfig(ch=4, z_channels=3)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"vocoder.conv_pre.weight": (8, 128, 7)}, {"audio_vae.encoder.conv_in.conv.weight": (8, 2, 3, 3)}],
)
def test_infer_refuses_other_files(tensors: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CheckpointError, match="not those of an audio VAE"):
        AudioVAEConfig.infer(tensors)


def test_attention_is_refused_plainly() -> None:
    for key, value in (("mid_block_add_attention", True), ("attn_resolutions", [128])):
        config = sections("ltx-2-19b")
        config["audio_vae"]["model"]["params"]["ddconfig"][key] = value
        with pytest.raises(CheckpointError, match=f"attention.*{key}"):
            AudioVAEConfig.from_sections(config)
    tensors = {**shapes("ltx-2-19b"), "audio_vae.decoder.mid.attn_1.q.weight": (512, 512, 1, 1)}
    with pytest.raises(CheckpointError, match="attention"):
        AudioVAEConfig.infer(tensors)


def test_absent_keys_mean_the_released_architecture() -> None:
    params = {"ddconfig": {"ch": 128, "mel_bins": 64}}
    assert AudioVAEConfig.from_sections({"audio_vae": {"model": {"params": params}}}) == AudioVAEConfig()
    resolutions = {"ddconfig": {"attn_resolutions": [8, 16]}}  # no level has these, so nothing is placed
    assert AudioVAEConfig.from_sections({"audio_vae": {"model": {"params": resolutions}}}) == AudioVAEConfig()


def test_mel_bins_have_three_places() -> None:
    section = {"model": {"params": {}}, "variables": {"mel_bins": 16}}
    assert AudioVAEConfig.from_sections({"audio_vae": section}).mel.mel_bins == 16
    section["preprocessing"] = {"mel": {"n_mel_channels": 32}}
    assert AudioVAEConfig.from_sections({"audio_vae": section}).mel.mel_bins == 32
    section["model"] = {"params": {"ddconfig": {"mel_bins": 48}, "sampling_rate": 8000}}
    section["preprocessing"] = {"stft": {"filter_length": 512, "hop_length": 80}}
    expected = MelConfig(sampling_rate=8000, n_fft=512, hop_length=80, mel_bins=48)
    assert AudioVAEConfig.from_sections({"audio_vae": section}).mel == expected


@pytest.mark.parametrize(
    "path",
    [
        ["audio_vae"],
        ["audio_vae", "model"],
        ["audio_vae", "model", "params"],
        ["audio_vae", "model", "params", "ddconfig"],
        ["audio_vae", "preprocessing"],
        ["audio_vae", "preprocessing", "audio"],
        ["audio_vae", "preprocessing", "mel"],
        ["audio_vae", "preprocessing", "stft"],
    ],
    ids=lambda path: path[-1],
)
def test_unknown_keys_are_errors(path: list[str]) -> None:
    config = copy.deepcopy(sections("ltx-2-19b"))
    section = config
    for name in path:
        section = section[name]
    section["new_behaviour"] = 1
    with pytest.raises(CheckpointError, match="new_behaviour"):
        AudioVAEConfig.from_sections(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "params", "ddconfig", "norm_type"), "group"),
        (("model", "params", "ddconfig", "causality_axis"), "width"),
        (("model", "params", "ddconfig", "z_channels"), 7),
        (("preprocessing", "stft", "causal"), False),
    ],
)
def test_other_architectures_are_refused(path: tuple[str, ...], value: object) -> None:
    config = sections("ltx-2-19b")
    section = config["audio_vae"]
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    with pytest.raises(CheckpointError, match=path[-1]):
        AudioVAEConfig.from_sections(config)


def test_metadata_without_the_section() -> None:
    with pytest.raises(CheckpointError, match="audio_vae"):
        AudioVAEConfig.from_sections({"vae": {}})


@torch.inference_mode()
def test_lengths() -> None:
    encoder, decoder = tiny(AudioEncoder), tiny(AudioDecoder)
    for row in LENGTHS["encoder_rows"]:
        if row["mel_frames"] < 1000:
            latent = encoder.encode(torch.zeros(1, 2, row["mel_frames"], 16))
            assert latent.shape == (1, 2, row["latent_length"], 4)
            assert decoder.decode(latent).shape == (1, 2, 4 * row["latent_length"] - 3, 16)


@torch.inference_mode()
def test_decoder_is_causal() -> None:
    decoder, latent = tiny(AudioDecoder), noise(1, 2, 6, 4)
    whole = decoder.decode(latent)
    for frames in range(1, 6):
        part = decoder.decode(latent[:, :, :frames])
        torch.testing.assert_close(part, whole[:, :, : 4 * frames - 3], atol=1e-5, rtol=1e-5)
    changed = decoder.decode(torch.cat([latent[:, :, :5], latent[:, :, 5:] + 1], dim=2))
    assert not torch.allclose(changed[:, :, 17:], whole[:, :, 17:], atol=1e-2)


@torch.inference_mode()
def test_encoder_is_causal() -> None:
    encoder, mel = tiny(AudioEncoder), noise(1, 2, 21, 16)
    whole = encoder.encode(mel)
    torch.testing.assert_close(encoder.encode(mel[:, :, :13]), whole[:, :, :4], atol=1e-5, rtol=1e-5)


def test_statistics_are_numbered_channel_major() -> None:
    statistics = tiny(AudioDecoder).per_channel_statistics
    mean, std = statistics.get_buffer("mean-of-means"), statistics.get_buffer("std-of-means")
    latent = noise(1, 2, 3, 4)
    value = statistics.denormalize(latent)
    torch.testing.assert_close(value[0, 1, 2, 3], latent[0, 1, 2, 3] * std[7] + mean[7])
    torch.testing.assert_close(statistics.normalize(value), latent)
    assert statistics.normalize(latent.bfloat16()).dtype == torch.bfloat16


@torch.inference_mode()
@pytest.mark.parametrize("bins", [14, 19])
def test_mel_is_cropped_or_padded_to_the_configured_bins(bins: int) -> None:
    latent = noise(1, 2, 3, 4)
    plain = tiny(AudioDecoder).decode(latent)
    other = AudioVAEConfig(ch=8, z_channels=2, num_res_blocks=1, mel=MelConfig(mel_bins=bins))
    mel = tiny(AudioDecoder, other).decode(latent)
    assert mel.shape == (1, 2, 9, bins)
    assert torch.equal(mel[..., :14], plain[..., :14])
    assert bool((mel[..., 16:] == 0).all())


@torch.inference_mode()
def test_bfloat16_runs() -> None:
    latent = noise(1, 2, 4, 4)
    expected = tiny(AudioDecoder).decode(latent)
    low = tiny(AudioDecoder).bfloat16().decode(latent.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("shape", [(2, 8, 16), (1, 1, 8, 16), (1, 2, 8, 15)])
def test_encoder_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="frames, 16"):
        tiny(AudioEncoder).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 8, 4), (1, 3, 8, 4), (1, 2, 8, 5), (1, 2, 0, 4)])
def test_decoder_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="frames, 4"):
        tiny(AudioDecoder).decode(torch.zeros(shape))
