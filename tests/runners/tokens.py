"""Runners of the cases about patchifiers, positions and lengths."""

import re
from math import ceil

import torch
from torch import Tensor

from diffsynth.conditioning import tokens
from diffsynth.models.ltx2.audio_vae import PerChannelStatistics
from diffsynth.models.ltx2.mel import MelConfig, log_mel, resample
from diffsynth.sampling import steps
from tests.runners.case import Case

# Keys of a case's configuration -> arguments of ``audio_positions``.
_AUDIO_SCALES = {
    "audio_latent_downsample_factor": "mel_per_latent",
    "hop_length": "mel_hop",
    "sample_rate": "sample_rate_hz",
}


def patchify_positions(case: Case) -> None:
    """Patchify, positions and the conversions between velocity and x0."""
    video, audio = case["in/video_latent"], case["in/audio_latent"]
    batch, grid = video.shape[0], _grid(video)
    for name in case.group("mid/"):
        assert name == "video_grid_bounds", name
        case.check(f"mid/{name}", tokens.video_grid_bounds(grid).expand(batch, -1, -1, -1))
    case.check("out/video_tokens", tokens.patchify(video))
    case.check("out/audio_tokens", tokens.patchify(audio))
    case.compare("unpatchified video", tokens.unpatchify(case["out/video_tokens"], tuple(video.shape)), video)
    case.compare("unpatchified audio", tokens.unpatchify(case["out/audio_tokens"], tuple(audio.shape)), audio)
    _positions(case)
    _sizes(case)
    _conversions(case)


def _positions(case: Case) -> None:
    texts = {**case.meta["inputs"], **case.meta["outputs"]}
    video, audio = case["in/video_latent"], case["in/audio_latent"]
    keyframe, reference = case["in/keyframe_latent"], case["in/reference_latent"]
    batch = video.shape[0]
    fps = _number(r"fps ([\d.]*\d)", texts["keyframe_positions"])
    index = int(_number(r"pixel frame (\d+)", texts["keyframe_latent"]))
    factor = int(_number(r"downscale_factor (\d+)", texts["reference_latent"]))
    for name in case.group("out/"):
        if match := re.fullmatch(r"video_positions_fps(.+)", name):
            actual = tokens.video_positions(_grid(video), float(match[1]), batch=batch)
        elif match := re.fullmatch(r"audio_positions_(\d+)", name):
            actual = tokens.audio_positions(int(match[1]))
        elif name == "audio_positions":
            actual = tokens.audio_positions(audio.shape[2], batch=batch)
        elif match := re.fullmatch(r"keyframe_positions(_one_image|_index\d+)?", name):
            suffix = match[1] or ""
            at = int(suffix.removeprefix("_index")) if suffix.startswith("_index") else index
            actual = tokens.keyframe_positions(
                _grid(keyframe), fps, at, one_frame=suffix == "_one_image", batch=batch
            )
        elif name == "reference_positions":
            actual = tokens.reference_positions(_grid(reference), fps, downscale_factor=factor, batch=batch)
        else:
            continue
        assert actual.dtype == torch.float32, f"{name} is {actual.dtype}"
        case.check(f"out/{name}", actual)


def _sizes(case: Case) -> None:
    rows = case["in/pixel_shapes"].tolist()
    shapes = [tokens.video_latent_shape(int(f), int(h), int(w)) for f, h, w, _ in rows]
    case.check_equal(
        "out/video_latent_shapes", shapes, [tuple(r) for r in case["out/video_latent_shapes"].tolist()]
    )
    frames = [tokens.audio_latent_frames(int(f), fps) for f, _, _, fps in rows]
    case.check_equal("out/audio_latent_frames", frames, case["out/audio_latent_frames"].tolist())


def _conversions(case: Case) -> None:
    x, velocity = case["out/video_tokens"], case["in/velocity"]
    mask, clean, sigma = case["in/denoise_mask"], case["in/clean_tokens"], case["in/sigma"]
    timesteps = mask * sigma[:, None, None]
    first = sigma[0].item()
    per_token = steps.x0_from_velocity(x, velocity, timesteps)
    scalar = steps.x0_from_velocity(x, velocity, first)
    case.check("out/timesteps", timesteps)
    case.check("out/x0_per_token", per_token)
    case.check("out/x0_scalar", scalar)
    case.check("out/velocity_from_x0_scalar", steps.velocity_from_x0(x, scalar, first))
    case.check("out/x0_blended", steps.blend(per_token, mask, clean))


def audio_patchifier(case: Case) -> None:
    """Tokens, time grid and per-channel statistics of audio latents."""
    latent = case["in/latent"]
    batch, frames = latent.shape[0], latent.shape[2]
    folded = tokens.patchify(latent)
    case.check("out/tokens", folded)
    case.check("out/unpatchified", tokens.unpatchify(folded, tuple(latent.shape)))
    statistics = _statistics(case)
    config = case.meta["config"]
    scales = {own: config[key] for key, own in _AUDIO_SCALES.items() if key in config}
    case.check("out/normalized", statistics.normalize(latent))
    case.check("out/denormalized", statistics.denormalize(latent))
    for name in case.group("out/"):
        match = re.fullmatch(r"bounds_seconds(?:_shift(\d+))?(_noncausal)?", name)
        if match:
            causal = config.get("is_causal", True) and match[2] is None
            actual = tokens.audio_positions(
                frames, shift=int(match[1] or 0), causal=causal, batch=batch, **scales
            )
            assert actual.dtype == torch.float32, f"{name} is {actual.dtype}"
            case.check(f"out/{name}", actual)


def _statistics(case: Case) -> PerChannelStatistics:
    marker = "per_channel_statistics."
    weights = {key.partition(marker)[2]: value for key, value in case.weights().items() if marker in key}
    statistics = PerChannelStatistics(len(next(iter(weights.values()))))
    statistics.load_state_dict(weights, strict=True)
    return statistics


def audio_lengths(case: Case) -> None:
    """``lengths.json``: lengths of latents, spectrograms and waveforms."""
    for number, row in enumerate(case.meta["rows"]):
        latents = tokens.audio_latent_frames(row["frames"], row["fps"])
        mel = max(4 * latents - 3, 0)
        lengths = {
            "latent_length": latents,
            "mel_frames": mel,
            "samples_ltx2_24k": 240 * mel,
            "samples_ltx2_3_16k": 160 * mel,
            "samples_ltx2_3_48k": 480 * mel,
        }
        expected = {key: row[key] for key in lengths}
        case.check_equal(f"rows[{number}]", lengths, expected)
    for number, row in enumerate(case.meta["encoder_rows"]):
        mel = log_mel(torch.zeros(1, 1, row["samples_16k"]), MelConfig()).shape[-2]
        found = {"mel_frames": mel, "latent_length": ceil(mel / 4)}
        case.check_equal(f"encoder_rows[{number}]", found, {key: row[key] for key in found})
    for number, row in enumerate(case.meta["resample_rows"]):
        samples = resample(torch.zeros(1, 1, row["samples"]), row["rate"], MelConfig().sampling_rate).shape[
            -1
        ]
        case.check_equal(f"resample_rows[{number}]", samples, row["samples_16k"])


def _grid(latent: Tensor) -> tokens.Grid:
    f, h, w = latent.shape[2:]
    return f, h, w


def _number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in {text!r}"
    return float(match[1])
