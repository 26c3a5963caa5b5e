"""What requests need, and the plans of known machines."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.conditioning.items import ConditioningItem, Keyframe, ReferenceClip, apply_items
from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.tokens import video_latent_shape
from diffsynth.errors import MemoryBudgetError, RequestError
from diffsynth.pipelines.demand import demands_for
from diffsynth.pipelines.gpus import GPUS, GpuClass, find_gpu
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.nearest import nearest_fitting, plan_request
from diffsynth.pipelines.sizes import ModelSizes, released_sizes
from diffsynth.pipelines.stages import plan_stages
from diffsynth.pipelines.state import GenerationState
from diffsynth.pipelines.storage import Storage
from diffsynth.pipelines.units import Denoise, EncodePrompts
from diffsynth.pipelines.workload import encoded_clips, video_tokens
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.sampling.conventions import OFFICIAL
from diffsynth.sampling.noise import noise_source
from diffsynth.vram.formats import StorageFormat
from diffsynth.vram.planner import PhaseDemand, fits, plan
from tests.models.ltx2.test_transformer_memory import LiveBytes
from tests.pipelines.tiny import SMALL

MODES: Mapping[str, Mapping[str, Any]] = {
    "one-stage": {},
    "two-stage": {"use_two_stage_pipeline": True},
    "distilled": {"use_two_stage_pipeline": True, "use_distilled_pipeline": True},
}
WEIGHED: Mapping[str, Any] = {
    "in_context_videos": ("a", "b"),
    "in_context_attention_strength": 0.5,
    "use_distilled_pipeline": True,
}
"""Two reference clips that are attended to with a weight."""
SMALL_CARD = {8: find_gpu("RTX 4060"), 6: GpuClass(name="6", vram_gb=6, tflops=20, link_gb_per_s=12.5)}
FOUR = GpuClass(name="4", vram_gb=4, tflops=10, link_gb_per_s=6.2)


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def sizes(request: pytest.FixtureRequest) -> ModelSizes:
    """Released sizes in int8."""
    return released_sizes(request.param, Storage.named("int8"))


@pytest.fixture(scope="module")
def ltx_2() -> ModelSizes:
    return released_sizes("2.0", Storage.named("int8"))


def request(height: int = 512, width: int = 768, num_frames: int = 121, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt="a boat", height=height, width=width, num_frames=num_frames, **more)


def demands(asked: GenerateRequest, sizes: ModelSizes, **how: Any) -> dict[str, PhaseDemand]:
    found = demands_for(asked, sizes.version, storage="", parts=sizes, **how)
    return {demand.name: demand for demand in found}


# -- phases -----------------------------------------------------------------------------------------------


def test_phases_follow_the_units(ltx_2: ModelSizes) -> None:
    assert list(demands(request(), ltx_2)) == [
        *("text", "connectors", "denoise 1", "decode video", "decode audio")
    ]
    everything = request(
        use_two_stage_pipeline=True, input_images=("a.png",), retake_audio="a.wav", input_images_indexes=(0,)
    )
    assert list(demands(everything, ltx_2)) == [
        *("text", "connectors", "encode audio", "encode inputs 1", "denoise 1"),
        *("upsample", "encode inputs 2", "denoise 2", "decode video", "decode audio"),
    ]
    assert list(demands(request(audio_only=True), ltx_2, text=False)) == ["denoise 1", "decode audio"]


def test_parts_that_are_missing_have_no_phase(ltx_2: ModelSizes) -> None:
    kept = {"dit", "video_vae_decoder"}
    fewer = replace(ltx_2, parts={name: part for name, part in ltx_2.parts.items() if name in kept})
    assert list(demands(request(), fewer)) == ["denoise 1", "decode video"]


def test_steps_and_passes_come_from_the_stages(sizes: ModelSizes) -> None:
    guided = demands(request(use_two_stage_pipeline=True), sizes)
    assert guided["denoise 1"].traversals == {"2.0": 40, "2.3": 30}[sizes.version]
    assert guided["denoise 2"].traversals == 3
    distilled = demands(request(use_two_stage_pipeline=True, use_distilled_pipeline=True), sizes)
    assert distilled["denoise 1"].traversals == 8
    once, twice = distilled["denoise 1"].choices[0].flops, guided["denoise 1"].choices[0].flops
    assert twice == 2 * once
    four = GuidanceParams(cfg_scale=3, stg_scale=1, stg_blocks=(28,), modality_scale=3)
    many = demands(request(video_guidance=four), sizes)["denoise 1"]
    plain = demands(request(cfg_scale=1.0), sizes)["denoise 1"]
    assert many.choices[0].flops == 4 * plain.choices[0].flops
    # One after another: every further pass adds its hidden states, 8 KB per token, and an encoded prompt.
    extra = many.choices[0].activation_bytes - plain.choices[0].activation_bytes
    assert 3 * 8192 * 6144 < extra < 3 * 8192 * 6144 + 50e6


def test_only_the_second_stage_of_a_dev_checkpoint_carries_the_distilled_lora(sizes: ModelSizes) -> None:
    dev = demands(request(use_two_stage_pipeline=True), sizes)
    assert {block.companion_bytes for block in dev["denoise 1"].blocks} == {0}
    assert {block.companion_bytes for block in dev["denoise 2"].blocks} == {2 * 77_070_336}
    assert dev["denoise 2"].choices[0].flops > 3 * dev["denoise 1"].choices[0].flops / 2
    both = {"use_two_stage_pipeline": True, "use_distilled_pipeline": True}
    plain = demands(request(**both), sizes)["denoise 2"]
    assert {block.companion_bytes for block in plain.blocks} == {0}
    own = demands(request(**both), sizes, lora=64)
    assert own["denoise 1"].blocks[5].companion_bytes == own["denoise 2"].blocks[5].companion_bytes
    assert own["denoise 1"].blocks[5].companion_bytes * 6 == 2 * 77_070_336
    cleared = demands(request(**both, clear_lora_before_state_two=True), sizes, lora=True)
    assert cleared["denoise 1"].blocks[5].companion_bytes == 2 * 77_070_336
    assert cleared["denoise 2"].blocks[5].companion_bytes == 0


def test_the_projection_travels_with_the_layers_of_the_text_model(ltx_2: ModelSizes) -> None:
    text = demands(request(), ltx_2)["text"]
    assert len(text.blocks) == 48
    assert {block.companion_bytes for block in text.blocks} == {3840 * 3840 * 2}


def test_tokens_are_those_of_the_conditioned_state(ltx_2: ModelSizes) -> None:
    asked = request(
        128,
        192,
        25,
        input_images=("a", "b", "c"),
        input_images_indexes=(0, 8, -1),
        in_context_videos=("clip",),
    )
    grid = video_latent_shape(25, 128, 192)
    state = ModalityState.video((1, 4, *grid), 24.0)
    still = torch.zeros(1, 4, 1, *grid[1:])
    reference = torch.zeros(1, 4, grid[0], grid[1] // 2, grid[2] // 2)
    items: list[ConditioningItem] = [
        Keyframe(latent=still, frame_index=8),
        Keyframe(latent=still, frame_index=24),
        ReferenceClip(latent=reference, downscale_factor=2),
    ]
    (stage,) = plan_stages(asked, "2.0")
    assert video_tokens(asked, stage) == apply_items(state, items).num_tokens


def test_every_way_to_give_something_has_its_tokens(ltx_2: ModelSizes) -> None:
    size, pictures = (128, 192, 25), {"input_images": ("a", "b"), "input_images_indexes": (0, -1)}
    plain, replaced, added = (
        request(*size, **more)  # type: ignore[arg-type]
        for more in ({}, pictures, {**pictures, "input_images_as_keyframes": True})
    )
    tokens = [video_tokens(asked, plan_stages(asked, "2.0")[0]) for asked in (plain, replaced, added)]
    assert tokens == [96, 96 + 24, 96 + 48]
    largest = [demands(asked, ltx_2)["denoise 1"].choices[0] for asked in (plain, replaced, added)]
    assert largest[0].activation_bytes < largest[1].activation_bytes < largest[2].activation_bytes
    full, half = (
        request(*size, in_context_videos=("a",), in_context_downsample_factor=factor) for factor in (1, 2)
    )
    tokens = [video_tokens(asked, plan_stages(asked, "2.0")[0]) for asked in (full, half)]
    assert tokens == [192, 96 + 24]
    sparse = request(*size, in_context_videos=("a",), in_context_temporal_factor=3)
    assert video_tokens(sparse, plan_stages(sparse, "2.0")[0]) == 96 + 2 * 6
    assert encoded_clips(sparse, plan_stages(sparse, "2.0")[0]) == [(9, 64, 96)]
    assert full.reference_factor == 1
    assert request(in_context_videos=("a",)).reference_factor == 2


def test_weighted_references_cost_a_mask_of_all_pairs(sizes: ModelSizes) -> None:
    weighed = demands(request(**WEIGHED), sizes)["denoise 1"].choices[0]
    free = demands(request(**{**WEIGHED, "in_context_attention_strength": 1.0}), sizes)["denoise 1"].choices[
        0
    ]
    tokens = 6144 + 2 * 1536
    assert weighed.activation_bytes - free.activation_bytes == tokens**2 * (4 + 2)
    both = demands(request(1024, 1536, **WEIGHED, use_two_stage_pipeline=True), sizes)
    none = demands(
        request(1024, 1536, use_two_stage_pipeline=True, use_distilled_pipeline=True), sizes, text=False
    )
    assert both["denoise 2"].choices[0].activation_bytes == none["denoise 2"].choices[0].activation_bytes, (
        "references belong to the first stage"
    )


def test_hq_is_counted(sizes: ModelSizes) -> None:
    hq: dict[str, Any] = {"sampler": "res_2s", "stage1_lora_strength": 0.25, "num_inference_steps": 15}
    found = demands(request(1088, 1920, use_two_stage_pipeline=True, **hq), sizes)
    assert found["denoise 1"].traversals == 31
    assert found["denoise 2"].traversals == 7
    assert {block.companion_bytes for block in found["denoise 1"].blocks} == {2 * 77_070_336}
    exact, rough = (
        demands(request(**hq), replace(sizes, has_float64=has))["denoise 1"].choices[0].activation_bytes
        for has in (True, False)
    )
    assert exact - rough == 2 * 4 * 128 * (6144 + 126)


@pytest.mark.parametrize("mode", ["guided", "distilled"])
@pytest.mark.parametrize("size", [(128, 192, 25), (256, 384, 49)])
def test_a_stage_needs_what_is_predicted(
    pipe: LTX2AudioVideoPipeline, mode: str, size: tuple[int, int, int]
) -> None:
    """The whole unit at tiny widths, its sampler included, against bytes counted as it runs."""
    asked = request(*size, seed=1, num_inference_steps=2, use_distilled_pipeline=mode == "distilled")
    stages = plan_stages(asked, "2.0")
    state = GenerationState(
        request=asked,
        inputs=Inputs(),
        conventions=OFFICIAL,
        stages=stages,
        noise=noise_source(OFFICIAL.noise_source, 1, "cpu"),
        audio_shape=pipe._audio_shape(asked),
    )
    storage = Storage.uniform(StorageFormat.F32)
    with torch.inference_mode():
        EncodePrompts().run(pipe.parts, state)
        with LiveBytes() as counter:
            Denoise(stages[0]).run(pipe.parts, state)
    (choice,) = demands_for(asked, "2.0", storage=storage, parts=pipe.parts)[2].choices
    assert choice.activation_bytes == pytest.approx(counter.peak, rel=0.09)


# -- plans of known machines ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("height", [512, 1024])
@pytest.mark.parametrize("vram_gb", [8, 6])
def test_eight_and_six_gb_run_every_mode(sizes: ModelSizes, mode: str, height: int, vram_gb: int) -> None:
    asked = request(height, height * 3 // 2, **MODES[mode])
    card = SMALL_CARD[vram_gb]
    found = plan_request(asked, sizes.version, card.budget(host_gb=32), storage="", parts=sizes)
    assert found.peak_vram_bytes <= {8: 7.2, 6: 5.3}[vram_gb] * 2**30
    assert found.peak_host_bytes <= 32 * 2**30
    # Weights hide behind the arithmetic of these cards.
    assert {found.phase(name).bound for name in ("denoise 1", "decode video")} == {"compute"}


@pytest.mark.parametrize("mode", MODES)
def test_four_gb_run_the_smaller_size(sizes: ModelSizes, mode: str) -> None:
    found = plan_request(
        request(**MODES[mode]), sizes.version, FOUR.budget(host_gb=32), storage="", parts=sizes
    )
    assert found.peak_vram_bytes <= 3.4 * 2**30
    with pytest.raises(MemoryBudgetError, match=r"height=1024, width=1536, num_frames=121: denoise 1 needs"):
        plan_request(request(1024, 1536), sizes.version, FOUR.budget(), storage="", parts=sizes)


@pytest.mark.parametrize(
    ("host_gb", "mode"), [(24, "one-stage"), (16, "one-stage"), (12, "distilled"), (8, "one-stage")]
)
def test_host_memory_is_kept_by_reading_from_the_disk(ltx_2: ModelSizes, host_gb: float, mode: str) -> None:
    budget = find_gpu("4060").budget(host_gb=host_gb)
    found = plan_request(request(**MODES[mode]), "2.0", budget, storage="", parts=ltx_2)
    assert found.peak_host_bytes <= host_gb * 2**30
    denoise = found.phase("denoise 1")
    assert (denoise.disk_bytes_per_traversal > 0) == (host_gb < 18)


@pytest.mark.parametrize(
    ("card", "seconds"),
    [("RTX 3060", (1133, 1376, 356)), ("RTX 4060", (957, 1162, 301)), ("RTX 4090", (175, 212, 55))],
)
def test_seconds_of_denoising_are_those_of_the_published_roofline(
    ltx_2: ModelSizes, card: str, seconds: tuple[int, int, int]
) -> None:
    """One stage at 768x512, two stages and distilled at 1536x1024; the published ones leave the LoRA out."""
    asked = (request(), *(request(1024, 1536, **MODES[mode]) for mode in ("two-stage", "distilled")))
    for each, expected, slack in zip(asked, seconds, (0.02, 0.06, 0.02), strict=True):
        found = plan_request(each, "2.0", find_gpu(card).budget(), storage="", parts=ltx_2)
        denoising = [phase for phase in found.phases if phase.name.startswith("denoise")]
        assert sum(p.traversals * p.compute_s for p in denoising) == pytest.approx(expected, rel=slack)


def test_smaller_tiles_only_where_the_own_ones_do_not_fit(ltx_2: ModelSizes) -> None:
    asked = request(1024, 1536)
    decode = demands(asked, ltx_2)["decode video"]
    own = {"tile_size_in_pixels": 512, "tile_overlap_in_pixels": 128}
    assert own.items() <= decode.choices[0].settings.items()
    flops = [choice.flops for choice in decode.choices]
    assert flops == sorted(flops)
    roomy = plan_request(asked, "2.0", find_gpu("4060").budget(), storage="", parts=ltx_2)
    assert own.items() <= roomy.phase("decode video").settings.items()
    tight = plan_request(
        request(512, 768), "2.0", replace(FOUR, vram_gb=4.2).budget(), storage="", parts=ltx_2
    )
    settings = tight.phase("decode video").settings
    assert settings["tile_size_in_pixels"] == 512
    assert settings["tile_size_in_frames"] == 128
    three = plan([decode], replace(FOUR, vram_gb=3.2).budget()).phase("decode video").settings
    assert three["tile_size_in_pixels"] == 512
    assert three["tile_size_in_frames"] in (96, 64)


# -- properties -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), length=st.integers(0, 20), data=st.data())
def test_a_larger_request_never_needs_less(
    ltx_2: ModelSizes, rows: int, columns: int, length: int, data: st.DataObject
) -> None:
    grown = [data.draw(st.integers(value, value + 4)) for value in (rows, columns, length)]
    mode = data.draw(st.sampled_from(sorted(MODES)))
    small, large = (
        demands(request(64 * h, 64 * w, 8 * f + 1, **MODES[mode]), ltx_2, text=False)
        for h, w, f in ((rows, columns, length), grown)
    )
    for name in ("denoise 1", "denoise 2", "upsample"):
        if name in small:
            before, after = small[name].choices[0], large[name].choices[0]
            assert before.activation_bytes <= after.activation_bytes
            assert before.flops <= after.flops
    budget = find_gpu("4060").budget()
    if fits(list(large.values()), budget):
        assert fits(list(small.values()), budget)


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_what_a_refusal_offers_is_accepted(ltx_2: ModelSizes, mode: str) -> None:
    asked = request(1088 if mode == "one-stage" else 1152, 1920, 481, **MODES[mode])
    budget = SMALL_CARD[6].budget(host_gb=32)
    with pytest.raises(MemoryBudgetError) as refused:
        plan_request(asked, "2.0", budget, storage="", parts=ltx_2)
    assert refused.value.message.startswith(f"height={asked.height}, width=1920, num_frames=481: denoise")
    nearest = nearest_fitting(asked, "2.0", budget, storage="", parts=ltx_2)
    assert nearest is not None
    plan_request(nearest.validate(), "2.0", budget, storage="", parts=ltx_2)
    changed = {n for n in ("height", "width", "num_frames") if getattr(asked, n) != getattr(nearest, n)}
    assert changed
    for name in changed:
        assert f"{name}={getattr(nearest, name)}" in refused.value.hint
    # One step more in the same direction does not fit.
    if changed == {"num_frames"}:
        step = replace(nearest, num_frames=nearest.num_frames + 8)
        with pytest.raises(MemoryBudgetError):
            plan_request(step, "2.0", budget, storage="", parts=ltx_2)


def test_what_fits_is_its_own_nearest(ltx_2: ModelSizes) -> None:
    asked = request()
    assert nearest_fitting(asked, "2.0", find_gpu("4060").budget(), storage="", parts=ltx_2) is asked


def test_untiled_decoding_is_refused_in_favour_of_tiles(ltx_2: ModelSizes) -> None:
    with pytest.raises(MemoryBudgetError, match="tiled=False with height=1024") as refused:
        plan_request(
            request(1024, 1536, tiled=False), "2.0", find_gpu("4060").budget(), storage="", parts=ltx_2
        )
    assert refused.value.hint == "tiled=True"


def test_a_retaken_clip_keeps_its_length_and_pictures_their_frames(ltx_2: ModelSizes) -> None:
    budget = SMALL_CARD[6].budget()
    retaken = request(1088, 1920, 481, retake_video="clip.mp4")
    nearest = nearest_fitting(retaken, "2.0", budget, storage="", parts=ltx_2)
    assert nearest is not None
    assert nearest.num_frames == 481
    pictured = request(1088, 1920, 481, input_images=("a.png",), input_images_indexes=(400,))
    nearest = nearest_fitting(pictured, "2.0", budget, storage="", parts=ltx_2)
    assert nearest is not None
    assert nearest.num_frames > 400


def test_nothing_fits_when_the_weights_do_not(ltx_2: ModelSizes) -> None:
    none = GpuClass(name="1 GB", vram_gb=1.2, tflops=1, link_gb_per_s=1)
    assert nearest_fitting(request(), "2.0", none.budget(), storage="", parts=ltx_2) is None
    with pytest.raises(MemoryBudgetError, match="the storage format of the") as refused:
        plan_request(request(), "2.0", none.budget(), storage="", parts=ltx_2)
    assert "larger limit" in refused.value.hint


def test_a_loaded_pipeline_can_be_asked(loaded_pipe: LTX2AudioVideoPipeline) -> None:
    asked = GenerateRequest(prompt="x", **SMALL)
    found = demands_for(asked, "2.0", storage=Storage.uniform(StorageFormat.F32), parts=loaded_pipe.parts)
    assert [demand.name for demand in found][2] == "denoise 1"
    assert len(found[2].blocks) == loaded_pipe.dit.config.num_layers
    with pytest.raises(RequestError, match="storage='q8'"):
        demands_for(asked, "2.0", storage="q8")


# -- cards ------------------------------------------------------------------------------------------------


def test_usable_memory_of_cards() -> None:
    usable = {gb: replace(FOUR, vram_gb=gb).usable_bytes / 2**30 for gb in (4, 6, 8)}
    assert usable == pytest.approx({4: 3.4, 6: 5.3, 8: 7.2})


def test_cards_are_found_by_name() -> None:
    assert {find_gpu(gpu.name) for gpu in GPUS} == set(GPUS)
    assert find_gpu("rtx4090").name == "RTX 4090 24GB"
    with pytest.raises(RequestError, match="gpu='RTX 9999' is not known") as refused:
        find_gpu("RTX 9999")
    assert "RTX 4060 8GB" in refused.value.hint
    with pytest.raises(RequestError, match="ambiguous"):
        find_gpu("RTX")
    with pytest.raises(RequestError):
        find_gpu("")
