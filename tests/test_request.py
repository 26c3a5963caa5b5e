"""The request: what it refuses and how it says so, and that it survives JSON."""

import json
import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.errors import RequestError
from diffsynth.request import GenerateRequest, GuidanceParams

ONE, TWO = ("a.png",), ("a.png", "b.png")


def refused(**arguments: Any) -> str:
    with pytest.raises(RequestError) as caught:
        GenerateRequest(**arguments).validate()
    assert caught.value.exit_code == 2
    assert caught.value.hint, "no way out"
    return str(caught.value)


@pytest.mark.parametrize("two_stages", [False, True])
@pytest.mark.parametrize("name", ["height", "width"])
@given(size=st.integers(1, 5000))
def test_sizes(name: str, two_stages: bool, size: int) -> None:
    step = 64 if two_stages else 32
    arguments: dict[str, Any] = {name: size, "use_two_stage_pipeline": two_stages}
    if size % step == 0:
        assert getattr(GenerateRequest(**arguments).validate(), name) == size
        return
    message = refused(**arguments)
    assert message.startswith(f"{name}={size} is not a multiple of {step}")
    nearest = [int(number) for number in re.findall(r"\d+", message.split("Try:")[1])]
    below, above = size // step * step, size // step * step + step
    assert nearest == [n for n in (below, above) if n > 0]
    for number in nearest:
        GenerateRequest(**{**arguments, name: number}).validate()


@given(frames=st.integers(1, 3000))
def test_frames(frames: int) -> None:
    if frames % 8 == 1:
        GenerateRequest(num_frames=frames).validate()
        return
    message = refused(num_frames=frames)
    below = (frames - 1) // 8 * 8 + 1
    assert message == f"num_frames={frames} is not 8k+1  Try: {below} or {below + 8}, or fit=True (--fit)"
    assert GenerateRequest(num_frames=frames, fit=True).validate().num_frames == below
    assert below < frames < below + 8


@pytest.mark.parametrize(
    "name",
    [
        *("height", "width", "num_frames", "num_inference_steps", "in_context_downsample_factor"),
        *("frame_rate", "audio_sample_rate", "denoising_strength", "in_context_temporal_factor"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, -64])
def test_zero_and_negative_numbers(name: str, value: int) -> None:
    assert refused(**{name: value}).startswith(f"{name}={value} is")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["frame_rate", "cfg_scale", "denoising_strength"])
def test_numbers_are_finite(name: str, number: float) -> None:
    assert refused(**{name: number}).startswith(f"{name}={number}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_images": ONE, "input_images_indexes": (121,)}, "input_images_indexes holds 121, outside"),
        ({"input_images": ONE, "input_images_indexes": (-122,)}, "input_images_indexes holds -122, outside"),
        ({"input_images": TWO, "input_images_indexes": (0, 0)}, "input_images_indexes=[0, 0] names a frame"),
        (
            {"input_images": TWO, "input_images_indexes": (120, -1)},
            "input_images_indexes=[120, -1] names a frame twice",
        ),
        ({"input_images": TWO}, "input_images_indexes has 1 entries for 2 input_images"),
        (
            {"input_images": ONE, "input_images_indexes": (0, 8)},
            "input_images_indexes has 2 entries for 1 input_images",
        ),
        (
            {"input_images": TWO, "input_images_indexes": (0, 8), "input_images_strength": (1.0,)},
            "input_images_strength has 1 entries for 2 input_images",
        ),
        ({"input_images": ONE, "input_images_strength": 1.5}, "input_images_strength=1.5 is outside 0..1"),
        ({"input_images": ONE, "input_images_strength": -0.1}, "input_images_strength=-0.1 is outside 0..1"),
        ({"input_images": ONE, "input_images_crf": 52}, "input_images_crf=52 is outside 0..51"),
        ({"cfg_scale": 3.0, "use_distilled_pipeline": True}, "a distilled model has its guidance built in"),
        (
            {"video_guidance": GuidanceParams(), "use_distilled_pipeline": True},
            "a distilled model has its guidance built in; video_guidance cannot apply",
        ),
        ({"cfg_scale": 3.0, "audio_guidance": GuidanceParams()}, "cfg_scale and audio_guidance are both"),
        (
            {"video_guidance": GuidanceParams(stg_scale=1.0)},
            "video_guidance.stg_scale=1.0 needs stg_blocks",
        ),
        ({"audio_guidance": GuidanceParams(rescale_scale=2.0)}, "audio_guidance.rescale_scale=2.0 is"),
        ({"video_guidance": GuidanceParams(skip_step=-1)}, "video_guidance: skip_step and stg_blocks count"),
        ({"denoising_strength": 0.5}, "denoising_strength=0.5 needs a video to start from"),
        (
            {"denoising_strength": 0.5, "retake_video": "a.mp4", "num_frames": 25},
            "denoising_strength=0.5 changes nothing in a retake_video that is kept as a whole",
        ),
        ({"denoising_strength": 1.5}, "denoising_strength=1.5 is outside (0, 1]"),
        ({"frame_rate": 1001.0}, "frame_rate=1001.0 is outside (0, 1000]"),
        ({"stage2_spatial_upsample_factor": 1.5}, "stage2_spatial_upsample_factor=1.5 is not supported"),
        ({"seed": 2**63}, f"seed={2**63} does not fit 64 bits"),
        ({"retake_video_regions": ((1.0, 2.0),)}, "retake_video_regions is given without retake_video"),
        (
            {"retake_audio": "a.wav", "retake_audio_regions": ((2.0, 1.0),)},
            "retake_audio_regions: start 2.0 s must lie before end 1.0 s",
        ),
        ({"tile_overlap_in_pixels": 512}, "tile_overlap_in_pixels=512 is not smaller than"),
        ({"height": "512"}, "height='512' is of the wrong type  Try: int"),
        ({"prompt": None}, "prompt=None is of the wrong type"),
        ({"tiled": 1}, "tiled=1 is of the wrong type"),
        ({"seed": True}, "seed=True is of the wrong type"),
        ({"input_images": ONE, "input_images_indexes": (0.5,)}, "input_images_indexes=(0.5,) is of the"),
        ({"video_guidance": GuidanceParams(stg_blocks=(1.5,))}, "video_guidance.stg_blocks=(1.5,) is of"),  # type: ignore[arg-type]
    ],
)
def test_refusals_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    assert refused(**arguments).startswith(message)


def test_the_distilled_refusal_says_both_ways_out() -> None:
    message = refused(cfg_scale=3.0, use_distilled_pipeline=True)
    assert "cfg_scale=3.0" in message
    assert "leave cfg_scale out, or use_distilled_pipeline=False" in message


@pytest.mark.parametrize("scale", [None, 1, 1.0])
def test_no_guidance_agrees_with_a_distilled_model(scale: float | None) -> None:
    GenerateRequest(use_distilled_pipeline=True, cfg_scale=scale).validate()


def test_an_empty_prompt_is_allowed() -> None:
    assert GenerateRequest(prompt="").validate().prompt == ""


def test_the_last_frame() -> None:
    request = GenerateRequest(input_images=TWO, input_images_indexes=(0, -1), num_frames=25).validate()
    assert request.image_frames() == (0, 24)
    assert request.image_strengths() == (1.0, 1.0)


def test_strengths_per_image() -> None:
    request = GenerateRequest(input_images=TWO, input_images_indexes=(0, 8), input_images_strength=(1, 0.25))
    assert request.validate().image_strengths() == (1, 0.25)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(RequestError, match=r"unknown request fields \['hight'\]"):
        GenerateRequest.from_dict({"hight": 512})
    with pytest.raises(RequestError, match=r"unknown video_guidance fields \['cfg'\]"):
        GenerateRequest.from_dict({"video_guidance": {"cfg": 3.0}})


def test_every_field_says_what_it_is() -> None:
    for field in fields(GenerateRequest):
        assert field.metadata["help"], field.name


scales = st.floats(-10, 10)
names = st.text(min_size=1, max_size=20)
guidance = st.none() | st.builds(
    GuidanceParams,
    cfg_scale=scales,
    stg_scale=scales,
    stg_blocks=st.lists(st.integers(0, 47), max_size=3).map(tuple),
    rescale_scale=st.floats(0, 1),
    modality_scale=scales,
    skip_step=st.integers(0, 5),
)
regions = st.lists(st.tuples(st.floats(0, 10), st.floats(10, 20)), max_size=2).map(tuple)
anything = st.builds(
    GenerateRequest,
    prompt=st.text(),
    negative_prompt=st.text(),
    use_two_stage_pipeline=st.booleans(),
    height=st.integers(),
    frame_rate=st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    num_inference_steps=st.none() | st.integers(),
    cfg_scale=st.none() | scales,
    video_guidance=guidance,
    audio_guidance=guidance,
    input_images=st.lists(names, max_size=3).map(tuple),
    input_images_indexes=st.lists(st.integers(), max_size=3).map(tuple),
    input_images_strength=scales | st.lists(scales, max_size=3).map(tuple),
    retake_video=st.none() | names,
    retake_video_regions=regions,
)


@given(request=anything)
def test_round_trip(request: GenerateRequest) -> None:
    assert GenerateRequest.from_dict(request.to_dict()) == request
    assert GenerateRequest.from_dict(json.loads(request.to_json())) == request
    assert "\n" not in request.to_json()


@given(request=anything)
def test_any_request_is_accepted_or_refused_in_words(request: GenerateRequest) -> None:
    try:
        request.validate()
    except RequestError as error:
        assert error.hint
