from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.streams import Skips, attention_bias, context_bias
from diffsynth.models.ltx2.transformer import (
    CrossTimestep,
    LTX2Transformer,
    Modality,
    Pass,
    PassState,
    Perturbation,
    Perturbations,
    SkipKind,
)
from tests.models.ltx2.tiny import TOKENS, VARIANTS, tiny_modality, tiny_network, tiny_pair

STG = (Perturbation(SkipKind.VIDEO_SELF_ATTN, (1,)), Perturbation(SkipKind.AUDIO_SELF_ATTN, (1,)))
ISOLATED = (Perturbation(SkipKind.A2V_CROSS_ATTN), Perturbation(SkipKind.V2A_CROSS_ATTN))


class Calls:
    """Counts the calls of a module, and keeps what it was given last."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        self.args: tuple[Any, ...] = ()
        module.register_forward_pre_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.count += 1
        self.args = args


def close_tensors(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=2e-5)


def both(velocities: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
    video, audio = velocities
    assert video is not None
    assert audio is not None
    return video, audio


def close(left: tuple[Tensor | None, Tensor | None], right: tuple[Tensor | None, Tensor | None]) -> None:
    for a, b in zip(both(left), both(right), strict=True):
        close_tensors(a, b)


def differs(left: Tensor | None, right: Tensor | None) -> bool:
    assert left is not None
    assert right is not None
    return bool((left - right).abs().max() > 1e-3)


def sample(stream: Modality, index: int) -> Modality:
    """One sample of a batch."""
    names = ("latent", "sigma", "timesteps", "positions", "context")
    return replace(stream, **{name: getattr(stream, name)[index : index + 1] for name in names})


def guidance_passes(network: LTX2Transformer) -> list[Pass]:
    """Conditional, unconditional, perturbed, isolated: everything shared but the negative context."""
    video, audio = tiny_pair(network.config)
    other = tiny_pair(network.config, seed=1)
    negative = replace(video, context=other[0].context), replace(audio, context=other[1].context)
    return [
        Pass(video=video, audio=audio),
        Pass(video=negative[0], audio=negative[1]),
        Pass(video=replace(video), audio=replace(audio), perturbations=(STG, STG)),
        Pass(video=video, audio=audio, perturbations=(ISOLATED, ISOLATED)),
    ]


# -------------------------------------------------------------------------------- several passes at once


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_tokens", [None, 5])
@torch.inference_mode()
def test_passes_together_are_bit_equal_to_passes_alone(variant: str, chunk_tokens: int | None) -> None:
    network = tiny_network(variant)
    passes = guidance_passes(network)
    together = network.forward_passes(passes, chunk_tokens=chunk_tokens)
    for item, (video, audio) in zip(passes, together, strict=True):
        alone = both(network(item.video, item.audio, item.perturbations, chunk_tokens=chunk_tokens))
        assert video is not None
        assert audio is not None
        assert torch.equal(video, alone[0])
        assert torch.equal(audio, alone[1])
    assert all(differs(together[0][0], velocities[0]) for velocities in together[1:])


@torch.inference_mode()
def test_passes_share_one_traversal_and_what_their_common_tensors_need() -> None:
    network = tiny_network("ltx-2")
    passes = guidance_passes(network)
    blocks = [Calls(block) for block in network.transformer_blocks]
    attentions = Calls(network.get_submodule("transformer_blocks.0.attn2"))
    assert network.caption_projection is not None
    modulation, text = Calls(network.adaln_single), Calls(network.caption_projection)
    network.forward_passes(passes)
    assert [calls.count for calls in blocks] == [1, 1, 1]
    assert attentions.count == len(passes)
    assert modulation.count == 1
    assert text.count == 2  # positive and negative
    states: Sequence[PassState] = blocks[0].args[0]
    streams = [state.video for state in states if state.video is not None]
    assert len({id(stream.rope) for stream in streams}) == 1
    assert len({id(stream.hidden) for stream in streams}) == len(passes)
    assert states[0].audio is not None
    assert states[0].audio.cross_rope is states[0].audio.rope


@torch.inference_mode()
def test_modulation_is_kept_once_per_distinct_timestep() -> None:
    network = tiny_network()
    video, audio = tiny_pair(network.config)
    calls, block = Calls(network.adaln_single.linear), Calls(network.transformer_blocks[0])
    network(video, audio)
    assert calls.args[0].shape == (3, 32)  # kept, and the sigma of either sample
    state = block.args[0][0].video
    flat = video.timesteps.flatten() * 1000
    plain, embedded = network.adaln_single(flat, torch.float32)
    tokens = TOKENS["video"]
    close_tensors(state.modulation.expand(), plain.view(2, tokens, -1))
    close_tensors(state.embedded.expand()[..., :32], embedded.view(2, tokens, -1))


@torch.inference_mode()
def test_one_value_per_sample_needs_no_index_and_gives_the_same() -> None:
    network = tiny_network()
    video, audio = tiny_pair(network.config)

    def uniform(stream: Modality, timesteps: Tensor) -> Modality:
        return replace(stream, timesteps=timesteps)

    sigma = video.sigma.view(2, 1, 1)
    expected = network(
        uniform(video, sigma.repeat(1, TOKENS["video"], 1)),
        uniform(audio, sigma.repeat(1, TOKENS["audio"], 1)),
    )
    close(network(uniform(video, sigma), uniform(audio, sigma)), expected)
    expanded = uniform(video, sigma.expand(2, TOKENS["video"], 1)), uniform(audio, sigma)
    close(network(*expanded), expected)
    two_dimensional = uniform(video, sigma[..., 0].repeat(1, TOKENS["video"])), uniform(audio, sigma)
    close(network(*two_dimensional), expected)


@torch.inference_mode()
def test_a_batch_of_one_takes_a_scalar_sigma() -> None:
    network = tiny_network()
    video, audio = (sample(stream, 0) for stream in tiny_pair(network.config))
    scalars = replace(video, sigma=video.sigma[0]), replace(audio, sigma=audio.sigma[0])
    close(network(*scalars), network(video, audio))


# ---------------------------------------------------------------------------------- inputs and gradients


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [True, False])
def test_tensors_of_the_caller_are_not_changed(variant: str, grad: bool) -> None:
    network = tiny_network(variant)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    streams = [replace(stream, context_mask=mask.clone()) for stream in tiny_pair(network.config)]
    streams[0] = replace(streams[0], attention_mask=torch.rand(2, 12, 12))
    names = ("latent", "sigma", "timesteps", "positions", "context", "context_mask", "attention_mask")
    given = [getattr(stream, name) for stream in streams for name in names]
    tensors = [tensor for tensor in given if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    parameters = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.set_grad_enabled(grad):
        network.forward_passes([Pass(video=streams[0], audio=streams[1])] * 2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(torch.equal(value, parameters[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter_and_inference_gives_the_same(variant: str) -> None:
    network = tiny_network(variant)
    streams = tiny_pair(network.config)
    velocities = both(network(*streams, (STG, ()), chunk_tokens=5))
    torch.autograd.backward([velocity.square().mean() for velocity in velocities])
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    with torch.inference_mode():
        close(tuple(v.detach() for v in velocities), network(*streams, (STG, ()), chunk_tokens=5))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_bf16_with_float32_tables(variant: str) -> None:
    """Checkpoints keep the tables in float32; the hidden state must not become float32 by that."""
    network = tiny_network(variant)
    streams = tiny_pair(network.config)
    expected = both(network(*streams))
    tables = {name: value.clone() for name, value in network.state_dict().items() if "table" in name}
    network.bfloat16().load_state_dict(tables, strict=False, assign=True)
    assert network.scale_shift_table.dtype is torch.float32
    low = [replace(s, latent=s.latent.bfloat16(), context=s.context.bfloat16()) for s in streams]
    for velocity, reference in zip(both(network(*low)), expected, strict=True):
        assert velocity.dtype is torch.bfloat16
        assert (velocity.float() - reference).abs().mean() < 0.03 * reference.abs().mean()


# --------------------------------------------------------------------------------- missing and disabled


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_without_audio_the_network_is_the_video_only_network(variant: str) -> None:
    network = tiny_network(variant)
    alone = LTX2Transformer(replace(network.config, has_audio=False))
    own = network.state_dict()
    alone.load_state_dict({name: own[name] for name in alone.state_dict()})
    video, audio = tiny_pair(network.config)
    expected, nothing = alone(video, None)
    assert nothing is None
    empty = replace(audio, latent=audio.latent[:, :0], timesteps=audio.timesteps[:, :0])
    for without in (None, empty):
        velocity, silence = network(video, without)
        assert silence is None
        assert torch.equal(velocity, expected)
    with pytest.raises(RequestError, match="network without audio"):
        alone(video, audio)


@torch.inference_mode()
def test_audio_alone_and_nothing_at_all() -> None:
    network = tiny_network()
    video, audio = tiny_pair(network.config)
    nothing, velocity = network(None, audio)
    assert nothing is None
    assert velocity.shape == audio.latent.shape
    assert differs(velocity, network(video, audio)[1])
    assert network(None, None) == (None, None)


@torch.inference_mode()
def test_a_disabled_stream_stays_but_feeds_the_other() -> None:
    network = tiny_network()
    video, audio = tiny_pair(network.config)
    block = Calls(network.transformer_blocks[-1])
    expected = network(video, audio)
    frozen = network(video, replace(audio, enabled=False))
    state = block.args[0][0].audio
    assert torch.equal(state.hidden, network.audio_patchify_proj(audio.latent))
    assert differs(frozen[0], network(video, None)[0])
    assert differs(frozen[1], expected[1])
    isolated = (Perturbation(SkipKind.A2V_CROSS_ATTN),) * 1
    cut = network(video, replace(audio, enabled=False), (isolated, isolated))
    assert torch.equal(cut[0], network(video, None)[0])


# --------------------------------------------------------------------------------------- perturbations


@pytest.mark.parametrize(
    "perturbation",
    [
        *(Perturbation(kind) for kind in SkipKind),
        *(Perturbation(kind, (0, 2)) for kind in SkipKind),
    ],
    ids=str,
)
@torch.inference_mode()
def test_mixed_batches_equal_single_runs(perturbation: Perturbation) -> None:
    network = tiny_network()
    video, audio = tiny_pair(network.config)
    stated: Perturbations = ((perturbation,), ())
    mixed = network(video, audio, stated)
    for index in (0, 1):
        alone = network(sample(video, index), sample(audio, index), (stated[index],))
        close(tuple(v[index : index + 1] for v in both(mixed)), alone)  # type: ignore[arg-type]
    plain = network(video, audio)
    assert differs(mixed[0][:1], plain[0][:1])
    close_tensors(mixed[0][1:], plain[0][1:])


@torch.inference_mode()
def test_isolated_streams_do_not_hear_each_other() -> None:
    network = tiny_network()
    video, audio = tiny_pair(network.config)
    isolated = network(video, audio, (ISOLATED, ISOLATED))
    close(isolated, (network(video, None)[0], network(None, audio)[1]))


@torch.inference_mode()
def test_perturbations_that_cannot_work_are_refused() -> None:
    network = tiny_network()
    video, audio = tiny_pair(network.config)
    with pytest.raises(RequestError, match="1 samples, but the batch has 2"):
        network(video, audio, (STG,))
    with pytest.raises(RequestError, match=r"blocks \[3\], but the network has 3"):
        network(video, audio, ((Perturbation(SkipKind.VIDEO_SELF_ATTN, (3,)),), ()))


def test_skips_per_block_and_sample() -> None:
    skips = Skips((STG, ()), 2, torch.device("cpu"))
    assert skips.at(SkipKind.VIDEO_SELF_ATTN, 0) is False
    mask = skips.at(SkipKind.VIDEO_SELF_ATTN, 1)
    assert isinstance(mask, Tensor)
    assert mask.tolist() == [True, False]
    assert skips.at(SkipKind.AUDIO_SELF_ATTN, 1) is mask
    assert Skips((ISOLATED, ISOLATED), 2, torch.device("cpu")).at(SkipKind.V2A_CROSS_ATTN, 9) is True


# ------------------------------------------------------------------------- cross-modal timesteps, masks


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_cross_timestep_rules_agree_only_at_a_common_sigma(variant: str) -> None:
    network = tiny_network(variant)
    video, audio = tiny_pair(network.config)
    uneven = [network(video, audio, cross_timestep=rule)[0] for rule in CrossTimestep]
    assert all(differs(uneven[i], uneven[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    level = video.sigma.view(2, 1, 1)
    streams = replace(video, timesteps=level), replace(audio, timesteps=level)
    even = [network(*streams, cross_timestep=rule) for rule in CrossTimestep]
    close(even[0], even[1])
    close(even[0], even[2])


@torch.inference_mode()
def test_the_gate_listens_to_the_sigma_of_the_other_stream() -> None:
    network = tiny_network("ltx-2")  # without prompt modulation, which also reads sigma
    video, audio = tiny_pair(network.config)
    louder = replace(audio, sigma=audio.sigma * 0.5)
    tokenwise = [network(video, stream)[0] for stream in (audio, louder)]
    assert differs(*tokenwise)
    own = [network(video, stream, cross_timestep=CrossTimestep.OWN)[0] for stream in (audio, louder)]
    assert torch.equal(*own)
    one_block = tiny_network("ltx-2", num_layers=1)
    changed = one_block(video, louder)[1], one_block(video, audio)[1]
    assert torch.equal(*changed)  # the sigma of audio gates what video receives, not what audio receives


@torch.inference_mode()
def test_context_masks_hide_padding() -> None:
    network = tiny_network()
    video = tiny_modality("video", network.config)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2)
    masked = network(replace(video, context_mask=keep), None)[0]
    short = network(replace(video, context=video.context[:, :4]), None)[0]
    close_tensors(masked, short)
    additive = context_bias(keep.bool(), torch.float32)
    assert torch.equal(network(replace(video, context_mask=additive), None)[0], masked)
    assert differs(masked, network(video, None)[0])


def test_context_masks_per_token() -> None:
    network = tiny_network()
    video = tiny_modality("video", network.config)
    keep = torch.rand(2, 12, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[..., 0] = True
    masked = network(replace(video, context_mask=keep.long()), None)[0]
    additive = context_bias(keep, torch.float32)
    assert additive.shape == (2, 1, 12, 7)
    # Three axes are samples, tokens and words: not heads, tokens and words.
    assert torch.equal(network(replace(video, context_mask=additive[:, 0]), None)[0], masked)
    assert differs(masked, network(replace(video, context_mask=keep[:, 0].long()), None)[0])


@torch.inference_mode()
def test_attention_strength_scales_the_weight_of_a_token() -> None:
    network = tiny_network()
    video = tiny_modality("video", network.config)
    plain = network(video, None)[0]
    full = network(replace(video, attention_mask=torch.ones(2, 12, 12)), None)[0]
    close_tensors(full, plain)
    strengths = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
    bias = attention_bias(strengths, torch.float32)
    assert bias.shape == (1, 1, 2, 2)
    torch.testing.assert_close(bias.softmax(-1), torch.tensor([[[[2 / 3, 1 / 3], [0.0, 1.0]]]]))
    assert attention_bias(strengths, torch.bfloat16).dtype is torch.bfloat16
