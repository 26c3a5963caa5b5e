"""Schedules, guidance, noise, steps and conditionings beside the official ones, with random arguments.

Skipped without the official package; to run it: ``pip install --no-deps ltx-core==1.0.0 scipy``, then
``pytest tests/oracle``.
"""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning import items
from diffsynth.conditioning.state import ModalityState
from diffsynth.request import GuidanceParams
from diffsynth.sampling import guidance, noise, schedules, steps
from diffsynth.sampling.conventions import OFFICIAL_1_0
from diffsynth.sampling.guidance import PassKind

schedulers = pytest.importorskip("ltx_core.components.schedulers")
guiders = pytest.importorskip("ltx_core.components.guiders")
noisers = pytest.importorskip("ltx_core.components.noisers")
diffusion_steps = pytest.importorskip("ltx_core.components.diffusion_steps")
patchifiers = pytest.importorskip("ltx_core.components.patchifiers")
conditioning = pytest.importorskip("ltx_core.conditioning")
tools = pytest.importorskip("ltx_core.tools")
types = pytest.importorskip("ltx_core.types")

SEEDS = pytest.mark.parametrize("seed", range(10))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-6)


@SEEDS
def test_schedules(seed: int) -> None:
    pick = random.Random(seed)
    count, tokens = pick.randint(2, 60), pick.choice((1, 12, 96, 1024, 8160, 24576))
    latent = torch.empty(1, 1, tokens, 1, 1)
    official = schedulers.LTX2Scheduler().execute(count, latent, terminal=0.05)
    close(schedules.ltx2_schedule(count, tokens, terminal=0.05), official)
    official = schedulers.LinearQuadraticScheduler().execute(count, threshold_noise=0.05)
    close(schedules.linear_quadratic_schedule(count, 0.05), official)
    close(schedules.beta_schedule(count), schedulers.BetaScheduler().execute(count))


@SEEDS
def test_guidance(seed: int) -> None:
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shown = {kind: torch.randn(2, 5, 16, generator=generator) for kind in PassKind}
    values = {
        "cfg_scale": pick.choice((1.0, 3.0, 7.0)),
        "stg_scale": pick.choice((0.0, 1.0)),
        "rescale_scale": pick.choice((0.0, 0.7, 1.0)),
        "modality_scale": pick.choice((1.0, 3.0)),
        "skip_step": pick.randint(0, 3),
    }
    official = guiders.MultiModalGuider(guiders.MultiModalGuiderParams(**values))
    params = GuidanceParams(**values)
    close(guidance.combine(params, shown), official.calculate(*shown.values()), 1e-5)
    for step in range(8):
        assert guidance.skips_step(step, params.skip_step) == official.should_skip_step(step)
    cond, uncond = shown[PassKind.COND][:1], shown[PassKind.UNCOND][:1]
    eta, threshold = pick.choice((0.0, 0.3, 1.0)), pick.choice((0.0, 0.5, 100.0))
    apg = guiders.LtxAPGGuider(3.0, eta, threshold).delta(cond, uncond)
    close(guidance.apg_delta(cond, uncond, 3.0, eta=eta, norm_threshold=threshold), apg, 1e-5)
    star = guiders.CFGStarRescalingGuider(3.0).delta(cond, uncond)
    close(guidance.cfg_star_delta(cond, uncond, 3.0), star, 1e-5)


@SEEDS
def test_steps(seed: int) -> None:
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = pick.choice((torch.float32, torch.bfloat16))
    x, x0, unit = (torch.randn(2, 5, 16, generator=generator) for _ in range(3))
    sigma, following = sorted((pick.uniform(0.01, 1), pick.uniform(0.01, 1)), reverse=True)
    levels = torch.tensor([sigma, following])
    half, half0 = x.to(dtype), x0.to(dtype)
    official = diffusion_steps.EulerDiffusionStep().step(half, half0, levels, 0)
    close(steps.euler_step(half, half0, *levels.tolist()), official, 1e-6 if dtype == torch.float32 else 0)
    double = [tensor.double() for tensor in (x, x0, unit)]
    official = diffusion_steps.Res2sDiffusionStep().step(double[0], double[1], levels.double(), 0, double[2])
    close(steps.sde_step(double[0], double[1], *levels.tolist(), double[2]), official)


@SEEDS
def test_conditionings(seed: int) -> None:
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = (pick.choice((1, 2)), 4, pick.randint(1, 3), *pick.choice(((2, 4), (4, 2))))
    fps = pick.choice((24.0, 23.976, 60.0))
    latent = pick.choice((None, torch.randn(shape, generator=generator)))
    patchifier = patchifiers.VideoLatentPatchifier(patch_size=1)
    official_tools = tools.VideoLatentTools(patchifier, types.VideoLatentShape(*shape), fps)
    official = official_tools.create_initial_state("cpu", torch.float32, latent)
    ours = ModalityState.video(shape, fps, latent=latent)
    for _ in range(pick.randint(1, 4)):
        theirs, own = random_item(pick, generator, shape)
        official = theirs.apply_to(official, official_tools)
        ours = own.apply(ours, OFFICIAL_1_0)
    scale = pick.choice((1.0, 0.909375))
    official = noisers.GaussianNoiser(torch.Generator().manual_seed(seed))(official, scale)
    ours = noise.add_noise(ours, noise.SharedNoise(seed), scale, OFFICIAL_1_0.noiser)
    close(ours.latent, official.latent)
    close(ours.clean, official.clean_latent)
    close(ours.mask, official.denoise_mask)
    close(ours.positions, official.positions)
    assert (ours.attention is None) == (official.attention_mask is None)
    if ours.attention is not None:
        close(ours.attention, official.attention_mask)


def random_item(
    pick: random.Random, generator: torch.Generator, shape: tuple[int, ...]
) -> tuple[Any, items.ConditioningItem]:
    """The official item and ours."""
    batch, channels, frames, rows, columns = shape
    strength = pick.choice((0.0, 0.7, 1.0))
    kind = pick.choice(("replace", "keyframe", "reference"))
    factor = pick.choice((1, 2)) if kind == "reference" else 1
    given = pick.randint(1, frames)
    latent = torch.randn(batch, channels, given, rows // factor, columns // factor, generator=generator)
    if kind == "replace":
        index = pick.randint(0, frames - given)
        theirs = conditioning.VideoConditionByLatentIndex(latent, strength, index)
        return theirs, items.LatentAtIndex(latent=latent, strength=strength, latent_index=index)
    own: items.Keyframe | items.ReferenceClip
    if kind == "keyframe":
        index = pick.choice((0, 1, 8))
        theirs = conditioning.VideoConditionByKeyframeIndex(latent, index, strength)
        own = items.Keyframe(latent=latent, frame_index=index, strength=strength)
    else:
        theirs = conditioning.VideoConditionByReferenceLatent(latent, factor, strength)
        own = items.ReferenceClip(latent=latent, downscale_factor=factor, strength=strength)
    if pick.random() < 0.5:
        return theirs, own
    weight: Any = pick.choice((0.0, 0.4, torch.rand(1, math.prod(latent.shape[2:]), generator=generator)))
    wrapper = conditioning.ConditioningItemAttentionStrengthWrapper
    return wrapper(theirs, weight), items.AttentionWeighted(item=own, weight=weight)
