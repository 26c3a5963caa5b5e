"""Runners of the cases about schedules, guidance, noise and samplers."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffsynth.conditioning.state import ModalityState
from diffsynth.request import GuidanceParams
from diffsynth.sampling import guidance, loops, noise, steps
from diffsynth.sampling import schedules as lists
from diffsynth.sampling.conventions import NoiserRule
from diffsynth.sampling.guidance import PassKind
from tests.runners.case import Case, GoldenMismatch, Tolerance


@dataclass(frozen=True)
class Tokens:
    """The part of a modality's state that samplers look at, built from recorded tensors."""

    latent: Tensor
    clean: Tensor
    mask: Tensor

    @property
    def target_shape(self) -> tuple[int, ...]:
        return tuple(self.latent.shape)

    def with_latent(self, latent: Tensor) -> "Tokens":
        return replace(self, latent=latent)

    def patchified(self, latent: Tensor) -> Tensor:
        return latent


# --- schedules ---------------------------------------------------------------------------------------------


def schedules(case: Case) -> None:
    """``sigmas.json``: rows of arguments and the float32 list that they give."""
    makers: dict[str, Callable[[dict[str, Any]], Tensor]] = {
        "ltx2": _ltx2,
        "ltx2_options": _ltx2,
        "linear_quadratic": lambda row: lists.linear_quadratic_schedule(row["steps"], **row["kwargs"]),
        "beta": lambda row: lists.beta_schedule(row["steps"], **row.get("kwargs", {})),
        "distilled_stage1": lambda row: torch.tensor(lists.DISTILLED_STAGE_1),
        "distilled_stage2": lambda row: torch.tensor(lists.DISTILLED_STAGE_2),
        "diffsynth": _diffsynth,
    }
    for kind, recorded in case.meta.items():
        if kind not in makers:
            if isinstance(recorded, list):
                raise GoldenMismatch(f"no schedule is called {kind!r}")
            continue
        rows = recorded if isinstance(recorded[0], dict) else [{"sigmas": recorded}]
        for number, row in enumerate(rows):
            name = f"{kind}[{number}]"
            actual = makers[kind](row)
            _same_length(name, actual, row["sigmas"])
            case.compare(name, actual, torch.tensor(row["sigmas"], dtype=torch.float64))
            if "timesteps_bf16" in row:
                rounded = lists.rounded_timesteps(actual)
                case.check_equal(f"{name}.timesteps_bf16", rounded.tolist(), row["timesteps_bf16"])


def _ltx2(row: dict[str, Any]) -> Tensor:
    options = dict(row.get("kwargs", {}))
    tokens = options.pop("default_number_of_tokens", lists.DEFAULT_TOKENS)
    return lists.ltx2_schedule(row["steps"], row.get("tokens") or tokens, **options)


def _diffsynth(row: dict[str, Any]) -> Tensor:
    special = {
        "distilled_stage1": lists.DISTILLED_STAGE_1,
        "ditilled_stage1": lists.DISTILLED_STAGE_1,
        "stage2": lists.DISTILLED_STAGE_2,
    }
    if "special_case" in row:
        return torch.tensor(special[row["special_case"]])[:-1]
    options = {k: row[k] for k in ("denoising_strength", "dynamic_shift_len") if k in row}
    return lists.diffsynth_schedule(row["steps"], **options)[:-1]


def _same_length(name: str, actual: Tensor, expected: list[float]) -> None:
    if len(actual) != len(expected):
        raise GoldenMismatch(f"{name}: {len(actual)} values, expected {len(expected)}")


# --- guidance ----------------------------------------------------------------------------------------------


def guiders(case: Case) -> None:
    """Every guider; scale, eta and threshold are in the output's name, parameters of ``mm_*`` in the case."""
    tensors = {kind: case[f"in/{kind}"] for kind in PassKind}
    cond, uncond = tensors[PassKind.COND], tensors[PassKind.UNCOND]
    for name, params in case.meta["params"].items():
        guided = guidance.combine(GuidanceParams(**_tuples(params)), tensors)
        case.check(f"out/{name}", guided)
    legacy = _legacy_apg(case)
    for name in case.group("out/"):
        recorded = case[f"out/{name}"]
        c, u = cond[: len(recorded)], uncond[: len(recorded)]
        if match := re.fullmatch(r"cfg_delta_(.+)", name):
            delta = guidance.cfg_delta(c, u, float(match[1]))
        elif match := re.fullmatch(r"cfgstar_delta_(.+)", name):
            delta = guidance.cfg_star_delta(c, u, float(match[1]))
        elif match := re.fullmatch(r"stg_delta_(.+)", name):
            perturbed = tensors[PassKind.PERTURBED][: len(recorded)]
            delta = guidance.stg_delta(c, perturbed, float(match[1]))
        elif match := re.fullmatch(r"apg_delta_s(.+)_eta(.+)_n(.+)", name):
            scale, eta, threshold = (float(value) for value in match.groups())
            delta = guidance.apg_delta(c, u, scale, eta=eta, norm_threshold=threshold)
        elif match := re.fullmatch(r"apg_stateful_call(\d+)", name):
            pairs = ((PassKind.COND, PassKind.UNCOND), (PassKind.PERTURBED, PassKind.ISOLATED))
            first, second = pairs[int(match[1]) - 1]
            delta = legacy.delta(tensors[first][: len(recorded)], tensors[second][: len(recorded)])
        else:
            continue
        case.check(f"out/{name}", delta)
    _guider_rules(case)


def _legacy_apg(case: Case) -> guidance.StatefulApg:
    text = case.meta["out_names"].partition("stateful APG")[2]
    scale, eta, threshold, momentum = (
        float(re.search(rf"{key} ([\d.]+\d|\d)", text)[1])  # type: ignore[index]
        for key in ("scale", "eta", "norm_threshold", "momentum")
    )
    return guidance.StatefulApg(scale, eta=eta, norm_threshold=threshold, momentum=momentum)


def _guider_rules(case: Case) -> None:
    if rule := case.meta.get("skip_rule"):
        skipped = [guidance.skips_step(i, rule["skip_step"]) for i in range(len(rule["skipped"]))]
        case.check_equal("skip_rule", skipped, rule["skipped"])
    if bins := case.meta.get("sigma_bins"):
        table = {float(sigma): value for sigma, value in bins["bins"].items()}
        found = {sigma: guidance.at_sigma(table, float(sigma)) for sigma in bins["lookup"]}
        case.check_equal("sigma_bins", found, bins["lookup"])


def _tuples(params: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}


# --- steps -------------------------------------------------------------------------------------------------


def euler_and_conversions(case: Case) -> None:
    """Conversions, blend and Euler; the sigma, the step and the dtype are in the output's name."""
    x, x0, v, mask, clean = (case[f"in/{n}"] for n in ("x", "x0", "v", "mask", "clean"))
    sigmas = case["in/sigmas"].tolist()
    for name in case.group("out/"):
        half = name.endswith("_bf16")
        a, a0 = (case["in/x_bf16"], case["in/x0_bf16"]) if half else (x, x0)
        plain = name.removesuffix("_bf16")
        if plain == "timesteps":
            actual = mask * _conversion_sigma(case)
        elif plain == "denoised_per_token":
            actual = steps.x0_from_velocity(a, v, mask * _conversion_sigma(case))
        elif match := re.fullmatch(r"denoised_sigma(.+)", plain):
            actual = steps.x0_from_velocity(a, v, float(match[1]))
        elif match := re.fullmatch(r"velocity_sigma(.+)", plain):
            actual = steps.velocity_from_x0(a, a0, float(match[1]))
        elif match := re.fullmatch(r"euler_step(\d+)", plain):
            i = int(match[1])
            actual = steps.euler_step(a, a0, sigmas[i], sigmas[i + 1])
        elif plain == "post_process":
            actual = steps.blend(a0, mask, clean.to(a0.dtype))  # a state has one dtype
        else:
            continue
        if half:
            assert actual.dtype == torch.bfloat16, f"{name} is {actual.dtype}"
        case.check(f"out/{name}", actual, Tolerance(0.0) if half else None)


def _conversion_sigma(case: Case) -> float:
    """The sigma of all conversions of the case stands in the name of its scalar one."""
    (sigma,) = {m[1] for name in case.tensors if (m := re.fullmatch(r"out/denoised_sigma(.+)", name))}
    return float(sigma)


def res2s_coefficients(case: Case) -> None:
    """Columns are named in the output's own name."""
    for name in case.group("out/"):
        if name.startswith("sde_"):
            columns = name.removeprefix("sde_").split("_")
            rows = [steps.sde_coefficients(s)._asdict() for s in case["in/sigma_next"].tolist()]
        else:
            columns = name.split("_")
            rows = [
                steps.res2s_coefficients(h)._asdict()
                | {"phi1": steps.phi1(-h), "phi2": steps.phi2(-h), "phi1half": steps.phi1(-h / 2)}
                for h in case["in/h"].tolist()
            ]
        table = [[row[column] for column in columns] for row in rows]
        case.check(f"out/{name}", torch.tensor(table, dtype=torch.float64))


def stochastic_steps(case: Case) -> None:
    """``<kind>_eta<eta>_step<i>``: a step from sigma i to sigma i + 1."""
    x, x0, uncond, unit = (case[f"in/{n}"] for n in ("x", "x0", "uncond_x0", "noise"))
    sigmas = case["in/sigmas"].tolist()
    for name in case.group("out/"):
        match = re.fullmatch(r"(.+)_eta(.+)_step(\d+)", name)
        assert match, name
        kind, eta, i = match[1], float(match[2]), int(match[3])
        s, t = sigmas[i], sigmas[i + 1]
        if kind == "euler_ancestral":
            actual = steps.ancestral_step(x, x0, unit, s, t, eta)
        elif kind == "euler_cfg_pp":
            actual = steps.cfg_pp_step(x, x0, uncond, unit, s, t, eta)
        else:
            assert kind == "res2s_step", kind
            actual = steps.sde_step(x, x0, s, t, unit, eta=eta)
        case.check(f"out/{name}", actual)


def diffsynth_step(case: Case) -> None:
    """DiffSynth's masked step, through the sampler's own rule for it; its lists end without the 0."""
    x, velocity, mask, clean = (case[f"in/{n}"] for n in ("x", "velocity", "mask", "input_latents"))
    for name, expected in case.group("mid/").items():
        if name == "sigmas":
            case.check(f"mid/{name}", lists.diffsynth_schedule(len(expected))[:-1])
        elif match := re.fullmatch(r"noise_seed(\d+)_(video|audio)", name):
            fresh = _plain_state(tuple(expected.shape))
            drawn = noise.FreshNoise(int(match[1])).draw(fresh)
            case.check(f"mid/{name}", fresh.with_latent(drawn).unpatchified())
    stage_1 = [*case["mid/sigmas"].tolist(), 0.0]
    stage_2 = lists.DISTILLED_STAGE_2
    for name in case.group("out/"):
        sigmas = stage_2 if name.startswith("stage2_") else stage_1
        plain = name.removeprefix("stage2_")
        if plain == "add_noise":
            actual = noise.mix_noise(x, clean, mask, case["in/noise"], sigmas[0], NoiserRule.UNMASKED)
        else:
            match = re.fullmatch(r"step(\d+)(_masked)?", plain)
            assert match, name
            s, t = sigmas[int(match[1]) : int(match[1]) + 2]
            m = mask if match[2] else torch.ones_like(mask)
            shown = steps.blend(x, m, clean)
            x0 = steps.x0_from_velocity(shown, velocity, m * s)
            actual = steps.euler_step(x, x0, s, t)
        case.check(f"out/{name}", actual)


def _plain_state(shape: tuple[int, ...]) -> ModalityState:
    if len(shape) == 5:
        b, c, f, h, w = shape
        return ModalityState.video((b, c, f, h, w), 24.0)
    b, c, t, m = shape
    return ModalityState.audio((b, c, t, m))


def noiser(case: Case) -> None:
    """One generator, video first; ``out/[modality_]scale<scale>``."""
    rules = [NoiserRule.TWO_LERPS if "1.2.0" in case.meta["source"] else NoiserRule.ONE_LERP]
    if not any("clean" in name for name in case.tensors):  # the clean latent is the initial one: both agree
        rules = [NoiserRule.TWO_LERPS, NoiserRule.ONE_LERP]
    modalities = ("video_", "audio_") if "in/video" in case else ("",)
    states: dict[str, Tokens] = {}
    for prefix in modalities:
        latent = case[f"in/{prefix.rstrip('_')}"] if prefix else case["in/latent"]
        mask = case.tensors.get(f"in/{prefix}mask", torch.ones(*latent.shape[:2], 1))
        states[prefix] = Tokens(latent, case.tensors.get(f"in/{prefix}clean", latent), mask)
    source = noise.SharedNoise(case.meta["seed"])
    for prefix, state in states.items():
        case.check(f"mid/{prefix}noise", source.draw(state))
    for name in case.group("out/"):
        match = re.fullmatch(r"(video_|audio_|)scale(.+)", name)
        assert match, name
        for rule in rules:
            source = noise.SharedNoise(case.meta["seed"])
            noisy = {p: noise.add_noise(s, source, float(match[2]), rule) for p, s in states.items()}
            case.check(f"out/{name}", noisy[match[1]].latent)


# --- loops -------------------------------------------------------------------------------------------------


class Playback:
    """A denoiser that returns the recorded predictions and checks what it was given."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.calls = 0

    def __call__(
        self, video: Tokens | None, audio: Tokens | None, sigma: float, step: int
    ) -> tuple[Tensor | None, Tensor | None]:
        call = f"call{self.calls:02d}"
        self.calls += 1
        if f"mid/{call}_sigma" in self.case:
            self.case.check(f"mid/{call}_sigma", torch.tensor([sigma], dtype=torch.float64))
        answers: list[Tensor | None] = []
        for name, state in (("video", video), ("audio", audio)):
            if state is not None and f"mid/{call}_{name}_in" in self.case:
                self.case.check(f"mid/{call}_{name}_in", state.latent)
            answers.append(None if state is None else self.case[f"in/{call}_{name}_x0"])
        return answers[0], answers[1]


def loop(case: Case) -> None:
    """A whole loop; the sampler is the first words of the variant."""
    video, audio = (
        Tokens(case[f"in/{n}"], case[f"in/{n}_clean"], case[f"in/{n}_mask"]) if f"in/{n}" in case else None
        for n in ("video", "audio")
    )
    denoise = Playback(case)
    sigmas = case["in/sigmas"]
    variant = case.variant
    if variant.startswith("euler"):
        result = loops.euler(denoise, video, audio, sigmas)
    elif variant.startswith("gradient estimation"):
        gamma = re.search(r"gamma ([\d.]+\d)", variant)
        result = loops.gradient_estimation(
            denoise, video, audio, sigmas, gamma=float(gamma[1]) if gamma else 2.0
        )
    else:
        assert variant.startswith("res_2s"), variant
        result = loops.res_2s(denoise, video, audio, sigmas, sde_noise=_recorded_sde(case))
    recorded = {re.match(r"call(\d+)_", k)[1] for k in case.group("in/") if k.startswith("call")}  # type: ignore[index]
    case.check_equal("number of evaluations", denoise.calls, len(recorded))
    for name, state in (("video", result[0]), ("audio", result[1])):
        if state is not None:
            case.check(f"out/{name}", state.latent)


def _recorded_sde(case: Case) -> noise.SdeNoise:
    """Noise streams by the seeds of the case; every draw is compared with the recorded one."""
    seeds = case.meta.get("seeds", {})
    seed = seeds.get("step", -1)

    class Checked(noise.SdeNoise):
        draws = 0

        def draw(self, generator: torch.Generator, like: Tensor) -> Tensor:
            drawn = super().draw(generator, like)
            name = f"mid/sde_noise{self.draws:02d}"
            if name in case:
                case.check(name, drawn)
            self.draws += 1
            return drawn

    return Checked(seed, seeds.get("substep", seed + 10000))
