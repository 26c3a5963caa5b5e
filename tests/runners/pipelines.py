"""Golden cases of whole pipeline runs: the weights lie in the folder above the case, whatever their names."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth.loader import NetworkKind, WeightFiles, recognise
from diffsynth.models.ltx2.video_vae import PerChannelStatistics
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.progress import Denoised, Progress
from diffsynth.pipelines.result import Result
from diffsynth.request import GenerateRequest, GuidanceParams
from tests.runners.case import Case, LaterIssue, Tolerance


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
    kind = inputs["pipeline"]
    if kind in LATER:
        raise LaterIssue(f"pipeline {kind}")
    build = OFFICIAL.get(kind)
    assert build is not None, f"no way to run the pipeline {kind!r}"
    folder = ModelFolder.of(case.path.parent.parent)
    arguments: dict[str, Any] = dict(inputs["args"])
    pipe = folder.pipeline(stage2_strength=inputs.get("distilled_lora_strength"))
    for _, strength in inputs.get("loras", []):
        pipe.load_lora(pipe.dit, folder.loras[0], alpha=strength)
    request, given = build(case, arguments, inputs)
    run_and_compare(case, pipe, request, given)


def _ti2vid(
    case: Case, arguments: dict[str, Any], inputs: Mapping[str, Any]
) -> tuple[GenerateRequest, Inputs]:
    images = inputs.get("images", [])
    distilled = inputs["pipeline"] == "distilled"
    guidance = {} if distilled else _guidance(inputs)
    request = GenerateRequest(
        **_known(arguments),
        **guidance,
        **_images(images),
        use_two_stage_pipeline=inputs["pipeline"] != "ti2vid_one_stage",
        use_distilled_pipeline=distilled,
        conventions=_conventions(case),
        tiled=False,
    )
    return request, Inputs(images=_open(case, images))


OFFICIAL: dict[str, Callable[[Case, dict[str, Any], Mapping[str, Any]], tuple[GenerateRequest, Inputs]]] = {
    "ti2vid_one_stage": _ti2vid,
    "ti2vid_two_stages": _ti2vid,
    "distilled": _ti2vid,
}


LATER = frozenset({"ti2vid_two_stages_hq", "keyframe_interpolation", "a2vid_two_stage", "retake", "ic_lora"})
"""Pipelines of the family that cannot be asked for yet; their cases are listed as later."""


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
    clip = None
    if "in/retake_video_uint8" in case:
        blocks = case["in/retake_video_uint8"]
        frames = blocks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).numpy()
        clip = tuple(Image.fromarray(frame) for frame in frames)
        arguments["retake_video_regions"] = tuple(map(tuple, arguments["retake_video_regions"]))
    request = GenerateRequest(
        prompt=inputs["prompt"],
        negative_prompt=inputs["negative_prompt"],
        **arguments,
        input_images_crf=0,
        conventions="diffsynth",
        tiled=False,
    )
    result = run_and_compare(case, pipe, request, Inputs(images=images, retake_video=clip))
    frames_out, (width, height) = inputs["video_out"]
    assert result.frames is not None
    assert result.waveform is not None
    case.check_equal("video_out", [len(result.frames), result.frames[0].size], [frames_out, (width, height)])
    case.check_equal("audio_out", list(result.waveform.samples.shape), inputs["audio_out"])


def defaults(case: Case) -> None:
    """Numbers and texts of the official pipelines that this package repeats."""
    from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
    from diffsynth.pipelines.stages import DEFAULT_STEPS
    from diffsynth.sampling.schedules import DISTILLED_STAGE_1, DISTILLED_STAGE_2

    meta = case.meta
    case.check_equal("default_negative_prompt", NEGATIVE_PROMPT, meta["default_negative_prompt"])
    case.check_equal("distilled sigmas", list(DISTILLED_STAGE_1), meta["sigmas"]["distilled"])
    case.check_equal("stage 2 sigmas", list(DISTILLED_STAGE_2), meta["sigmas"]["stage_2"])
    for version, model in (("2.0", "LTX-2"), ("2.3", "LTX-2.3")):
        steps = meta["params"][model]["num_inference_steps"]
        case.check_equal(f"{model} steps", DEFAULT_STEPS[version], steps)
    own = {f: GenerateRequest.__dataclass_fields__[f].default for f in GenerateRequest.__dataclass_fields__}
    own |= {"input_images_indexes": [0]}
    for name, value in meta["diffsynth_call"]["newest"].items():
        if name in own and own[name] is not None and own[name] != () and value is not None:
            case.check_equal(f"newest {name}", own[name], value)


def run_and_compare(
    case: Case, pipe: LTX2AudioVideoPipeline, request: GenerateRequest, given: Inputs
) -> Result:
    """Run, then compare every recorded tensor that the run has."""
    recorder = Recorder()
    result = pipe.generate(request, given, recorder)
    found = _recorded(recorder, pipe, patchified=case.component == "pipeline")
    last = max(recorder.steps)
    found |= {
        "out/final_video_latents": found[f"out/stage{last}/video_final"],
        "out/final_audio_latents": found[f"out/stage{last}/audio_final"],
    }
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
    """The rules of version 1.0.0 where the case shows them, else those of today."""
    behaviour = case.meta.get("behaviour")
    if isinstance(behaviour, dict) and behaviour.get("cross_timestep_mode") == "cross":
        return "official-1.0"
    return "official"


def _guidance(inputs: Mapping[str, Any]) -> dict[str, GuidanceParams]:
    found = {}
    for name in ("video_guidance", "audio_guidance"):
        with suppress(TypeError):  # "all off" instead of a table
            values = dict(inputs[name])
            found[name] = GuidanceParams(**{**values, "stg_blocks": tuple(values["stg_blocks"])})
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
