"""Golden cases of whole pipeline runs: the weights lie in the folder above the case, whatever their names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth.loader import NetworkKind, WeightFiles, recognise
from diffsynth.models.ltx2.transformer import LTX2Transformer, Pass
from diffsynth.models.ltx2.video_vae import PerChannelStatistics
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.progress import Denoised, Progress
from diffsynth.pipelines.result import Result
from diffsynth.request import DEFAULT_DOWNSAMPLE_FACTOR, GenerateRequest, GuidanceParams
from diffsynth.utils.audio import Waveform
from tests.runners.case import Case, Tolerance


@dataclass
class ModelFolder:
    """The files of a folder by what they hold."""

    models: list[Path] = field(default_factory=list)
    loras: list[Path] = field(default_factory=list)
    tokenizer: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> "ModelFolder":
        found = cls()
        for file in sorted(p for p in folder.rglob("*.safetensors") if p.parent.name != "expected"):
            if recognise(WeightFiles(file)) == [NetworkKind.LORA]:
                found.loras.append(file)
            else:
                found.models.append(file)
        for file in sorted(folder.rglob("tokenizer_config.json")):
            found.tokenizer = file.parent
        return found

    def pipeline(self, *, stage2_strength: float | None = None) -> LTX2AudioVideoPipeline:
        """In float32 on the CPU, as the cases were made."""
        assert self.tokenizer is not None
        return LTX2AudioVideoPipeline.from_pretrained(
            torch_dtype=torch.float32,
            device="cpu",
            model_configs=[ModelConfig(path=path) for path in self.models],
            tokenizer_config=ModelConfig(path=self.tokenizer),
            stage2_lora_config=None if stage2_strength is None else ModelConfig(path=self.loras[0]),
            stage2_lora_strength=stage2_strength or 0.8,
        )


@dataclass
class Recorder:
    """Listens to a run and keeps what the cases compare."""

    steps: dict[int, list[Denoised]] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> None:
        if progress.denoised is not None:
            self.steps.setdefault(progress.denoised.stage.number, []).append(progress.denoised)


class Evaluations:
    """What the network is asked, call by call: samplers may ask it between their steps."""

    def __init__(self, network: LTX2Transformer, recorder: Recorder) -> None:
        self.found: dict[str, Tensor] = {}
        self._network = network
        self._forward = network.forward_passes
        self._recorder = recorder
        self._counts: dict[int, int] = {}
        network.forward_passes = self._asked  # type: ignore[method-assign]

    def _asked(self, passes: Sequence[Pass], **how: Any) -> Any:
        stage = max(self._recorder.steps)
        number = self._counts.setdefault(stage, 0)
        self._counts[stage] += 1
        for modality in ("video", "audio"):
            stream = getattr(passes[0], modality)
            if stream is None:
                continue
            name = f"mid/stage{stage}/eval{number:02}"
            self.found[f"{name}_{modality}_in"] = stream.latent
            self.found.setdefault(f"{name}_sigma", stream.sigma)
        return self._forward(passes, **how)


def contexts(case: Case) -> None:
    """The text contexts of the prompts that the other cases of the folder state."""
    prompts = _prompts(case.path.parent)
    pipe = ModelFolder.of(case.path.parent.parent).pipeline()
    from diffsynth.conditioning.text import encode_prompts

    positive, negative = encode_prompts(
        pipe.text_encoder, pipe.text_encoder_post_modules, pipe.tokenizer, prompts
    )
    for name, context in (("pos", positive), ("neg", negative)):
        for modality in ("video", "audio"):
            case.check(f"out/context/{name}_{modality}", getattr(context, modality))


def official(case: Case) -> None:
    """A run of the official pipelines; the behaviour of its version follows from the case."""
    inputs = case.meta["inputs"]
    build = OFFICIAL.get(inputs["pipeline"])
    assert build is not None, f"no way to run the pipeline {inputs['pipeline']!r}"
    folder = ModelFolder.of(case.path.parent.parent)
    arguments: dict[str, Any] = dict(inputs["args"])
    needs_lora = inputs["pipeline"] in DISTILLED_LORA
    strength = inputs.get("distilled_lora_strength", 1.0) if needs_lora else None
    pipe = folder.pipeline(stage2_strength=strength)
    for _, alpha in inputs.get("loras", []):
        pipe.load_lora(pipe.dit, folder.loras[0], alpha=alpha)
    request, given = build(case, arguments, inputs)
    if "in/audio_latent" in case:
        pipe.parts.audio_vae_encoder = Encoded(pipe.audio_vae_encoder, case["in/audio_latent"])  # type: ignore[assignment]
    if "in/video_latent" in case:
        pipe.parts.video_vae_encoder = Encoded(pipe.video_vae_encoder, case["in/video_latent"])  # type: ignore[assignment]
    run_and_compare(case, pipe, request, given)


class Encoded(torch.nn.Module):
    """An encoder of which the case records the result, not the input."""

    def __init__(self, encoder: Any, latent: Tensor) -> None:
        super().__init__()
        self.config = encoder.config
        self.latent = latent

    def forward(self, given: Tensor) -> Tensor:
        return self.latent


Built = tuple[GenerateRequest, Inputs]


def _ti2vid(case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any], **more: Any) -> Built:
    """What all pipelines share; ``more`` are arguments of the request that a pipeline adds."""
    images = inputs.get("images", [])
    values: dict[str, Any] = {
        **_known(arguments),
        **_guidance(inputs),
        **_images(images),
        "use_two_stage_pipeline": inputs["pipeline"] != "ti2vid_one_stage",
        "conventions": _conventions(case),
        "tiled": False,
        **more,
    }
    return GenerateRequest(**values), Inputs(images=_open(case, images))


def _distilled(case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any]) -> Built:
    return _ti2vid(case, arguments, inputs, use_distilled_pipeline=True)


def _hq(case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any]) -> Built:
    return _ti2vid(
        case,
        arguments,
        inputs,
        sampler="res_2s",
        dynamic_shift=True,
        stage1_lora_strength=inputs["distilled_lora_strength_stage_1"],
        stage2_lora_strength=inputs["distilled_lora_strength_stage_2"],
    )


def _keyframes(case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any]) -> Built:
    return _ti2vid(case, arguments, inputs, input_images_as_keyframes=True)


def _a2vid(case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any]) -> Built:
    request, given = _ti2vid(case, arguments, inputs, retake_audio="recorded latent")
    return request, replace(given, retake_audio=_some_sound(request))


def _retake(case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any]) -> Built:
    start, end = arguments.pop("start_time"), arguments.pop("end_time")
    regions = ((start, min(end, arguments["frames"] / arguments["fps"])),)  # official code lets it end later
    video, audio = (arguments.pop(f"regenerate_{name}", True) for name in ("video", "audio"))
    arguments["num_frames"], arguments["frame_rate"] = arguments.pop("frames"), arguments.pop("fps")
    more: dict[str, Any] = {
        "use_two_stage_pipeline": False,
        "use_distilled_pipeline": arguments.pop("distilled", False),
        "retake_video": arguments.pop("video_path"),
        "retake_video_regions": regions if video else (),
    }
    if "in/audio_latent" in case:  # without it the clip has no sound, and all of it is made
        more |= {"retake_audio": "its sound", "retake_audio_regions": regions if audio else ()}
    request, given = _ti2vid(case, arguments, inputs, **more)
    clip = torch.zeros(request.num_frames, 2, 3, 3, dtype=torch.uint8)
    sound = _some_sound(request) if request.retake_audio else None
    return request, replace(given, retake_video=clip, retake_audio=sound)


def _ic_lora(case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any]) -> Built:
    more: dict[str, Any] = {
        "use_distilled_pipeline": True,
        "clear_lora_before_state_two": True,
        "in_context_videos": ("reference",),
        "in_context_downsample_factor": inputs.get("reference_downscale_factor", 1),
        "in_context_strength": inputs.get("video_conditioning_strength", 1.0),
        "in_context_attention_strength": inputs.get("conditioning_attention_strength", 1.0),
    }
    if inputs.get("skip_stage_2"):  # then the first stage is all there is
        size = {name: arguments[name] // 2 for name in ("height", "width")}
        more |= {"use_two_stage_pipeline": False, **size}
    request, given = _ti2vid(case, arguments, inputs, **more)
    blocks = case["in/reference_video_blocks_u8"].float().repeat_interleave(8, -2).repeat_interleave(8, -1)
    clip = (blocks * (127.5 / 8))[0].permute(1, 2, 3, 0)
    if "in/conditioning_attention_mask" in case:
        mask = (case["in/conditioning_attention_mask"] * 255)[0].permute(1, 2, 3, 0).expand(-1, -1, -1, 3)
        request = replace(request, in_context_attention_mask="mask")
        given = replace(given, in_context_attention_mask=mask)
    return request, replace(given, in_context_videos=(clip,))


def _some_sound(request: GenerateRequest) -> Waveform:
    """Anything, where the case records its encoding."""
    return Waveform(torch.zeros(2, round(request.num_frames / request.frame_rate * 16000)), 16000)


OFFICIAL: dict[str, Callable[[Case, dict[str, Any], Mapping[str, Any]], Built]] = {
    "ti2vid_one_stage": _ti2vid,
    "ti2vid_two_stages": _ti2vid,
    "ti2vid_two_stages_hq": _hq,
    "distilled": _distilled,
    "keyframe_interpolation": _keyframes,
    "a2vid_two_stage": _a2vid,
    "retake": _retake,
    "ic_lora": _ic_lora,
}
DISTILLED_LORA = frozenset(
    {"ti2vid_two_stages", "ti2vid_two_stages_hq", "keyframe_interpolation", "a2vid_two_stage"}
)


def diffsynth(case: Case) -> None:
    """A run of the pipeline class of DiffSynth-Studio, by its own arguments."""
    inputs = case.meta["inputs"]
    arguments: dict[str, Any] = dict(inputs["args"])
    two_stages = arguments.get("use_two_stage_pipeline") and not arguments.get("use_distilled_pipeline")
    folder = ModelFolder.of(case.path.parent.parent)
    pipe = folder.pipeline(stage2_strength=0.8 if two_stages else None)
    if arguments.get("use_distilled_pipeline"):  # the dev checkpoint with the LoRA plays the distilled one
        pipe.load_lora(pipe.dit, folder.loras[0], alpha=1.0)
    images = tuple(Image.open(case.path.parent.parent / name) for name in arguments.get("input_images", []))
    arguments["input_images"] = tuple(arguments.get("input_images", ()))
    arguments["input_images_indexes"] = tuple(arguments.get("input_images_indexes", (0,)))
    for name in ("retake_video_regions", "retake_audio_regions", "in_context_videos"):
        given = arguments.get(name) or ()
        arguments[name] = tuple(tuple(item) if isinstance(item, list) else item for item in given)
    clip, reference = (_clip(case, f"in/{name}_uint8") for name in ("retake_video", "in_context_video"))
    request = GenerateRequest(
        prompt=inputs["prompt"],
        negative_prompt=inputs["negative_prompt"],
        **arguments,
        input_images_crf=0,
        conventions="diffsynth",
        tiled=False,
    )
    if "in/audio_latent" in case:
        pipe.parts.audio_vae_encoder = Encoded(pipe.audio_vae_encoder, case["in/audio_latent"])  # type: ignore[assignment]
    given = Inputs(
        images=images,
        retake_video=clip,
        in_context_videos=() if reference is None else (reference,),
        retake_audio=_some_sound(request) if request.retake_audio else None,
    )
    result = run_and_compare(case, pipe, request, given)
    assert result.waveform is not None
    if result.frames is not None:
        frames_out, (width, height) = inputs["video_out"]
        made = [len(result.frames), result.frames[0].size]
        case.check_equal("video_out", made, [frames_out, (width, height)])
    if request.retake_audio is None or request.retake_audio_regions:  # kept sound comes back as it was given
        case.check_equal("audio_out", list(result.waveform.samples.shape), inputs["audio_out"])


def _clip(case: Case, name: str) -> tuple[Image.Image, ...] | None:
    """Frames of a clip that is recorded in blocks of 8x8 pixels."""
    if name not in case:
        return None
    frames = case[name].repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).numpy()
    return tuple(Image.fromarray(frame) for frame in frames)


def defaults(case: Case) -> None:
    """Numbers and texts of the official pipelines that this package repeats."""
    from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
    from diffsynth.pipelines.presets import HQ_LORA_STRENGTHS, HQ_PRESET, OFFICIAL_PRESETS
    from diffsynth.sampling.schedules import DISTILLED_STAGE_1, DISTILLED_STAGE_2

    meta = case.meta
    case.check_equal("default_negative_prompt", NEGATIVE_PROMPT, meta["default_negative_prompt"])
    case.check_equal("distilled sigmas", list(DISTILLED_STAGE_1), meta["sigmas"]["distilled"])
    case.check_equal("stage 2 sigmas", list(DISTILLED_STAGE_2), meta["sigmas"]["stage_2"])
    case.check_equal("HQ LoRA", list(HQ_LORA_STRENGTHS), meta["hq_distilled_lora_strength"])
    presets = {"LTX-2": OFFICIAL_PRESETS["2.0"], "LTX-2.3": OFFICIAL_PRESETS["2.3"], "HQ": HQ_PRESET}
    for model, preset in presets.items():
        stated = dict(meta["params"][model])
        for name in ("video", "audio"):
            guidance = stated.pop(name)
            params = GuidanceParams(**{**guidance, "stg_blocks": tuple(guidance["stg_blocks"])})
            case.check_equal(f"{model} {name}", getattr(preset, f"{name}_guidance"), params)
        for name, value in stated.items():
            factor = 2 if name.startswith("stage_2") else 1
            own_value = getattr(preset, name.removeprefix("stage_1_").removeprefix("stage_2_"))
            case.check_equal(f"{model} {name}", factor * own_value, value)
    own = {f: GenerateRequest.__dataclass_fields__[f].default for f in GenerateRequest.__dataclass_fields__}
    own |= {
        "input_images_indexes": [0],
        "in_context_downsample_factor": DEFAULT_DOWNSAMPLE_FACTOR,
    }
    for name, value in meta["diffsynth_call"]["newest"].items():
        if name in own and own[name] is not None and own[name] != () and value is not None:
            case.check_equal(f"newest {name}", own[name], value)


def run_and_compare(
    case: Case, pipe: LTX2AudioVideoPipeline, request: GenerateRequest, given: Inputs
) -> Result:
    """Run, then compare every recorded tensor that the run has."""
    recorder = Recorder()
    evaluations = Evaluations(pipe.dit, recorder)
    result = pipe.generate(request, given, recorder)
    found = _recorded(recorder, pipe, patchified=case.component == "pipeline") | evaluations.found
    last = max(recorder.steps)
    for modality in ("video", "audio"):
        if f"out/stage{last}/{modality}_final" in found:
            found[f"out/final_{modality}_latents"] = found[f"out/stage{last}/{modality}_final"]
    if last == 2 and "mid/upsampled_video" in case:
        found["mid/upsampled_video"] = _upsampled(pipe, recorder)
    for name in [*case.group("mid/"), *case.group("out/")]:
        for full in (f"mid/{name}", f"out/{name}"):
            if full in case and full in found:
                expected = case[full]
                case.check(
                    full,
                    found[full][: len(expected)] if full.endswith(("sigmas", "timesteps")) else found[full],
                )
    _compare_decoded(case, result)
    return result


def _recorded(recorder: Recorder, pipe: LTX2AudioVideoPipeline, *, patchified: bool) -> dict[str, Tensor]:
    """Every tensor of a run under the name that the cases use."""
    found: dict[str, Tensor] = {}
    for number, steps in recorder.steps.items():
        stage = f"stage{number}"
        sigmas = steps[0].stage.sigmas
        found[f"mid/{stage}/sigmas"] = sigmas
        found[f"mid/{stage}/timesteps"] = sigmas * 1000
        for modality in ("video", "audio"):
            if getattr(steps[0], modality) is None:
                continue
            for index, step in enumerate(steps):
                state = getattr(step, modality)
                tokens = state.latent if patchified else state.unpatchified()
                found[f"mid/{stage}/{modality}_{'initial' if index == 0 else f'step{index}'}"] = tokens
                x0 = getattr(step, f"{modality}_x0")
                if x0 is None:
                    continue
                found[f"mid/{stage}/{modality}_x0_step{index}"] = x0
                before = getattr(steps[index - 1], modality)
                velocity = before.with_latent((before.latent - x0) / step.sigma)
                found[f"mid/{stage}/{modality}_velocity_step{index}"] = velocity.unpatchified()
            first, final = getattr(steps[0], modality), getattr(steps[-1], modality)
            found |= {
                f"mid/{stage}/{modality}_positions": first.positions,
                f"mid/{stage}/{modality}_denoise_mask": first.mask,
                f"mid/{stage}/{modality}_clean": first.clean,
                f"out/{stage}/{modality}_final": final.unpatchified(),
                f"out/{stage}/{modality}_final_tokens": final.latent[:, : final.target_tokens],
            }
            if first.attention is not None:
                found[f"mid/{stage}/{modality}_attention_mask"] = first.attention
    return found


def _upsampled(pipe: LTX2AudioVideoPipeline, recorder: Recorder) -> Tensor:
    from diffsynth.models.ltx2.upsampler import upsample_latent

    statistics: PerChannelStatistics = pipe.video_vae_decoder.per_channel_statistics
    final = recorder.steps[1][-1].video
    assert final is not None
    return upsample_latent(pipe.upsampler, statistics, final.unpatchified())


def _compare_decoded(case: Case, result: Result) -> None:
    if "out/decoded_audio" in case:
        assert result.waveform is not None
        case.check("out/decoded_audio", result.waveform.samples, _stated(case, "audio"))
        rate = case.meta["inputs"].get("audio_sample_rate", result.waveform.sampling_rate)
        case.check_equal("audio_sample_rate", result.waveform.sampling_rate, rate)
    if "out/decoded_video_frames_first_last_uint8" in case:
        assert result.frames is not None
        pictures = [
            torch.frombuffer(bytearray(result.frames[i].tobytes()), dtype=torch.uint8) for i in (0, -1)
        ]
        expected = case["out/decoded_video_frames_first_last_uint8"]
        actual = torch.stack(pictures).view(expected.shape)
        case.check("out/decoded_video_frames_first_last_uint8", actual, _stated(case, "frames"))


def _stated(case: Case, what: str) -> Tolerance:
    """The part of a tolerance text such as "1e-4 on latents, 2/255 on decoded frames, 1e-3 on audio"."""
    for part in str(case.meta["tolerance"]).split(","):
        number, _, rest = part.strip().partition(" ")
        if what in rest:
            return Tolerance(float(number.partition("/")[0]))
    return case.tolerance()


def _prompts(folder: Path) -> list[str]:
    for file in sorted(folder.glob("*.safetensors")):
        inputs = Case.load(file).meta.get("inputs")
        arguments = inputs.get("args", {}) if isinstance(inputs, dict) else {}
        if {"prompt", "negative_prompt"} <= arguments.keys():
            return [arguments["prompt"], arguments["negative_prompt"]]
    raise AssertionError(f"no case in {folder} states the prompts")


def _conventions(case: Case) -> str:
    """The rules of version 1.0.0 where the case shows them or comes from it alone, else those of today."""
    behaviour = case.meta.get("behaviour")
    if isinstance(behaviour, dict):
        return "official-1.0" if behaviour.get("cross_timestep_mode") == "cross" else "official"
    return "official-1.0" if "ltx-pipelines 1.0.0" in case.meta.get("source", "") else "official"


def _guidance(inputs: Mapping[str, Any]) -> dict[str, GuidanceParams]:
    found = {}
    for name in ("video_guidance", "audio_guidance"):
        values = inputs.get(name)
        if isinstance(values, Mapping):  # not "all off"
            found[name] = GuidanceParams(**{**values, "stg_blocks": tuple(values.get("stg_blocks") or ())})
    return found


def _images(images: list[list[Any]]) -> dict[str, Any]:
    if not images:
        return {}
    return {
        "input_images": tuple(name for name, *_ in images),
        "input_images_indexes": tuple(frame for _, frame, *_ in images),
        "input_images_strength": tuple(strength for _, _, strength, _ in images),
        "input_images_crf": images[0][3],
    }


def _open(case: Case, images: list[list[Any]]) -> tuple[Image.Image, ...]:
    return tuple(Image.open(case.path.parent.parent / name).convert("RGB") for name, *_ in images)


def _known(arguments: dict[str, Any]) -> dict[str, Any]:
    unknown = arguments.keys() - GenerateRequest.__dataclass_fields__.keys()
    assert not unknown, f"arguments that no request has: {sorted(unknown)}"
    return arguments
