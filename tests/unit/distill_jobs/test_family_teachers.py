"""A teacher of every family of pictures can be loaded, guided and distilled."""

import pytest
import torch

from distill_jobs.batches import Source, WeightedSource
from distill_jobs.data.prompts import PromptSource
from distill_jobs.stage import Stage
from distill_jobs.teachers import diffusers
from distill_jobs.trainer import TrainConfig, Trainer
from engines.denoiser import AtWeight
from engines.errors import NotBuilt
from engines.loader import load_student
from engines.student import sample
from tests import tiny_families
from tests.tiny_families import OF_PICTURES, STEPS

PROMPTS, SEEDS = ["a red circle", "two shapes on the left"], [1, 2]
every_family = pytest.mark.parametrize("name", OF_PICTURES)


@every_family
def test_one_update_of_kd_trains_the_whole_network(name: str) -> None:
    own = tiny_families.shipped(name)
    teacher = diffusers.load(own.registry, own.version)
    source: Source = PromptSource(PROMPTS, teacher.encode(PROMPTS), teacher.shape)
    if "w" in teacher.denoiser.inputs:
        source = WeightedSource(source, 1.0, 4.0)
    student = teacher.beginner(frozenset())
    before = {key: value.clone() for key, value in student.state_dict().items()}
    settings = {"batch": 2, "pairs": 2, "teacher_steps": 2, "lr": 1e-2}
    done = Trainer(
        [Stage("kd", 1, settings)], teacher.guided(2.0), student, source, TrainConfig(ema=(0.0,), report_every_s=0.0)
    ).fit()
    assert done.state == "finished"
    assert done.weights.keys() == before.keys()
    moved = [key for key in before if not torch.equal(before[key], done.weights[key])]
    assert len(moved) > 0.7 * len(before), set(before) - set(moved)


@every_family
def test_a_network_in_training_makes_the_pictures_of_its_engine(name: str) -> None:
    own = tiny_families.shipped(name)
    teacher, manifest = diffusers.load(own.registry, own.version), own.manifest
    trained = sample(teacher.student(teacher.denoiser, manifest.schedules, manifest.guidance), PROMPTS, SEEDS, STEPS)
    served = sample(load_student(own.registry, manifest), PROMPTS, SEEDS, STEPS)
    assert (served.int() - trained.int()).abs().max() <= 1


def test_a_teacher_of_videos_is_refused_before_anything_is_loaded() -> None:
    own = tiny_families.shipped("wan")
    with pytest.raises(NotBuilt, match=r"makes videos of 9 frames.*one frame"):
        diffusers.load(own.registry, own.version)


def test_a_teacher_that_reads_its_weight_is_asked_with_it() -> None:
    own = tiny_families.shipped("flux")
    teacher = diffusers.load(own.registry, own.version)
    x, t, cond = torch.randn(2, *teacher.shape), torch.full((2,), 0.6), teacher.encode(PROMPTS)
    guided = teacher.guided(3.0)
    assert isinstance(guided, AtWeight)
    with torch.no_grad():
        own_weight, threes = guided(x, t, cond)[0], teacher.denoiser(x, t, cond, w=torch.full((2,), 3.0))[0]
        fours = guided(x, t, cond, w=torch.full((2,), 4.0))[0]
    assert torch.equal(own_weight, threes)
    assert not torch.allclose(fours, threes)


def test_sdxl_is_guided_away_from_zeros() -> None:
    own = tiny_families.shipped("sdxl")
    teacher = diffusers.load(own.registry, own.version)
    x, t, cond = torch.randn(2, *teacher.shape), torch.full((2,), 0.6), teacher.encode(PROMPTS)
    with torch.no_grad():
        c, u = teacher.denoiser(x, t, cond)[0], teacher.denoiser(x, t, torch.zeros_like(cond))[0]
        torch.testing.assert_close(teacher.guided(2.0)(x, t, cond)[0], u + 2 * (c - u), rtol=1e-3, atol=1e-3)
