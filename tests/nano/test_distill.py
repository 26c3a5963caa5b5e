"""Distillation with untrained networks."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth.lora.file import read_lora
from diffsynth.sampling.schedules import DISTILLED_STAGE_1
from tests.nano.untrained import write_autoencoders, write_transformer
from training.nano.distill import Distillation, DistillSettings, Pair, starting_points, taught, train
from training.nano.latents import LatentSettings, encode

SETTINGS = DistillSettings(rank=2, batch=2, steps=2, judged_clips=1, substeps=(1,) * 8, warm_up=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    write_autoencoders(folder)
    encode(LatentSettings(counts={64: 4}), folder, "cpu")
    write_transformer(folder)
    return folder


def distillation(folder: Path, settings: DistillSettings = SETTINGS) -> Distillation:
    return Distillation(settings, folder, torch.device("cpu"))


def test_without_guidance_one_step_of_the_teacher_is_the_student_at_its_start(folder: Path) -> None:
    run = distillation(folder, replace(SETTINGS, scale=1.0))
    _, errors = run.round(0, 0.0)
    assert errors.max() < 1e-9
    _, errors = distillation(folder).round(0, 0.0)
    assert errors.min() > 1e-8


def test_the_teacher_ends_where_its_small_steps_lead(folder: Path) -> None:
    settings = replace(SETTINGS, substeps=(1, 1, 1, 1, 1, 1, 1, 2), first_frame=1.0)
    run = distillation(folder, settings)
    problem = run.problems.draw(random.Random(0))
    state = problem.noised(DISTILLED_STAGE_1[7])
    velocity = taught(run.teacher, problem, state, 7, settings)
    end = problem.moved(state, velocity, -DISTILLED_STAGE_1[7])
    assert torch.equal(end[0][:, :4], problem.clean[0][:, :4]), "the first latent frame is given"
    one = taught(run.teacher, problem, state, 7, replace(settings, substeps=(1,) * 8))
    assert difference(velocity, one) > 1e-5


def test_states_are_those_of_the_list(folder: Path) -> None:
    run = distillation(folder)
    problem = run.problems.draw(random.Random(0))
    student = run.network.transformer
    own = starting_points(student, problem, random.Random(1), 1.0)
    assert list(own)[1:] == [4, 5, 6, 7]
    kinds = [starting_points(student, problem, random.Random(seed), 0.0) for seed in range(8)]
    assert {tuple(kind)[-3:] for kind in kinds} == {(5, 6, 7)}
    for kind in kinds:
        assert torch.equal(kind[5][0], problem.noised(DISTILLED_STAGE_1[5])[0])
    assert {len(kind) for kind in kinds} == {3, 5}


def test_the_lora_is_one_of_the_official_format(folder: Path) -> None:
    train(SETTINGS, folder, "cpu")
    network = distillation(folder).network.transformer
    names = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    lora = read_lora(folder / "distilled_lora.safetensors", names)
    assert lora.report.unmatched == ()
    assert len(lora.updates) == 28


def difference(a: Pair, b: Pair) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
