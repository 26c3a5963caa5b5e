"""The modes of the family: what each keeps, where it puts what is given, that it leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.conditioning.state import ModalityState
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import Denoised, Progress
from diffsynth.pipelines.stages import plan_stages
from diffsynth.pipelines.state import GenerationState
from diffsynth.pipelines.units import Denoise, EncodePrompts
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.sampling.conventions import OFFICIAL
from diffsynth.sampling.noise import noise_source
from diffsynth.utils.audio import Waveform
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.conftest import hooks
from tests.pipelines.placed import HQ, MODES, asked, given
from tests.pipelines.tiny import PICTURES, call, load, same

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 25, "num_inference_steps": 2}
SAMPLERS: dict[str, dict[str, Any]] = {
    "euler": {},
    "euler with steps left out": {
        name: GuidanceParams(cfg_scale=3, skip_step=1) for name in ("video_guidance", "audio_guidance")
    },
    "res_2s": {"sampler": "res_2s"},
    "gradient_estimation": {"sampler": "gradient_estimation"},
    "ancestral": {"sampler": "ancestral"},
}


class Starts:
    """Keeps how each stage began."""

    def __init__(self) -> None:
        self.by_stage: dict[int, Denoised] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.denoised is not None and progress.done == 0:
            self.by_stage[progress.denoised.stage.number] = progress.denoised


def started(pipe: LTX2AudioVideoPipeline, **arguments: Any) -> tuple[Any, dict[int, Denoised]]:
    """The result of a request with what it names, and how its stages began."""
    request, starts = asked(**arguments), Starts()
    return pipe.generate(request, given(request), starts), starts.by_stage


def video(start: Denoised) -> ModalityState:
    assert start.video is not None
    return start.video


# -- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_stages", [False, True])
def test_a_retake_keeps_every_bit_outside_its_regions(pipe: LTX2AudioVideoPipeline, two_stages: bool) -> None:
    regions: dict[str, Any] = {
        "retake_video": "clip",
        "retake_video_regions": ((0.2, 0.3), (0.9, 1.0)),
        "retake_audio": "sound",
        "retake_audio_regions": ((0.4, 0.6),),
    }
    result, starts = started(pipe, **SIZE, **regions, use_two_stage_pipeline=two_stages)
    start = starts[2 if two_stages else 1]
    for stream, latent in ((start.video, result.video_latent), (start.audio, result.audio_latent)):
        assert stream is not None
        made, kept = stream.mask[..., 0] == 1, stream.mask[..., 0] == 0
        assert made.any()
        assert kept.any()
        assert (made | kept).all()
        final = stream.patchified(latent)
        assert torch.equal(final[kept], stream.clean[kept])
        assert not torch.equal(final[made], stream.clean[made])
    # Latent frames cover [0, 1), [1, 9), [9, 17), [17, 25) / 24 s.
    per_frame = video(start).mask.view(4, -1)
    assert [set(row.tolist()) for row in per_frame] == [{0.0}, {1.0}, {0.0}, {1.0}]


def test_a_clip_that_is_kept_gets_new_sound_only(pipe: LTX2AudioVideoPipeline) -> None:
    result, starts = started(pipe, **MODES["given clip"])
    stream = video(starts[1])
    assert torch.equal(stream.patchified(result.video_latent), stream.clean)
    silent, _ = started(pipe, **MODES["given clip"], audio_guidance=GuidanceParams())
    assert not torch.equal(result.audio_latent, silent.audio_latent)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_sound_that_is_kept_comes_back_sample_for_sample(pipe: LTX2AudioVideoPipeline, channels: int) -> None:
    rate, start_s = 44100, 0.25
    sound = torch.rand(channels, 3 * rate, generator=torch.Generator().manual_seed(1)) - 0.5
    _, audio = call(
        pipe, retake_audio=sound, audio_sample_rate=rate, audio_start_time=start_s, **MODES["two stages"]
    )
    first, count = round(start_s * rate), round(9 / 24 * rate)
    assert audio.sampling_rate == rate
    assert audio.shape == (2, count)
    if channels <= 2:
        assert torch.equal(audio, sound[:, first : first + count].expand(2, -1))


def test_a_short_sound_is_followed_by_silence(pipe: LTX2AudioVideoPipeline) -> None:
    sound = torch.full((2, 2000), 0.5)
    _, audio = call(pipe, retake_audio=sound, audio_sample_rate=24000, audio_max_duration=1000 / 24000)
    assert torch.equal(audio[:, :1000], sound[:, :1000])
    assert not audio[:, 1000:].any()
    assert audio.shape == (2, 9000)


def test_the_sound_of_a_file_is_heard(pipe: LTX2AudioVideoPipeline, tmp_path: Path) -> None:
    rate = 24000
    tone = torch.sin(torch.arange(rate) * 0.1).expand(2, -1) * 0.5
    file = write_video_audio_ltx2(list(call(pipe)[0]), tone, tmp_path / "clip.mp4", 24, rate)
    heard, plain = call(pipe, retake_audio=file), call(pipe)
    assert heard[1].shape == (2, 9000)
    assert not same(heard, (plain[0], heard[1])), "the pictures follow the sound"


# -- where it is put --------------------------------------------------------------------------------------


def test_a_keyframe_at_minus_one_sits_at_the_last_frame(pipe: LTX2AudioVideoPipeline) -> None:
    pictures: dict[str, Any] = {"input_images": PICTURES, "input_images_indexes": (0, -1)}
    for as_keyframes, frames in ((False, [24]), (True, [0, 24])):
        starts = Starts()
        call(pipe, **SIZE, **pictures, input_images_as_keyframes=as_keyframes, on_progress=starts)
        stream = video(starts.by_stage[1])
        added = stream.positions[0, 0, stream.target_tokens :].view(len(frames), -1, 2)
        for row, frame in zip(added, frames, strict=True):
            assert row.unique(dim=0).tolist() == [pytest.approx([frame / 24, (frame + 1) / 24])]
        replaced = stream.mask[0, :4].unique().tolist()
        assert replaced == [1.0] if as_keyframes else replaced == [0.0]


def test_reference_clips_are_there_in_the_first_stage_only(pipe: LTX2AudioVideoPipeline) -> None:
    _, starts = started(pipe, **MODES["reference clips"])
    first, second = video(starts[1]), video(starts[2])
    assert first.num_tokens == 3 * first.target_tokens
    assert first.mask[0, first.target_tokens :].unique().tolist() == pytest.approx([0.0, 0.2])
    assert first.attention is not None
    assert first.attention.unique().tolist() == pytest.approx([0.0, 0.6, 1.0])
    assert second.num_tokens == second.target_tokens
    assert second.attention is None


def test_a_white_mask_is_no_mask_and_a_black_half_is_one(pipe: LTX2AudioVideoPipeline) -> None:
    arguments = {**MODES["reference clips"], "in_context_videos": ("clip",), "in_context_strength": 1.0}
    plain, _ = started(pipe, **arguments)
    request = asked(**arguments, in_context_attention_mask="mask")
    objects = given(asked(**arguments))
    results = []
    for black_columns in (0, 50):
        mask = torch.full((9, 100, 100, 3), 255, dtype=torch.uint8)
        mask[:, :, :black_columns] = 0
        inputs = Inputs(in_context_videos=objects.in_context_videos, in_context_attention_mask=mask)
        results.append(pipe.generate(request, inputs).video_latent)
    assert torch.equal(results[0], plain.video_latent)
    assert not torch.equal(results[1], plain.video_latent)


# -- samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stage_that_is_taken_up_again_ends_in_the_same_bits(
    pipe: LTX2AudioVideoPipeline, sampler: str
) -> None:
    """As after a device that ran out of memory: the unit runs again from the last finished step."""
    request = asked(height=64, width=64, num_inference_steps=3, **SAMPLERS[sampler])
    (stage,) = plan_stages(request, "2.0")

    def state(on_progress: Callable[[Progress], None]) -> GenerationState:
        return GenerationState(
            request=request,
            inputs=Inputs(),
            conventions=OFFICIAL,
            stages=(stage,),
            noise=noise_source(OFFICIAL.noise_source, 1, "cpu"),
            audio_shape=pipe._audio_shape(request),
            on_progress=on_progress,
        )

    def stop(progress: Progress) -> None:
        if progress.denoised is not None and progress.done in {1, 2}.difference(stopped):
            stopped.append(progress.done)
            raise InterruptedError

    stopped: list[int] = []
    unbroken, broken = state(lambda _: None), state(stop)
    prompts = EncodePrompts()
    with torch.inference_mode():
        for each in (unbroken, broken):
            prompts.run(pipe.parts, each)
        Denoise(stage).run(pipe.parts, unbroken)
        for _ in range(2):
            with pytest.raises(InterruptedError):
                Denoise(stage).run(pipe.parts, broken)
        Denoise(stage).run(pipe.parts, broken)
    assert stopped == [1, 2]
    for name in ("video_latent", "audio_latent"):
        assert torch.equal(getattr(unbroken, name), getattr(broken, name))


def test_samplers_differ_and_nothing_renewed_is_euler(pipe: LTX2AudioVideoPipeline) -> None:
    def run(**arguments: Any) -> Any:
        return call(pipe, **{**arguments, "num_inference_steps": 3})

    results = [run(**SAMPLERS[name]) for name in ("euler", "res_2s", "gradient_estimation", "ancestral")]
    for index, first in enumerate(results):
        assert not any(same(first, second) for second in results[index + 1 :])
    still = pipe.generate(asked(sampler="ancestral", ancestral_eta=0.0)).video_latent
    plain = pipe.generate(asked()).video_latent
    assert still is not None
    assert plain is not None
    torch.testing.assert_close(still, plain, atol=1e-5, rtol=1e-5)


def test_every_way_to_use_the_negative_prompt_differs(pipe: LTX2AudioVideoPipeline) -> None:
    kinds = [
        GuidanceParams(cfg_scale=3),
        GuidanceParams(cfg_scale=3, cfg_kind="cfg_star"),
        GuidanceParams(cfg_scale=3, cfg_kind="apg", apg_eta=0.0),
        GuidanceParams(cfg_scale=3, cfg_kind="apg", apg_eta=0.5, apg_norm_threshold=1.0),
    ]
    results = [call(pipe, video_guidance=kind, audio_guidance=kind) for kind in kinds]
    for index, first in enumerate(results):
        assert not any(same(first, second) for second in results[index + 1 :]), kinds[index]


# -- LoRAs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [{}, HQ, {"stage2_lora_strength": 0.3}])
def test_one_stage_after_two_is_one_stage(pipe: LTX2AudioVideoPipeline, stages: dict[str, Any]) -> None:
    fresh = call(load())
    two_stages = call(pipe, use_two_stage_pipeline=True, **stages)
    assert not hooks(pipe)
    assert same(call(pipe), fresh)
    assert not same(two_stages, fresh)


def test_the_distilled_lora_in_either_stage_counts_and_is_recorded(pipe: LTX2AudioVideoPipeline) -> None:
    def run(**arguments: Any) -> Any:
        return call(pipe, use_two_stage_pipeline=True, **arguments)

    plain, loras = run(), {}
    for name in ("stage1_lora_strength", "stage2_lora_strength"):
        changed = run(**{name: 0.4})
        assert not same(changed, plain)
        loras |= {key: value for key, value in changed[0].record["loras"].items() if value == 0.4}
    assert [key[-9:] for key in loras] == ["(stage 1)", "(stage 2)"]
    assert same(run(stage2_lora_strength=0.8), plain), "the one it was loaded with"


def test_a_request_is_recorded_as_it_ran(pipe: LTX2AudioVideoPipeline) -> None:
    frames, _ = call(pipe, height=70, width=100, num_frames=13, fit=True)
    assert len(frames) == 9
    assert frames[0].size == (96, 64)
    request = GenerateRequest.from_dict(frames.record["request"])
    assert (request.height, request.width, request.num_frames) == (64, 96, 9)
    assert request.validate() == request


def test_sound_alone_is_not_isolated_from_pictures(pipe: LTX2AudioVideoPipeline) -> None:
    plain, more = (
        call(pipe, audio_only=True, audio_guidance=GuidanceParams(cfg_scale=3, modality_scale=scale))
        for scale in (1.0, 3.0)
    )
    assert torch.equal(plain[1], more[1])


def test_a_waveform_keeps_its_rate(pipe: LTX2AudioVideoPipeline) -> None:
    _, audio = call(pipe, retake_audio=Waveform(torch.full((1, 9000), 0.25), 11025), audio_sample_rate=48000)
    assert audio.sampling_rate == 11025
    assert audio.shape[1] == round(9 / 24 * 11025)
