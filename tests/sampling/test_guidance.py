from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from diffsynth.request import GuidanceParams
from diffsynth.sampling.guidance import (
    PassKind,
    StatefulApg,
    apg_delta,
    at_sigma,
    cfg_delta,
    cfg_star_delta,
    combine,
    guidance_passes,
    skips_step,
    stg_delta,
)

SHAPE = (1, 5, 8)
C, U, P, I = PassKind  # noqa: E741


def predictions(dtype: torch.dtype = torch.float32) -> dict[PassKind, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {kind: torch.randn(SHAPE, generator=generator).to(dtype) for kind in PassKind}


@pytest.mark.parametrize(
    ("video", "audio", "expected"),
    [
        (None, None, (C,)),
        (GuidanceParams(), GuidanceParams(skip_step=2), (C,)),
        (GuidanceParams(cfg_scale=3.0), None, (C, U)),
        (None, GuidanceParams(cfg_scale=0.0), (C, U)),
        (GuidanceParams(stg_scale=1.0, stg_blocks=(28,)), GuidanceParams(modality_scale=3.0), (C, P, I)),
        (GuidanceParams(cfg_scale=3.0, rescale_scale=0.45, modality_scale=3.0), None, (C, U, I)),
        (GuidanceParams(cfg_scale=3, stg_scale=1, stg_blocks=(0,), modality_scale=3), None, (C, U, P, I)),
    ],
)
def test_passes_that_a_step_needs(
    video: GuidanceParams | None, audio: GuidanceParams | None, expected: tuple[PassKind, ...]
) -> None:
    assert guidance_passes(video, audio) == expected


def test_neutral_guidance_is_the_conditional_prediction() -> None:
    given = predictions()
    assert torch.equal(combine(None, {C: given[C]}), given[C])
    assert torch.equal(combine(GuidanceParams(), given), given[C])


def test_all_terms_add_up() -> None:
    given = predictions()
    params = GuidanceParams(cfg_scale=3.0, stg_scale=0.5, stg_blocks=(1,), modality_scale=2.0)
    expected = given[C] + 2 * (given[C] - given[U]) + 0.5 * (given[C] - given[P]) + (given[C] - given[I])
    torch.testing.assert_close(combine(params, given), expected)


@pytest.mark.parametrize(
    ("more", "delta"),
    [
        ({"cfg_kind": "cfg_star"}, cfg_star_delta),
        ({"cfg_kind": "apg"}, apg_delta),
        (
            {"cfg_kind": "apg", "apg_eta": 0.3, "apg_norm_threshold": 2.0},
            partial(apg_delta, eta=0.3, norm_threshold=2.0),
        ),
    ],
)
def test_other_ways_to_use_the_negative_prompt(more: dict[str, Any], delta: Callable[..., Any]) -> None:
    given = predictions()
    params = GuidanceParams(cfg_scale=4.0, modality_scale=2.0, **more)
    expected = given[C] + delta(given[C], given[U], 4.0) + (given[C] - given[I])
    torch.testing.assert_close(combine(params, given), expected)


def test_a_pass_that_did_not_run_is_not_asked_for() -> None:
    given = predictions()
    guided = combine(GuidanceParams(cfg_scale=3.0), {C: given[C], U: given[U]})
    torch.testing.assert_close(guided, given[C] + cfg_delta(given[C], given[U], 3.0))
    with pytest.raises(KeyError):
        combine(GuidanceParams(modality_scale=3.0), {C: given[C], U: given[U]})


def test_full_rescale_restores_the_deviation_of_the_whole_tensor() -> None:
    given = predictions()
    guided = combine(GuidanceParams(cfg_scale=7.0, rescale_scale=1.0), given)
    assert guided.std().item() == pytest.approx(given[C].std().item(), rel=1e-5)
    half = combine(GuidanceParams(cfg_scale=7.0, rescale_scale=0.5), given)
    assert half.std() > guided.std()


def test_half_precision_predictions_are_combined_in_float32() -> None:
    given = predictions(torch.bfloat16)
    params = GuidanceParams(cfg_scale=3.0, rescale_scale=0.7)
    guided = combine(params, given)
    exact = combine(params, {kind: tensor.float() for kind, tensor in given.items()})
    assert guided.dtype == torch.bfloat16
    assert torch.equal(guided, exact.bfloat16())


def test_skipped_steps() -> None:
    assert [skips_step(i, 0) for i in range(3)] == [False] * 3
    assert [skips_step(i, 1) for i in range(4)] == [False, True, False, True]


def test_tables_by_sigma() -> None:
    table = {1.0: "early", 0.5: "late"}
    assert [at_sigma(table, s) for s in (1.2, 1.0, 0.51, 0.5, 0.0)] == [
        "early",
        "early",
        "early",
        "late",
        "late",
    ]
    with pytest.raises(ValueError, match="at least one"):
        at_sigma({}, 0.5)


def test_neutral_scales_of_the_two_pass_guiders_add_nothing() -> None:
    given = predictions()
    zero = torch.zeros(SHAPE)
    for delta in (
        cfg_delta(given[C], given[U], 1.0),
        cfg_star_delta(given[C], given[U], 1.0),
        stg_delta(given[C], given[P], 0.0),
        apg_delta(given[C], given[U], 1.0),
        StatefulApg(0.0).delta(given[C], given[U]),
    ):
        assert torch.equal(delta, zero)


def test_cfg_star_ignores_the_length_of_the_unconditional_prediction() -> None:
    given = predictions()
    torch.testing.assert_close(
        cfg_star_delta(given[C], given[U], 3.0), cfg_star_delta(given[C], 5 * given[U], 3.0)
    )


def test_cfg_star_projects_every_item_of_a_batch_by_itself() -> None:
    given = predictions()
    cond = torch.cat([given[C], given[P]])
    uncond = torch.cat([given[U], given[I]])
    both = cfg_star_delta(cond, uncond, 3.0)
    torch.testing.assert_close(both[:1], cfg_star_delta(given[C], given[U], 3.0))
    torch.testing.assert_close(both[1:], cfg_star_delta(given[P], given[I], 3.0))


def test_apg_is_cfg_without_threshold_and_with_full_parallel_part() -> None:
    given = predictions()
    torch.testing.assert_close(apg_delta(given[C], given[U], 3.0), cfg_delta(given[C], given[U], 3.0))


def test_apg_without_parallel_part_is_orthogonal_to_the_prediction() -> None:
    given = predictions()
    delta = apg_delta(given[C], given[U], 3.0, eta=0.0)
    assert (delta * given[C]).sum().abs() < 1e-3 * delta.norm() * given[C].norm()


def test_apg_caps_the_norm() -> None:
    given = predictions()
    capped = apg_delta(given[C], given[U], 2.0, norm_threshold=0.5)
    assert capped.norm().item() == pytest.approx(0.5, rel=1e-5)


def test_momentum_carries_the_first_step_into_the_second() -> None:
    given = predictions()
    guider = StatefulApg(2.0, norm_threshold=0.0, momentum=0.5)
    first = guider.delta(given[C], given[U])
    second = guider.delta(given[C], given[C])
    torch.testing.assert_close(first, 2 * (given[C] - given[U]))
    torch.testing.assert_close(second, 0.5 * first)
