"""Runners of the audio room: mel front end, audio VAE, both vocoders."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from diffsynth.models.ltx2 import audio_vae
from diffsynth.models.ltx2 import vocoder as one_stage
from diffsynth.models.ltx2 import vocoder_bwe as two_stage
from diffsynth.models.ltx2.mel import (
    LOG_FLOOR,
    MelConfig,
    log_mel,
    mel_filter_bank,
    prepare_waveform,
    resample,
    stft_magnitude,
)
from tests.runners.case import Case, GoldenMismatch, Tolerance

Record = dict[str, Tensor]


def load(module: nn.Module, weights: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> set[str]:
    """Load what lies below ``prefixes`` strictly into a module on the meta device; returns the keys used."""
    state, used = {}, set()
    for key, tensor in weights.items():
        for old, new in prefixes.items():
            if key.startswith(old):
                state[new + key.removeprefix(old)] = tensor
                used.add(key)
                break
    module.load_state_dict(state, strict=True, assign=True)
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
    module.eval()
    return used


def build(
    make: Callable[[], nn.Module], weights: Mapping[str, Tensor], prefixes: Mapping[str, str]
) -> tuple[nn.Module, set[str]]:
    with torch.device("meta"):
        module = make()
    return module, load(module, weights, prefixes)


def expect_all_used(weights: Iterable[str], *used: set[str]) -> None:
    rest = set(weights).difference(*used)
    if rest:
        raise GoldenMismatch(f"weights that no module took: {sorted(rest)[:5]}")


def record(module: nn.Module) -> Record:
    """Outputs of every submodule from now on, in the order of computation; later calls are not recorded."""
    outputs: Record = {}
    for name, part in module.named_modules():
        if name:
            part.register_forward_hook(_keeper(outputs, name))
        if isinstance(part, one_stage.Generator):
            _record_stages(part, outputs, f"{name}." if name else "")
    return outputs


def _keeper(outputs: Record, name: str) -> Callable[..., None]:
    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.setdefault(name, output.clone())

    return keep


def _record_stages(generator: one_stage.Generator, outputs: Record, prefix: str) -> None:
    original = generator.stage

    def stage(i: int, x: Tensor) -> Tensor:
        y = original(i, x)
        outputs.setdefault(f"{prefix}stage.{i}", y.clone())
        return y

    generator.stage = stage  # type: ignore[method-assign]


def check_mids(
    case: Case, outputs: Record, tolerance: Tolerance | None = None, *, done: Iterable[str] = ()
) -> None:
    """Compare every ``mid/`` tensor in the order of computation; one that was not computed is an error."""
    for name, tensor in outputs.items():
        if f"mid/{name}" in case:
            case.check(f"mid/{name}", tensor, tolerance)
    unknown = case.group("mid/").keys() - outputs.keys() - set(done)
    if unknown:
        raise GoldenMismatch(f"never computed: {sorted(unknown)}")


def antialias_ops(case: Case) -> None:
    ratio, taps = case.meta["config"]["ratio"], case.meta["config"]["kernel_size"]
    x = case["in/x"]
    kernel = two_stage.kaiser_sinc_filter(ratio, taps)
    snake, used = build(lambda: two_stage.SnakeBeta(x.shape[1]), case.weights(), {"act.": ""})
    expect_all_used(case.weights(), used)
    outputs = {f"kaiser_filter_ratio{ratio}": kernel, f"kaiser_filter_down{ratio}": kernel}
    outputs["upsampled"] = two_stage.kaiser_upsample(x, kernel, ratio)
    outputs["snake"] = snake(outputs["upsampled"])
    outputs["activation"] = two_stage.kaiser_downsample(outputs["snake"], kernel, ratio)
    for r in case.meta["config"]["hann_ratios"]:
        outputs[f"hann_filter_ratio{r}"] = two_stage.hann_sinc_filter(r)
        outputs[f"hann_upsampled_ratio{r}"] = two_stage.hann_upsample(x, r)
    for name, tensor in outputs.items():
        if f"out/{name}" in case:
            case.check(f"out/{name}", tensor)


def decoder(case: Case) -> None:
    config = audio_vae.AudioVAEConfig.from_sections(case.meta["config"])
    module, used = build(
        lambda: audio_vae.AudioDecoder(config), case.weights(), audio_vae.AudioDecoder.KEY_PREFIXES
    )
    expect_all_used(case.weights(), used)
    assert isinstance(module, audio_vae.AudioDecoder)
    latent = case["in/latent"]
    outputs = {"denormalized": module.per_channel_statistics.denormalize(latent)}
    recorded = record(module)
    mel = module.decode(latent)
    check_mids(case, {**outputs, **recorded, "mel": mel})
    case.check("out/mel", mel)
    for suffix, other in case.group("in/latent").items():
        if suffix:
            case.check(f"out/mel{suffix}", module.decode(other))
    if "in/pixelnorm_x" in case:
        case.check("out/pixelnorm_y", module.norm_out(case["in/pixelnorm_x"]))


def encoder(case: Case) -> None:
    config = audio_vae.AudioVAEConfig.from_sections(case.meta["config"])
    module, used = build(
        lambda: audio_vae.AudioEncoder(config), case.weights(), audio_vae.AudioEncoder.KEY_PREFIXES
    )
    expect_all_used(case.weights(), used)
    assert isinstance(module, audio_vae.AudioEncoder)
    recorded = record(module)
    mels = {
        suffix: log_mel(waveform, config.mel).to(case.dtype)
        for suffix, waveform in case.group("in/waveform").items()
    }
    mels |= case.group("in/mel")
    checked = {f"mel{suffix}" for suffix in mels if f"mid/mel{suffix}" in case}
    for name in sorted(checked):
        case.check(f"mid/{name}", mels[name.removeprefix("mel")], case.tolerance("mel"))
    latents = {suffix: module.encode(mels[suffix]) for suffix in sorted(mels)}
    recorded["moments"] = recorded["conv_out"]
    check_mids(case, recorded, case.tolerance("others"), done=checked)
    for suffix, latent in latents.items():
        case.check(f"out/latent{suffix}", latent, case.tolerance("others"))


def decode_audio(case: Case) -> None:
    sections, weights = case.meta["config"], case.weights()
    config = audio_vae.AudioVAEConfig.from_sections(sections)
    vocoder_type = two_stage.vocoder_class(sections)
    first, used_first = build(
        lambda: audio_vae.AudioDecoder(config), weights, audio_vae.AudioDecoder.KEY_PREFIXES
    )
    second, used_second = build(
        lambda: vocoder_type(vocoder_type.config_class.from_sections(sections)),  # type: ignore[arg-type]
        weights,
        vocoder_type.KEY_PREFIXES,
    )
    expect_all_used(weights, used_first, used_second)
    recorded = record(first)
    first.register_forward_hook(_keeper(recorded, "mel"))
    latents = sorted(case.group("in/latent").items())
    waveforms = {suffix: one_stage.decode_audio(first, second, latent) for suffix, latent in latents}
    check_mids(case, recorded)
    for suffix, waveform in waveforms.items():
        case.check(f"out/waveform{suffix}", waveform)
    if "out/sampling_rate" in case:
        rate = case["out/sampling_rate"].flatten().tolist()
        case.check_equal("out/sampling_rate", [second.output_sampling_rate], rate)


def mel_processor(case: Case) -> None:
    stated = case.meta["config"]
    config = MelConfig(
        sampling_rate=stated["sampling_rate"],
        n_fft=stated["n_fft"],
        hop_length=stated["hop_length"],
        mel_bins=stated["mel_bins"],
    )
    implemented = {
        "win_length": config.n_fft,
        "f_min": 0.0,
        "f_max": config.sampling_rate / 2,
        "power": 1.0,
        "mel_scale": "slaney",
        "norm": "slaney",
        "center": True,
        "pad_mode": "reflect",
        "log_floor": LOG_FLOOR,
    }
    for key in implemented.keys() & stated.keys():
        case.check_equal(f"config.{key}", implemented[key], stated[key])
    case.check("mid/fbanks", mel_filter_bank(config), case.tolerance("fbanks"))
    mids = {"fbanks"}
    for rate, waveform in sorted(case.group("in/waveform_").items()):
        at_target = resample(waveform, int(rate), config.sampling_rate)
        if f"mid/resampled_{rate}" in case:
            case.check(f"mid/resampled_{rate}", at_target, case.tolerance("resampled"))
            mids.add(f"resampled_{rate}")
        prepared = prepare_waveform(waveform, int(rate), config)
        sides = {"left": prepared[:, 0], "right": prepared[:, 1]}
        for side, channel in sides.items():
            if int(rate) == config.sampling_rate and f"mid/magnitude_{side}" in case:
                tolerance = case.tolerance("log_mel")
                case.check(f"mid/magnitude_{side}", stft_magnitude(channel, config), tolerance)
                mids.add(f"magnitude_{side}")
        for complex_ok in (False, True):
            log = log_mel(prepared, config, complex_ok=complex_ok)
            case.check(f"out/log_mel_{rate}", log, case.tolerance("log_mel"))
    unknown = case.group("mid/").keys() - mids
    if unknown:
        raise GoldenMismatch(f"never computed: {sorted(unknown)}")


def vocoder(case: Case) -> None:
    config = one_stage.VocoderConfig.from_sections(case.meta["config"])
    module, used = build(lambda: one_stage.Vocoder(config), case.weights(), one_stage.Vocoder.KEY_PREFIXES)
    expect_all_used(case.weights(), used)
    recorded = record(module)
    waveforms = {suffix: module(mel) for suffix, mel in sorted(case.group("in/mel").items())}
    check_mids(case, recorded)
    for suffix, waveform in waveforms.items():
        case.check(f"out/waveform{suffix}", waveform)


def vocoder_bwe(case: Case) -> None:
    config = two_stage.VocoderBWEConfig.from_sections(case.meta["config"])
    weights, prefixes = case.weights(), two_stage.VocoderBWE.KEY_PREFIXES
    module, used = build(lambda: two_stage.VocoderBWE(config), weights, prefixes)
    expect_all_used(weights, used)
    recorded = record(module)
    waveforms = {suffix: module(mel) for suffix, mel in sorted(case.group("in/mel").items())}
    low = recorded["vocoder.conv_post"].clamp(-1, 1)
    padded = nn.functional.pad(low, (0, -low.shape[-1] % config.hop_length))
    check_mids(
        case,
        {
            **recorded,
            "low_rate_waveform": low,
            "bwe_magnitude": recorded["mel_stft.stft_fn"],
            "bwe_log_mel": recorded["mel_stft"],
            "residual": recorded["bwe_generator"],
            "skip": two_stage.hann_upsample(padded, config.ratio),
        },
    )
    for suffix, waveform in waveforms.items():
        case.check(f"out/waveform{suffix}", waveform)
    if "out/resampler_filter" in case:
        case.check("out/resampler_filter", two_stage.hann_sinc_filter(config.ratio))
    if "out/waveform_from_bf16_weights" in case:
        rounded = {key: tensor.bfloat16() for key, tensor in weights.items()}
        stored_low, _ = build(lambda: two_stage.VocoderBWE(config), rounded, prefixes)
        case.check("out/waveform_from_bf16_weights", stored_low(case["in/mel"].bfloat16().float()))
        assert all(t.dtype == torch.bfloat16 for t in stored_low.state_dict().values())
