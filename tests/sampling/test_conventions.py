import dataclasses

import pytest

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.streams import CrossTimestep
from diffsynth.request import GenerateRequest
from diffsynth.sampling.conventions import (
    DIFFSYNTH,
    OFFICIAL,
    OFFICIAL_1_0,
    PRESETS,
    Conventions,
    MaskedStep,
    NoiseRule,
    get_conventions,
)


def test_presets_are_found_by_their_own_name() -> None:
    assert {name: c.name for name, c in PRESETS.items()} == {name: name for name in PRESETS}
    assert get_conventions("official-1.0") is OFFICIAL_1_0
    assert get_conventions(DIFFSYNTH) is DIFFSYNTH


def test_the_request_default_is_a_preset_and_the_defaults_are_official() -> None:
    assert get_conventions(GenerateRequest().conventions) is OFFICIAL
    assert dataclasses.replace(Conventions(), name="official") == OFFICIAL
    assert OFFICIAL.cross_timestep is CrossTimestep.TOKENWISE


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'offical'.*diffsynth, official, official-1\.0"):
        get_conventions("offical")


def test_a_mixture_keeps_the_other_rules() -> None:
    mixed = dataclasses.replace(OFFICIAL, name="mine", noise_source=NoiseRule.FRESH)
    assert mixed.masked_step is MaskedStep.X0_BLEND
    assert get_conventions(mixed).noise_source is NoiseRule.FRESH
