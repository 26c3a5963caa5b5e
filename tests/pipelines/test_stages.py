"""Which steps and which guidance a request comes to."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.stages import guided, plan_stages
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.sampling.schedules import ltx2_schedule
from tests.pipelines.tiny import call, same

NEUTRAL = GuidanceParams()
FULL = GuidanceParams(cfg_scale=3, stg_scale=1, stg_blocks=(1,), rescale_scale=0.7, modality_scale=3)
STAGE_2 = [0.909375, 0.725, 0.421875, 0.0]
DISTILLED = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]


def plan(version: str = "2.0", **arguments: Any) -> Any:
    return plan_stages(GenerateRequest(**arguments).validate(), version)


@pytest.mark.parametrize(("version", "steps"), [("2.0", 40), ("2.3", 30)])
def test_one_stage(version: str, steps: int) -> None:
    (stage,) = plan(version)
    assert (stage.number, stage.height, stage.width, stage.steps) == (1, 512, 768, steps)
    assert stage.sigmas.dtype == torch.float32
    assert stage.sigmas[-1] == 0
    assert (stage.sigmas.diff() < 0).all()
    assert stage.noise_scale == 1
    assert stage.video_guidance == stage.audio_guidance == GuidanceParams(cfg_scale=3.0)


def test_two_stages() -> None:
    first, second = plan(use_two_stage_pipeline=True, height=1024, width=1536)
    assert (first.height, first.width, first.steps) == (512, 768, 40)
    assert (second.number, second.height, second.width) == (2, 1024, 1536)
    assert second.sigmas.tolist() == pytest.approx(STAGE_2)
    assert second.noise_scale == pytest.approx(STAGE_2[0])
    assert second.video_guidance == second.audio_guidance == NEUTRAL


def test_distilled() -> None:
    first, second = plan(use_two_stage_pipeline=True, use_distilled_pipeline=True, num_inference_steps=30)
    assert first.sigmas.tolist() == pytest.approx(DISTILLED)
    assert first.video_guidance == first.audio_guidance == NEUTRAL
    assert second.sigmas.tolist() == pytest.approx(STAGE_2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, True),
        ({"cfg_scale": 1.0}, False),
        ({"cfg_scale": 2.0}, True),
        ({"use_distilled_pipeline": True}, False),
        ({"video_guidance": FULL}, True),
        ({"video_guidance": NEUTRAL}, False),
        ({"audio_guidance": FULL}, True),
    ],
)
def test_guided(arguments: dict[str, Any], expected: bool) -> None:
    assert guided(GenerateRequest(**arguments).validate()) is expected


def test_the_steps_of_res_2s() -> None:
    first, second = plan(use_two_stage_pipeline=True, sampler="res_2s", num_inference_steps=15, width=1536)
    assert (first.steps, first.evaluations) == (16, 31)
    assert (second.steps, second.evaluations) == (4, 7)
    assert second.levels == pytest.approx([0.909375, 0.725, 0.421875, 0.0011])
    (euler,) = plan(num_inference_steps=15)
    assert euler.steps == euler.evaluations == 15


def test_the_shift_follows_the_first_stage_on_demand() -> None:
    size: dict[str, Any] = {"height": 1088, "width": 1920, "use_two_stage_pipeline": True}
    plain, shifted = plan(**size)[0].sigmas, plan(**size, dynamic_shift=True)[0].sigmas
    assert torch.equal(plain, ltx2_schedule(40))
    assert torch.equal(shifted, ltx2_schedule(40, 16 * 17 * 30))


SOUND: dict[str, Any] = {"retake_audio": "a.wav"}
CLIP: dict[str, Any] = {"retake_video": "a.mp4"}
CFG = GuidanceParams(cfg_scale=3.0)


@pytest.mark.parametrize(
    ("arguments", "video", "audio"),
    [
        (SOUND, CFG, NEUTRAL),
        ({**SOUND, "retake_audio_regions": ((0.0, 1.0),)}, CFG, CFG),
        (CLIP, NEUTRAL, CFG),
        ({**SOUND, "video_guidance": FULL}, FULL, NEUTRAL),
        ({**SOUND, "video_guidance": FULL, "audio_guidance": CFG}, FULL, CFG),
        ({"audio_only": True}, NEUTRAL, CFG),
        ({"audio_only": True, "audio_guidance": FULL}, NEUTRAL, replace(FULL, modality_scale=1.0)),
    ],
)
def test_what_is_kept_needs_no_guidance(
    arguments: dict[str, Any], video: GuidanceParams, audio: GuidanceParams
) -> None:
    (stage,) = plan(**arguments)
    assert (stage.video_guidance, stage.audio_guidance) == (video, audio)


def test_guidance_of_one_modality_leaves_the_other_neutral() -> None:
    (stage,) = plan(audio_guidance=FULL)
    assert stage.audio_guidance == FULL
    assert stage.video_guidance == NEUTRAL


def test_a_scale_is_the_same_as_guidance_of_both(pipe: LTX2AudioVideoPipeline) -> None:
    both = GuidanceParams(cfg_scale=2.5)
    assert same(call(pipe, cfg_scale=2.5), call(pipe, video_guidance=both, audio_guidance=both))


def test_every_kind_of_guidance_changes_the_result(pipe: LTX2AudioVideoPipeline) -> None:
    kinds = [
        NEUTRAL,
        GuidanceParams(cfg_scale=3),
        GuidanceParams(stg_scale=1, stg_blocks=(1,)),
        GuidanceParams(modality_scale=3),
        GuidanceParams(cfg_scale=3, rescale_scale=0.7),
        FULL,
    ]
    results = [call(pipe, video_guidance=kind, audio_guidance=kind) for kind in kinds]
    for index, first in enumerate(results):
        assert not any(same(first, second) for second in results[index + 1 :]), kinds[index]


def test_steps_can_go_without_guidance(pipe: LTX2AudioVideoPipeline) -> None:
    def run(skip: int) -> Any:
        params = GuidanceParams(cfg_scale=3, skip_step=skip)
        return call(pipe, video_guidance=params, audio_guidance=params, num_inference_steps=4)

    assert same(run(0), run(0))
    assert not same(run(0), run(1))
