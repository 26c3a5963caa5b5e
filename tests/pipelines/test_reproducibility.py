"""One seed means one video: bit by bit, whatever ran before, and wherever it runs."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.errors import RequestError
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import Denoised
from diffsynth.request import GenerateRequest
from tests.conftest import fingerprint, hooks
from tests.pipelines.tiny import LORA, PICTURES, Log, call, load, same, tensors
from tests.standin import StandIn

TWO_STAGES: dict[str, Any] = {"use_two_stage_pipeline": True}
DISTILLED: dict[str, Any] = {
    "use_two_stage_pipeline": True,
    "use_distilled_pipeline": True,
    "num_inference_steps": None,
}


@pytest.mark.parametrize(
    ("arguments", "conventions"),
    [
        ({}, "official"),
        (TWO_STAGES, "official"),
        (DISTILLED, "official"),
        (TWO_STAGES, "official-1.0"),
        (TWO_STAGES, "diffsynth"),
    ],
)
def test_same_seed_same_bits(
    pipe: LTX2AudioVideoPipeline, arguments: dict[str, Any], conventions: str
) -> None:
    given = {**arguments, "conventions": conventions, "input_images": PICTURES[:1]}
    first = call(pipe, **given)
    assert same(first, call(pipe, **given))
    assert not same(first, call(pipe, **given, seed=44))


def test_same_seed_same_latents(pipe: LTX2AudioVideoPipeline) -> None:
    request = GenerateRequest(prompt="a boat", height=64, width=64, num_frames=9, seed=7)
    first, second = pipe.generate(request), pipe.generate(request)
    for name in ("video_latent", "audio_latent"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_a_drawn_seed_is_recorded(pipe: LTX2AudioVideoPipeline) -> None:
    first = call(pipe, seed=None)
    seed = first[0].record["request"]["seed"]
    assert isinstance(seed, int)
    assert same(first, call(pipe, seed=seed))
    other = call(pipe, seed=None)
    assert other[0].record["request"]["seed"] != seed
    assert not same(first, other)


def test_the_global_generator_has_no_part_in_it(pipe: LTX2AudioVideoPipeline) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = call(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(first, call(pipe))


def test_global_settings_stay(pipe: LTX2AudioVideoPipeline) -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.backends.cudnn.benchmark,
        )

    before = settings()
    call(pipe)
    assert settings() == before


def test_no_call_leaves_traces_in_the_next(pipe: LTX2AudioVideoPipeline) -> None:
    fresh = call(load())
    assert same(fresh, call(pipe))
    weights = fingerprint(pipe)
    call(pipe, **TWO_STAGES, input_images=PICTURES[:1])
    assert hooks(pipe) == []
    assert fingerprint(pipe) == weights
    assert same(fresh, call(pipe))
    call(pipe, **DISTILLED)
    assert hooks(pipe) == []
    assert same(fresh, call(pipe))


def test_two_stages_twice(pipe: LTX2AudioVideoPipeline) -> None:
    assert same(call(pipe, **TWO_STAGES), call(pipe, **TWO_STAGES))


def test_a_lora_comes_and_goes(pipe: LTX2AudioVideoPipeline) -> None:
    plain = call(pipe)
    pipe.load_lora(pipe.dit, LORA, alpha=1.0)
    strong = call(pipe)
    assert not same(plain, strong)
    assert strong[0].record["loras"] == {LORA.name: 1.0}
    pipe.clear_lora()
    assert hooks(pipe) == []
    assert same(plain, call(pipe))


def test_the_users_lora_outlives_two_stages(pipe: LTX2AudioVideoPipeline) -> None:
    pipe.load_lora(pipe.dit, LORA, alpha=0.5)
    before = call(pipe)
    two = call(pipe, **TWO_STAGES)
    alone = call(pipe, **TWO_STAGES, clear_lora_before_state_two=True)
    assert not same(two, alone)
    assert same(before, call(pipe))
    assert two[0].record["loras"] == {LORA.name: 0.5, f"{LORA.name} (stage 2)": 0.8}
    pipe.clear_lora()


def test_two_pipelines_do_not_disturb_each_other(tmp_path: Path) -> None:
    other_lora = tmp_path / "other.safetensors"
    save_file({key: tensor.flip(0).contiguous() for key, tensor in tensors(LORA).items()}, other_lora)
    files = (LORA, other_lora)
    alone = []
    for file in files:
        single = load(stage2_lora=file)
        single.load_lora(single.dit, file)
        alone.append((call(single), call(single, **TWO_STAGES)))
    assert not same(alone[0][0], alone[1][0])
    assert not same(alone[0][1], alone[1][1])
    first, second = (load(stage2_lora=file) for file in files)
    first.load_lora(first.dit, files[0])
    second.load_lora(second.dit, files[1])
    results: list[Any] = []
    # The second runs whole in the middle of the first.
    first_log = Log()

    def between(progress: Any) -> None:
        first_log(progress)
        if progress.phase == "denoise stage 2" and progress.done == 1:
            results.append((call(second), call(second, **TWO_STAGES)))

    inside = call(first, **TWO_STAGES, on_progress=between)
    assert same(inside, alone[0][1])
    assert same(call(first), alone[0][0])
    for found, expected in zip(results[0], alone[1], strict=True):
        assert same(found, expected)


def initial(log: Log) -> Denoised:
    """The noisy states before the first step."""
    return next(event.denoised for event in log.events if event.denoised is not None)


@pytest.mark.parametrize("conventions", ["official", "diffsynth"])
def test_noise_does_not_depend_on_the_dtype(pipe: LTX2AudioVideoPipeline, conventions: str) -> None:
    wide, narrow = Log(), Log()
    call(pipe, conventions=conventions, on_progress=wide)
    call(load(dtype=torch.bfloat16), conventions=conventions, on_progress=narrow)
    for name in ("video", "audio"):
        first, second = (getattr(initial(log), name).latent for log in (wide, narrow))
        assert first.dtype == second.dtype == torch.float32
        assert torch.equal(first, second)


@pytest.mark.parametrize("arguments", [{}, TWO_STAGES], ids=["one stage", "two stages"])
def test_another_device_gives_the_same_bits(pipe: LTX2AudioVideoPipeline, arguments: dict[str, Any]) -> None:
    """On a device of its own without float64, which computes as the CPU does: only placement can differ."""
    given, here, there = {**arguments, "input_images": PICTURES[:1]}, Log(), Log()
    expected = call(pipe, **given, on_progress=here)
    with StandIn() as device:
        moved = load(device="standin")
        assert moved.dit.patchify_proj.weight.device == device.torch_device
        result = call(moved, **given, on_progress=there)
        for name in ("video", "audio"):
            noise = getattr(initial(there), name).latent
            assert noise.device == device.torch_device
            assert torch.equal(noise.cpu(), getattr(initial(here), name).latent)
        assert same(result, expected)
        # Memory of the device must be gone before the device is.
        del moved, noise, there, result
        gc.collect()


def test_rand_device_must_exist(pipe: LTX2AudioVideoPipeline, untouched: None) -> None:
    with pytest.raises(RequestError, match="rand_device='moon' is not a device"):
        call(pipe, rand_device="moon")


def test_loras_given_at_loading_are_those_of_load_lora(pipe: LTX2AudioVideoPipeline) -> None:
    pipe.load_lora(pipe.dit, LORA, alpha=0.5)
    expected = call(pipe)
    pipe.clear_lora()
    given = load(loras=[(LORA, 0.5)])
    assert same(call(given), expected)
    given.clear_lora()
    assert same(call(given), call(pipe))
