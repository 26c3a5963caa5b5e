"""The video VAE: configuration, keys, shapes, and properties that the golden cases do not show."""

import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.video_vae import (
    IGNORED_KEYS,
    STATISTICS_KEY_PREFIXES,
    PerChannelStatistics,
    VideoDecoder,
    VideoEncoder,
    VideoVAEConfig,
    to_uint8,
)
from diffsynth.models.ltx2.video_vae_config import PaddingMode
from diffsynth.models.ltx2.video_vae_layers import TemporalPaddedConv3d
from tests.runners.video_vae import rename

MANIFEST = Path(__file__).parents[2] / "manifest"
MODELS = ("ltx-2-19b", "ltx-2.3-22b")
Shapes = dict[str, tuple[int, ...]]


def sections(model: str = "ltx-2-19b", **changes: Any) -> dict[str, Any]:
    text = (MANIFEST / f"config.{model}.vae.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    config["vae"] |= changes
    return config


def manifest(model: str) -> Shapes:
    text = (MANIFEST / f"{model}.video_vae.json").read_text(encoding="utf-8")
    return {key: tuple(shape) for key, (_, shape) in json.loads(text).items()}


def half(shapes: Shapes, name: str) -> Shapes:
    return {k: v for k, v in shapes.items() if k.startswith((f"vae.{name}.", "vae.per_channel_statistics."))}


def tiny_config(*, reflect: bool = False) -> VideoVAEConfig:
    decoder = [["compress_all", {"multiplier": 1, "residual": reflect}]] * 3
    return VideoVAEConfig.from_sections(
        sections(
            encoder_blocks=[["compress_all_res", {"multiplier": 1}]] * 3 + [["res_x", {"num_layers": 1}]],
            decoder_blocks=[["res_x", {"num_layers": 1}], *decoder],
            latent_channels=8,
            decoder_base_channels=1,
            spatial_padding_mode="reflect" if reflect else "zeros",
        )
    )


@pytest.mark.parametrize("model", MODELS)
def test_keys_and_shapes_are_those_of_the_released_files(model: str) -> None:
    config = VideoVAEConfig.from_sections(sections(model))
    shapes = manifest(model)
    accounted = set()
    for kind in (VideoEncoder, VideoDecoder):
        with torch.device("meta"):
            module = kind(config)
        expected = {
            inside + key.removeprefix(outside): shape
            for outside, inside in kind.KEY_PREFIXES.items()
            for key, shape in shapes.items()
            if key.startswith(outside)
        }
        accounted |= {key for key in shapes if key.startswith(tuple(kind.KEY_PREFIXES))}
        kept = {key: shape for key, shape in expected.items() if key not in IGNORED_KEYS}
        assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == kept
    assert accounted == shapes.keys()
    assert len(shapes) == {"ltx-2-19b": 187, "ltx-2.3-22b": 170}[model]


@pytest.mark.parametrize("model", MODELS)
def test_infer_equals_the_metadata(model: str) -> None:
    stated, shapes = VideoVAEConfig.from_sections(sections(model)), manifest(model)
    assert VideoVAEConfig.infer(shapes) == stated
    for prefix in ("vae.", ""):
        encoder = {prefix + k.removeprefix("vae."): v for k, v in half(shapes, "encoder").items()}
        decoder = {prefix + k.removeprefix("vae."): v for k, v in half(shapes, "decoder").items()}
        # A half file says nothing about the other half: its fields keep their defaults.
        assert VideoVAEConfig.infer(encoder) == replace(stated, decoder_blocks=(), decoder_padding="reflect")
        assert VideoVAEConfig.infer(decoder) == replace(stated, encoder_blocks=())


def test_infer_reads_the_keys_of_a_bare_module() -> None:
    config = tiny_config(reflect=True)
    shapes = {key: tuple(value.shape) for key, value in VideoDecoder(config).state_dict().items()}
    assert VideoVAEConfig.infer(shapes) == replace(config, encoder_blocks=(), encoder_padding="zeros")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"transformer.proj.weight": (4, 4)}, "no key of a video VAE"),
        ({"vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (8, 8, 3, 3, 3)}, "incomplete"),
        ({"vae.decoder.up_blocks.0.time_embedder.linear.weight": (8, 8)}, "timestep"),
    ],
)
def test_infer_refuses_other_files(keys: Shapes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        VideoVAEConfig.infer(keys)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "DiffusionVideoVAE"}, "_class_name"),
        ({"dims": 2}, "dims"),
        ({"norm_layer": "group_norm"}, "norm_layer"),
        ({"latent_log_var": "per_channel"}, "latent_log_var"),
        ({"timestep_conditioning": True}, "timestep"),
        ({"spatial_padding_mode": "circular"}, "circular"),
        ({"something_new": 1}, "something_new"),
        ({"decoder_blocks": [["attn_res_x", {"num_layers": 1}]]}, "attn_res_x"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, "noise"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "wide": 1}]]}, "wide"),
        ({"decoder_blocks": [["compress_all_res", {"multiplier": 2}]]}, "compress_all_res"),
        ({"encoder_blocks": [["compress_all_res", {}]]}, "multiplier"),
        ({"encoder_blocks": [["compress_all_res", 2]]}, "cannot read"),
        ({"encoder_blocks": [["compress_all_res", {"multiplier": 2}]]}, "scale"),
    ],
)
def test_from_sections_refuses_what_the_network_does_not_do(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        VideoVAEConfig.from_sections(sections(**changes))


def test_from_sections_refuses_an_absent_timestep_field_and_an_absent_section() -> None:
    config = sections()
    del config["vae"]["timestep_conditioning"]
    with pytest.raises(CheckpointError, match="absent"):
        VideoVAEConfig.from_sections(config)
    with pytest.raises(CheckpointError, match="no section"):
        VideoVAEConfig.from_sections({"transformer": {}})


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [
        ({}, "zeros", "reflect"),
        ({"spatial_padding_mode": "zeros"}, "zeros", "zeros"),
        ({"spatial_padding_mode": "reflect"}, "reflect", "reflect"),
        ({"decoder_spatial_padding_mode": "zeros"}, "zeros", "zeros"),
        ({"encoder_spatial_padding_mode": "reflect"}, "reflect", "reflect"),
        ({"spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "reflect"}, "zeros", "zeros"),
    ],
)
def test_padding_follows_the_file(changes: dict[str, str], encoder: str, decoder: str) -> None:
    config = VideoVAEConfig.from_sections(sections(**changes))
    assert (config.encoder_padding, config.decoder_padding) == (encoder, decoder)


def test_a_half_that_is_not_in_the_file_cannot_be_built() -> None:
    config = tiny_config()
    with pytest.raises(CheckpointError, match="no video encoder"):
        VideoEncoder(replace(config, encoder_blocks=()))
    with pytest.raises(CheckpointError, match="no video decoder"):
        VideoDecoder(replace(config, decoder_blocks=()))


def test_meta_modules_load_strictly_and_leave_nothing_on_meta() -> None:
    config = tiny_config()
    for kind in (VideoEncoder, VideoDecoder):
        state = kind(config).state_dict()
        with torch.device("meta"):
            module = kind(config)
        module.load_state_dict(state, strict=True, assign=True)
        assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def modules_and_inputs(*, reflect: bool) -> list[tuple[torch.nn.Module, Tensor]]:
    torch.manual_seed(0)
    config = tiny_config(reflect=reflect)
    pixels = torch.rand(2, 3, 9, 96, 64) * 2 - 1
    return [(VideoEncoder(config), pixels), (VideoDecoder(config), torch.randn(2, 8, 2, 3, 2))]


@pytest.mark.parametrize("reflect", [False, True])
def test_working_in_place_changes_neither_the_result_nor_the_input(reflect: bool) -> None:
    for module, x in modules_and_inputs(reflect=reflect):
        kept = x.clone()
        with torch.inference_mode():
            fast = module(x)
        assert torch.equal(x, kept)
        slow = module(x)
        assert slow.requires_grad
        assert torch.equal(fast, slow)


@pytest.mark.parametrize("reflect", [False, True])
def test_channels_last_weights_change_nothing_but_rounding(reflect: bool) -> None:
    for module, x in modules_and_inputs(reflect=reflect):
        with torch.inference_mode():
            plain = module(x)
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            torch.testing.assert_close(module(x), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 4, 5)])
def test_gradients_pass_the_padding(causal: bool, padding: PaddingMode, size: tuple[int, int, int]) -> None:
    conv = TemporalPaddedConv3d(2, 3, causal=causal, padding=padding)
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv.pad, x)
    assert torch.equal(conv.pad(x).detach(), conv.pad(x.detach()))


def test_bfloat16_stays_bfloat16() -> None:
    for module, x in modules_and_inputs(reflect=True):
        with torch.inference_mode():
            exact = module(x)
            rounded = module.bfloat16()(x.bfloat16())
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).abs().mean() < 0.1 * exact.std()


@torch.inference_mode()
def test_sizes_and_first_frame_rule() -> None:
    encoder, pixels = modules_and_inputs(reflect=False)[0]
    latent = encoder(pixels)
    assert latent.shape == (2, 8, 2, 3, 2)
    # Causal: the first latent frame stands for the first frame alone.
    torch.testing.assert_close(encoder(pixels[:, :, :1]), latent[:, :, :1], atol=1e-5, rtol=1e-5)
    assert VideoDecoder(tiny_config())(latent).shape == (2, 3, 9, 96, 64)


@torch.inference_mode()
def test_frames_beyond_8k_plus_1_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    encoder, pixels = modules_and_inputs(reflect=False)[0]
    assert isinstance(encoder, VideoEncoder)
    longer = torch.cat((pixels, pixels[:, :, :3]), dim=2)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encoder.encode(longer), encoder.encode(pixels))
    assert [record.message for record in caplog.records] == [
        "12 frames are not 8k+1: the last 3 are dropped, 9 stay"
    ]


@torch.inference_mode()
def test_sizes_that_cannot_work_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"width=100, height=40 .* Try: 96x32"):
        VideoEncoder(tiny_config()).encode(torch.zeros(1, 3, 1, 40, 100))
    low = torch.zeros(1, 8, 1, 1, 4)
    with pytest.raises(RequestError, match=r"128x32 is too small.* Try: .*64"):
        VideoDecoder(tiny_config(reflect=True)).decode(low)
    assert VideoDecoder(tiny_config()).decode(low).shape == (1, 3, 1, 32, 128)
    narrow = torch.zeros(1, 3, 1, 64, 32)
    with pytest.raises(RequestError, match=r"32x64 is too small: this encoder .* Try: .*64"):
        VideoEncoder(tiny_config(reflect=True)).encode(narrow)
    assert VideoEncoder(tiny_config()).encode(narrow).shape == (1, 8, 1, 2, 1)


def test_statistics_have_hyphenated_names_and_invert_each_other() -> None:
    names = ("mean-of-means", "std-of-means")
    weights = {f"vae.per_channel_statistics.{name}": torch.rand(4) + 0.5 for name in names}
    statistics = PerChannelStatistics(4)
    statistics.load_state_dict(rename(weights, STATISTICS_KEY_PREFIXES), strict=True)
    latent = torch.randn(2, 4, 2, 3, 3)
    mean, std = (value.view(1, 4, 1, 1, 1) for value in weights.values())
    torch.testing.assert_close(statistics.normalize(latent), (latent - mean) / std)
    torch.testing.assert_close(statistics.unnormalize(statistics.normalize(latent)), latent)
    assert statistics.normalize(latent.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_truncates_after_clamping(dtype: torch.dtype) -> None:
    # 0.5 is exact in both dtypes: (0.5 + 1) / 2 * 255 = 191.25; -0.25: 95.625, which rounding would make 96.
    pixels = torch.tensor([-3.0, -1.0, -0.25, 0.0, 0.5, 1.0, 7.0], dtype=dtype)
    kept = pixels.clone()
    assert to_uint8(pixels).tolist() == [0, 0, 95, 127, 191, 255, 255]
    assert torch.equal(pixels, kept)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all living tensors; on the meta device nothing is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.now -= size


@pytest.mark.parametrize("model", MODELS)
def test_no_more_than_three_activations_live_at_once(model: str) -> None:
    config = VideoVAEConfig.from_sections(sections(model))
    with torch.device("meta"):
        encoder, decoder = VideoEncoder(config).bfloat16(), VideoDecoder(config).bfloat16()
        latent = torch.empty(1, 128, 8, 16, 16, dtype=torch.bfloat16)
    with torch.inference_mode():
        with LiveBytes() as decoding:
            pixels = decoder(latent)
        with LiveBytes() as encoding:
            encoder(torch.empty_like(pixels))
    pixel_frames = pixels.numel() // 3
    # One activation of the widest stage is 16 bytes per pixel and frame; padding adds a little.
    assert decoding.peak / pixel_frames < 51
    assert encoding.peak / pixel_frames < 56
