from dataclasses import replace

import pytest
import torch

from diffsynth.conditioning.items import (
    AttentionWeighted,
    ConditioningItem,
    FreeMask,
    Frozen,
    Keyframe,
    LatentAtIndex,
    ReferenceAudio,
    ReferenceClip,
    TemporalRegion,
    apply_items,
    token_weights,
)
from diffsynth.conditioning.state import ModalityState
from diffsynth.conditioning.tokens import patchify
from diffsynth.errors import RequestError
from diffsynth.sampling.conventions import DIFFSYNTH, OFFICIAL, OFFICIAL_1_0, RegionEdges

VIDEO = (1, 8, 3, 2, 4)
AUDIO = (1, 4, 10, 4)
FRAME = (1, 8, 1, 2, 4)


def video() -> ModalityState:
    return ModalityState.video(VIDEO, 24.0, latent=torch.randn(VIDEO))


def audio() -> ModalityState:
    return ModalityState.audio(AUDIO, latent=torch.randn(AUDIO))


def test_a_first_frame_replaces_clean_tokens_and_mask() -> None:
    state, image = video(), torch.randn(FRAME)
    result = LatentAtIndex(latent=image, strength=0.75).apply(state)
    assert torch.equal(result.clean[:, :8], patchify(image))
    assert torch.equal(result.clean[:, 8:], state.clean[:, 8:])
    assert (result.mask[:, :8] == 0.25).all()
    assert (result.mask[:, 8:] == 1).all()
    assert result.latent is state.latent
    assert (state.mask == 1).all()


def test_the_older_rule_writes_the_initial_latent_too() -> None:
    state, image = video(), torch.randn(FRAME)
    result = LatentAtIndex(latent=image, latent_index=2).apply(state, OFFICIAL_1_0)
    assert torch.equal(result.latent[:, 16:], patchify(image))
    assert torch.equal(result.latent[:, :16], state.latent[:, :16])


def test_a_keyframe_is_appended_and_replaces_nothing() -> None:
    state, image = video(), torch.randn(FRAME)
    result = Keyframe(latent=image, frame_index=16, strength=0.8).apply(state)
    assert result.num_tokens == state.num_tokens + 8
    assert torch.equal(result.clean[:, 24:], patchify(image))
    assert (result.latent[:, 24:] == 0).all()
    assert result.mask[0, 24:, 0].tolist() == pytest.approx([0.2] * 8)
    assert torch.equal(result.mask[:, :24], state.mask)
    assert (result.positions[0, 0, 24] * 24).tolist() == pytest.approx([16, 17])
    older = Keyframe(latent=image, frame_index=16, strength=0.8).apply(state, OFFICIAL_1_0)
    assert torch.equal(older.latent[:, 24:], patchify(image))
    assert (older.positions[0, 0, 24] * 24).tolist() == pytest.approx([16, 24])


def test_a_clip_as_keyframe_covers_eight_frames_per_latent() -> None:
    clip = Keyframe(latent=torch.randn(1, 8, 2, 2, 4), frame_index=8, num_pixel_frames=16)
    positions = clip.apply(video(), OFFICIAL).positions
    assert (positions[0, 0, -1] * 24).tolist() == pytest.approx([16, 24])


def test_diffsynth_keeps_keyframes_whatever_their_strength() -> None:
    item = Keyframe(latent=torch.randn(FRAME), frame_index=8, strength=0.3)
    assert (item.apply(video(), DIFFSYNTH).mask[:, 24:] == 0).all()


def test_references_span_the_target() -> None:
    state = ModalityState.video((1, 8, 3, 4, 4), 24.0)
    result = ReferenceClip(latent=torch.randn(1, 8, 3, 2, 2), downscale_factor=2, strength=0.9).apply(state)
    assert result.num_tokens == 48 + 12
    assert result.positions[0, 1:, 48:].max() == 128
    assert result.mask[0, 48:, 0].tolist() == pytest.approx([0.1] * 12)


def test_weighted_and_plain_items_in_one_attention_mask() -> None:
    reference = ReferenceClip(latent=torch.randn(1, 8, 1, 1, 2), downscale_factor=2)
    keyframe = Keyframe(latent=torch.randn(FRAME), frame_index=8)
    weight = torch.tensor([[0.25, 0.75]])
    result = apply_items(
        video(), [keyframe, AttentionWeighted(item=reference, weight=weight), keyframe], OFFICIAL
    )
    assert result.attention is not None
    attention = result.attention[0]
    first, middle, last = slice(24, 32), slice(32, 34), slice(34, 42)
    assert attention.shape == (42, 42)
    assert (attention[:32, :32] == 1).all()
    assert torch.equal(attention[5, middle], weight[0])
    assert torch.equal(attention[middle, 5], weight[0])
    assert (attention[first, middle] == 0).all()
    assert (attention[middle, first] == 0).all()
    assert (attention[:24, last] == 1).all()
    assert (attention[24:34, last] == 0).all()
    assert (attention[last, 24:34] == 0).all()


def test_items_without_weights_make_no_attention_mask() -> None:
    assert Keyframe(latent=torch.randn(FRAME), frame_index=8).apply(video()).attention is None


def test_regions_are_united_and_overwrite_the_mask() -> None:
    state = Keyframe(latent=torch.randn(FRAME), frame_index=0).apply(video())
    result = TemporalRegion(regions=((0.0, 0.02), (0.5, 0.6))).apply(state)
    frames = result.mask[0, :24, 0].reshape(3, 8)
    assert frames[:, 0].tolist() == [1, 0, 1]
    assert (result.mask[:, 24:] == 0).all()
    assert (TemporalRegion(regions=()).apply(state).mask[:, :24] == 0).all()


def test_a_touching_border_counts_only_where_edges_are_closed() -> None:
    region = TemporalRegion(regions=((1 / 24, 9 / 24),))
    strict = region.apply(video()).mask[0, ::8, 0].tolist()
    closed = (
        region.apply(video(), replace(OFFICIAL, region_edges=RegionEdges.CLOSED)).mask[0, ::8, 0].tolist()
    )
    assert strict == [0, 1, 0]
    assert closed == [1, 1, 1]


def test_regions_in_audio() -> None:
    mask = TemporalRegion(regions=((0.2, 0.3),)).apply(audio()).mask[0, :, 0].tolist()
    assert mask == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]


def test_a_free_mask_mixes_by_its_own_weights() -> None:
    state, given = video(), torch.randn(VIDEO)
    keep = torch.zeros(1, 3, 2, 4)
    keep[:, 1], keep[:, 2, 0, 0] = 1.0, 0.5
    result = FreeMask(latent=given, keep=keep, strength=0.9).apply(state)
    assert torch.equal(result.clean[:, 8:16], patchify(given)[:, 8:16])
    assert torch.equal(result.clean[:, :8], state.clean[:, :8])
    torch.testing.assert_close(result.clean[:, 16], (state.clean[:, 16] + patchify(given)[:, 16]) / 2)
    assert result.mask[0, [0, 8, 16], 0].tolist() == pytest.approx([1.0, 0.1, 0.55])


def test_a_reference_voice_lies_before_the_beginning() -> None:
    result = ReferenceAudio(latent=torch.randn(1, 4, 5, 4)).apply(audio())
    assert result.num_tokens == 15
    assert (result.positions[:, :, 10:] < 0).all()
    assert (result.mask[:, 10:] == 0).all()


def test_aligned_reference_sound_has_the_times_of_the_target() -> None:
    result = ReferenceAudio(latent=torch.randn(1, 4, 5, 4), aligned=True).apply(audio())
    assert torch.equal(result.positions[:, :, 10:], result.positions[:, :, :5])


def test_token_weights_average_areas_and_groups_of_frames() -> None:
    clip = torch.zeros(1, 1, 17, 4, 4)
    clip[:, :, 0] = 1.0
    clip[:, :, 1:5, :, :2] = 1.0
    weights = token_weights(clip, (3, 2, 2), strength=0.5).reshape(3, 2, 2)
    assert (weights[0] == 0.5).all()
    assert torch.equal(weights[1], torch.tensor([[0.25, 0.0], [0.25, 0.0]]))
    assert (weights[2] == 0).all()


@pytest.mark.parametrize("grid", [(4, 2, 2), (1, 2, 2), (2, 2, 2)])
def test_a_mask_clip_must_divide_into_the_latent_frames(grid: tuple[int, int, int]) -> None:
    frames = {4: 9, 1: 9, 2: 1}[grid[0]]
    with pytest.raises(RequestError, match="does not divide"):
        token_weights(torch.zeros(1, 1, frames, 4, 4), grid)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (LatentAtIndex(latent=torch.zeros(1, 8, 1, 3, 4)), r"\(1, 8, 1, 3, 4\).*\(1, 8, 3, 2, 4\)"),
        (LatentAtIndex(latent=torch.zeros(FRAME), latent_index=3), "do not fit into 3"),
        (LatentAtIndex(latent=torch.zeros(1, 8, 2, 2, 4), latent_index=-1), "latent frame -1"),
        (LatentAtIndex(latent=torch.zeros(FRAME), strength=1.5), "strength=1.5"),
        (Keyframe(latent=torch.zeros(1, 4, 1, 2, 4), frame_index=8), r"\(1, 4, 1, 2, 4\)"),
        (Keyframe(latent=torch.zeros(FRAME), frame_index=-1), "frame -1"),
        (ReferenceClip(latent=torch.zeros(1, 8, 3, 2, 2), downscale_factor=2), "downscale factor 2"),
        (
            FreeMask(latent=torch.zeros(VIDEO), keep=torch.zeros(1, 3, 2, 2)),
            r"\(1, 3, 2, 2\).*\(1, 3, 2, 4\)",
        ),
        (ReferenceAudio(latent=torch.zeros(1, 4, 5, 4)), r"\(1, 4, 5, 4\)"),
        (
            AttentionWeighted(
                item=Keyframe(latent=torch.zeros(FRAME), frame_index=8), weight=torch.zeros(1, 3)
            ),
            r"\(1, 3\) for 8 tokens",
        ),
    ],
)
def test_what_does_not_fit_a_video_is_refused_with_both_shapes(item: ConditioningItem, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        item.apply(video())


def test_video_items_do_not_go_into_audio() -> None:
    for item in (
        LatentAtIndex(latent=torch.zeros(FRAME)),
        Keyframe(latent=torch.zeros(FRAME), frame_index=0),
    ):
        with pytest.raises(RequestError, match="does not fit the target"):
            item.apply(audio())


def test_freezing_keeps_every_token() -> None:
    state = audio()
    frozen = Frozen().apply(state)
    assert (frozen.mask == 0).all()
    assert torch.equal(frozen.clean, state.clean)


def test_no_item_looks_at_the_data() -> None:
    """On the meta device a wait for a value, or a tensor left on the CPU, is an error."""
    with torch.device("meta"):
        frame, clip = torch.zeros(FRAME), torch.zeros(VIDEO)
    reference = AttentionWeighted(item=ReferenceClip(latent=clip), weight=0.5)
    state = apply_items(
        ModalityState.video(VIDEO, 24.0, device="meta"),
        [
            LatentAtIndex(latent=frame),
            TemporalRegion(regions=((0.0, 0.2),)),
            FreeMask(latent=clip, keep=clip[:, 0]),
            Keyframe(latent=frame, frame_index=8),
            reference,
        ],
    )
    sound = ModalityState.audio(AUDIO, device="meta")
    sound = Frozen().apply(ReferenceAudio(latent=torch.zeros(AUDIO, device="meta")).apply(sound))
    for each in (state, sound, state.cleared()):
        tensors = (each.latent, each.clean, each.mask, each.positions, each.timesteps(0.5))
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert state.attention is not None
    assert state.attention.device.type == "meta"
