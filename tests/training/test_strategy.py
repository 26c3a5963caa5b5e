"""Passes of training steps: what the network reads, and the loss by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from diffsynth.conditioning.tokens import audio_positions, patchify, video_positions
from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.training.adapters import ATTENTION_TARGETS, TrainableLora
from diffsynth.training.batches import random_source
from diffsynth.training.checkpointing import checkpointed_blocks
from diffsynth.training.conditions import Condition
from diffsynth.training.samples import Sample
from diffsynth.training.sigmas import SigmaConfig
from diffsynth.training.strategy import Strategy, StrategyConfig, TrainingStream, reference_factors

CPU = torch.device("cpu")
Make = Callable[..., Sample]


def source(name: str) -> torch.Generator:
    return random_source(1, name)


def strategy(*, shared: bool = False, **config: object) -> Strategy:
    stated = StrategyConfig(**config)
    stated.check()
    return Strategy(stated, SigmaConfig().make(), shared_sigma=shared, dtype=torch.float32)


def streams(given: Strategy, samples: list[Sample]) -> tuple[TrainingStream, TrainingStream]:
    video, audio = given.streams(samples, source, CPU)
    assert video is not None
    assert audio is not None
    return video, audio


def test_text_to_both(make_sample: Make) -> None:
    samples = [make_sample(1), make_sample(2, fps=30.0)]
    video, audio = streams(strategy(), samples)
    clean = patchify(torch.cat([s.video for s in samples if s.video is not None]))
    sigma = video.sigma[:, None, None]
    assert video.target is not None
    noise = video.target + clean
    torch.testing.assert_close(video.modality.latent, (1 - sigma) * clean + sigma * noise)
    assert torch.equal(video.modality.timesteps, sigma)
    assert torch.equal(video.modality.positions[1], video_positions((2, 2, 3), 30.0)[0])
    assert torch.equal(audio.modality.positions, audio_positions(5, batch=2))
    assert not torch.equal(video.sigma, audio.sigma)
    assert torch.equal(*(stream.sigma for stream in streams(strategy(shared=True), samples)))


def test_first_frame_is_clean_and_at_zero(make_sample: Make) -> None:
    sample = make_sample(1)
    assert sample.video is not None
    video, _ = streams(strategy(conditions=(Condition(type="first_frame"),)), [sample])
    assert torch.equal(video.modality.latent[:, :6], patchify(sample.video)[:, :6])
    assert video.modality.timesteps[0, :, 0].tolist() == [0.0] * 6 + [float(video.sigma)] * 6


@pytest.mark.parametrize(
    ("conditions", "video_made", "audio_made"),
    [
        ((), range(12), range(5)),
        ((Condition(type="first_frame"),), range(6, 12), range(5)),
        ((Condition(type="prefix"),), range(6, 12), range(5)),
        ((Condition(type="suffix"),), range(6), range(5)),
        ((Condition(type="spatial_crop", crop=(0, 0, 32, 64)),), (2, 3, 4, 5, 8, 9, 10, 11), range(5)),
        ((Condition(type="prefix", modality="audio", count=2),), range(12), range(2, 5)),
        ((Condition(type="suffix", modality="audio", count=3),), range(12), range(2)),
        (
            (Condition(type="first_frame"), Condition(type="suffix", modality="audio", count=1)),
            range(6, 12),
            range(4),
        ),
    ],
    ids=str,
)
def test_loss_by_hand(
    network: LTX2Transformer,
    make_sample: Make,
    conditions: tuple[Condition, ...],
    video_made: Sequence[int],
    audio_made: Sequence[int],
) -> None:
    """Tokens by number: two frames of two rows and three columns, and five audio latents."""
    given = strategy(conditions=conditions)
    video, audio = streams(given, [make_sample(1), make_sample(2)])
    with torch.no_grad():
        loss = given.loss(network, (video, audio))
        predicted = network(video.modality, audio.modality)
    assert video.target is not None
    assert audio.target is not None
    by_hand = ((predicted[0] - video.target)[:, list(video_made)] ** 2).mean(dim=(1, 2))
    by_hand_audio = ((predicted[1] - audio.target)[:, list(audio_made)] ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(loss.total, (by_hand + by_hand_audio).mean())
    assert loss.video is not None
    torch.testing.assert_close(loss.video[0], by_hand)


def test_given_sound_is_clean_and_not_in_the_loss(network: LTX2Transformer, make_sample: Make) -> None:
    sample = make_sample(1)
    assert sample.audio is not None
    given = strategy(audio="given")
    video, audio = streams(given, [sample])
    assert torch.equal(audio.modality.latent, patchify(sample.audio))
    assert float(audio.sigma) == float(audio.modality.timesteps.sum()) == 0
    with torch.no_grad():
        loss = given.loss(network, (video, audio))
    assert loss.audio is None
    assert loss.video is not None
    torch.testing.assert_close(loss.total, loss.video[0][0])


def test_reference_is_clean_in_front_and_not_in_the_loss(network: LTX2Transformer, make_sample: Make) -> None:
    samples = [make_sample(1, reference=True), make_sample(2, reference=True)]
    first = Condition(type="first_frame")
    given = strategy(reference_probability=1.0, conditions=(first,))
    video, audio = streams(given, samples)
    plain, _ = streams(strategy(conditions=(first,)), samples)
    modality = video.modality
    assert samples[0].reference is not None
    assert torch.equal(modality.latent[:1, :2], patchify(samples[0].reference))
    assert torch.equal(modality.latent[:, 2:], plain.modality.latent)
    assert torch.equal(modality.timesteps[:, 2:], plain.modality.timesteps)
    assert not modality.timesteps[:, :2].any()
    cells = [[[0, 1 / 24], [1 / 24, 0.375]], [[0, 64.0]] * 2, [[0, 64.0]] * 2]
    torch.testing.assert_close(modality.positions[0, :, :2], torch.tensor(cells))
    with torch.no_grad():
        loss = given.loss(network, (video, audio))
        predicted = network(modality, audio.modality)[0]
    assert video.target is not None
    assert loss.video is not None
    by_hand = ((predicted - video.target)[:, 2 + 4 :] ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(loss.video[0], by_hand)


def test_sparse_reference_by_hand(make_sample: Make) -> None:
    """Two latent frames for three of a video of 17 frames at 24 per second: the nine frames of the reference
    are the first and every second from the second on, so its second latent frame covers frames 1 to 16."""
    noise = torch.Generator().manual_seed(7)
    sample = replace(
        make_sample(1),
        video=torch.randn(1, 128, 3, 2, 2, generator=noise),
        reference=torch.randn(1, 128, 2, 1, 1, generator=noise),
    )
    video, _ = streams(strategy(reference_probability=1.0), [sample])
    positions = video.modality.positions[0]
    # Bounds in frames of the reference: [0, 1), [1, 9); twice as long, shifted by one frame, clamped at 0.
    cells = [[[0, 1 / 24], [1 / 24, 17 / 24]], [[0, 64.0]] * 2, [[0, 64.0]] * 2]
    torch.testing.assert_close(positions[:, :2], torch.tensor(cells))
    torch.testing.assert_close(positions[0, 1, 1], positions[0, -1, 1])
    assert reference_factors((128, 3, 2, 2), (128, 2, 1, 1)) == (2, 2)
    assert reference_factors((128, 7, 4, 6), (128, 3, 4, 6)) == (1, 3)
    assert reference_factors((128, 1, 4, 6), (128, 1, 2, 3)) == (2, 1)
    for odd in ((128, 3, 2, 2), (128, 1, 2, 2)):
        with pytest.raises(CheckpointError, match="a reference of"):
            reference_factors((128, 4, 2, 2), odd)


def test_reference_of_another_aspect_is_refused(make_sample: Make) -> None:
    wide = replace(make_sample(1), reference=torch.zeros(1, 128, 2, 1, 1))
    with pytest.raises(CheckpointError, match="a reference of"):
        strategy(reference_probability=1.0).streams([wide], source, CPU)


def test_masks_are_given_and_not_in_the_loss(network: LTX2Transformer, make_sample: Make) -> None:
    """Each sample by its own mask, of video and of audio."""
    video_masks = torch.zeros(2, 2, 2, 3, dtype=torch.bool)
    video_masks[0, 1, 0], video_masks[1, :, 1, 2] = True, True
    audio_masks = torch.tensor([[True, False, False, True, False], [False] * 4 + [True]])
    samples = [
        replace(make_sample(n + 1), video_mask=video_masks[n : n + 1], audio_mask=audio_masks[n : n + 1])
        for n in range(2)
    ]
    conditions = tuple(Condition(type="mask", modality=name) for name in ("video", "audio"))
    given = strategy(conditions=conditions)
    made = streams(given, samples)
    with torch.no_grad():
        loss = given.loss(network, made)
        predicted = network(made[0].modality, made[1].modality)
    expected = []
    for stream, velocity, masks, name in zip(
        made, predicted, (video_masks.flatten(1), audio_masks), ("video", "audio"), strict=True
    ):
        assert stream.target is not None
        clean = patchify(torch.cat([getattr(sample, name) for sample in samples]))
        assert torch.equal(stream.modality.latent[masks], clean[masks])
        assert torch.equal(stream.modality.timesteps[..., 0], ~masks * stream.sigma[:, None])
        errors = ((velocity - stream.target) ** 2).mean(dim=2)
        expected.append(torch.stack([row[~mask].mean() for row, mask in zip(errors, masks, strict=True)]))
    torch.testing.assert_close(loss.total, (expected[0] + expected[1]).mean())
    with pytest.raises(CheckpointError, match="no mask of the video"):
        streams(given, [make_sample(1)])


def test_reference_sound_is_clean_in_front_and_not_in_the_loss(
    network: LTX2Transformer, make_sample: Make
) -> None:
    """With a reference clip at the same time; three latents that begin with the clip."""
    voices = torch.randn(2, 8, 3, 16, generator=torch.Generator().manual_seed(5))
    samples = [
        replace(make_sample(n + 1, reference=True), audio_reference=voices[n : n + 1]) for n in range(2)
    ]
    last = Condition(type="suffix", modality="audio", count=2)
    given = strategy(audio_reference_probability=1.0, reference_probability=1.0, conditions=(last,))
    video, audio = streams(given, samples)
    _, plain = streams(strategy(conditions=(last,)), samples)
    modality = audio.modality
    assert video.modality.latent.shape[1] == 2 + 8
    assert torch.equal(modality.latent[:, :3], patchify(voices))
    assert torch.equal(modality.latent[:, 3:], plain.modality.latent)
    assert torch.equal(modality.timesteps[:, 3:], plain.modality.timesteps)
    assert not modality.timesteps[:, :3].any()
    assert torch.equal(modality.positions[:, :, :3], modality.positions[:, :, 3:6])
    with torch.no_grad():
        loss = given.loss(network, (video, audio))
        predicted = network(video.modality, modality)[1]
    assert audio.target is not None
    assert loss.audio is not None
    by_hand = ((predicted - audio.target)[:, 3 : 3 + 3] ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(loss.audio[0], by_hand)


@pytest.mark.parametrize("absent", ["video", "audio"])
def test_one_modality_alone(network: LTX2Transformer, make_sample: Make, absent: str) -> None:
    given = strategy(**{absent: "none"})
    video, audio = given.streams([make_sample(1)], source, CPU)
    assert (video if absent == "video" else audio) is None
    with torch.no_grad():
        loss = given.loss(network, (video, audio))
    assert (loss.video if absent == "video" else loss.audio) is None
    assert float(loss.total) > 0


@pytest.mark.parametrize(
    "config",
    [
        {"video": "made"},
        {"video": "given", "audio": "none"},
        {"video": "given", "reference_probability": 1.0},
        {"audio": "given", "audio_reference_probability": 1.0},
        {"video": "none", "conditions": (Condition(type="first_frame"),)},
        {"audio": "given", "conditions": (Condition(type="prefix", modality="audio"),)},
    ],
)
def test_impossible(config: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        strategy(**config)


def test_missing_sound_is_said(make_sample: Make) -> None:
    sample = make_sample(1)
    silent = Sample(video=sample.video, audio=None, context=sample.context, fps=24.0)
    with pytest.raises(CheckpointError, match="no audio"):
        strategy().streams([silent], source, CPU)


@pytest.mark.parametrize("absent", [None, "audio"])
def test_checkpointing_changes_no_bit(
    network: LTX2Transformer, make_sample: Make, absent: str | None
) -> None:
    adapters = TrainableLora(
        network, ATTENTION_TARGETS, rank=2, alpha=2.0, generator=torch.Generator().manual_seed(0)
    )
    for layer in adapters.layers.values():
        torch.nn.init.normal_(layer.up, std=0.1, generator=torch.Generator().manual_seed(1))
    given = strategy(**({} if absent is None else {absent: "none"}))
    passed = given.streams([make_sample(1)], source, CPU)
    gradients = []
    for enabled in (False, True):
        parameters = adapters.parameters()
        with checkpointed_blocks(network, enabled):
            given.loss(network, passed).total.backward()
        used = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        gradients.append({name: grad.clone() for name, grad in used.items()})
        for parameter in parameters.values():
            parameter.grad = None
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert any(bool(grad.any()) for grad in plain.values())
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all("forward" not in vars(block) for block in network.transformer_blocks)
