"""A teacher as training has it is the teacher as serving has it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill_jobs.data import prompts
from distill_jobs.small_evaluation import baked
from distill_jobs.teachers import diffusers
from distill_jobs.teachers.diffusers import Teacher
from engines import artefact
from engines.errors import InvalidRequest
from engines.loader import load_student
from engines.manifest import Guidance, Schedule, StudentManifest
from engines.student import sample
from tests import tiny_sd

CAPTIONS, SEEDS = ["a red circle", "two shapes on white", "a blue square"], [1, 2, 3]
TWO_STEPS = {2: Schedule(times=(1.0, 0.4, 0.0), eta=1.0)}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    tiny = tiny_sd.teacher()
    return diffusers.load(tiny.registry, tiny.version)


@pytest.mark.parametrize("guidance", [tiny_sd.GUIDANCE, baked(2.0), baked(1.0)], ids=["cfg", "baked", "none"])
def test_a_network_in_training_makes_the_pictures_that_its_engine_will_make(
    teacher: Teacher, guidance: Guidance
) -> None:
    registry = tiny_sd.teacher().registry
    torch.manual_seed(3)
    with torch.no_grad():
        for value in teacher.denoiser.parameters():
            value.add_(0.01 * torch.randn_like(value))  # a student that has learnt something
    version = artefact.make_student(
        registry,
        teacher.manifest.version,
        "learnt",
        denoiser_weights=diffusers.blob_weights(teacher.denoiser.state_dict()),
        schedules=TWO_STEPS,
        guidance=guidance,
        dtype="fp32",
    )
    served = sample(load_student(registry, registry.student(version)), CAPTIONS, SEEDS, 2)
    trained = sample(teacher.student(teacher.denoiser, TWO_STEPS, guidance), CAPTIONS, SEEDS, 2)
    assert (served.int() - trained.int()).abs().max() <= 1


def test_a_student_that_reads_a_second_time_begins_as_its_teacher(teacher: Teacher) -> None:
    beginner = teacher.beginner(frozenset({"s"}))
    cond, x, t = teacher.encode(CAPTIONS), torch.randn(3, *teacher.shape), torch.full((3,), 0.7)
    with torch.no_grad():
        ours, theirs = beginner(x, t, cond, torch.full((3,), 0.2)), teacher.denoiser(x, t, cond)
    torch.testing.assert_close(ours, theirs)
    assert all(parameter.requires_grad for parameter in beginner.parameters())


def test_a_second_time_is_served_as_it_was_trained(teacher: Teacher) -> None:
    registry, student = tiny_sd.teacher().registry, teacher.beginner(frozenset({"s"}))
    torch.manual_seed(4)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.01 * torch.randn_like(value))
    version = artefact.make_student(
        registry,
        teacher.manifest.version,
        "jumps",
        denoiser_weights=diffusers.blob_weights(student.state_dict()),
        schedules=TWO_STEPS,
        guidance=baked(2.0),
        inputs=("s",),
        dtype="fp32",
    )
    served = sample(load_student(registry, registry.student(version)), CAPTIONS, SEEDS, 2)
    trained = sample(teacher.student(student, TWO_STEPS, baked(2.0)), CAPTIONS, SEEDS, 2)
    assert (served.int() - trained.int()).abs().max() <= 1


WEIGHTS = Guidance(mode="embedded", default=2.0, minimum=1.0, maximum=4.0)


def test_a_guidance_weight_is_served_as_it_was_trained_at_every_value_of_its_range(teacher: Teacher) -> None:
    registry, student = tiny_sd.teacher().registry, teacher.beginner(frozenset({"w"}))
    torch.manual_seed(4)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.02 * torch.randn_like(value))
    version = artefact.make_student(
        registry,
        teacher.manifest.version,
        "weighted",
        denoiser_weights=diffusers.blob_weights(student.state_dict()),
        schedules=TWO_STEPS,
        guidance=WEIGHTS,
        inputs=("w",),
        dtype="fp32",
    )
    loaded, training = load_student(registry, registry.student(version)), teacher.student(student, TWO_STEPS, WEIGHTS)
    made = {w: sample(loaded, CAPTIONS, SEEDS, 2, guidance=w).int() for w in (None, 1.0, 2.0, 4.0)}
    for w, served in made.items():
        assert (served - sample(training, CAPTIONS, SEEDS, 2, guidance=w).int()).abs().max() <= 1
    assert torch.equal(made[None], made[2.0])
    assert (made[1.0] - made[4.0]).abs().max() > 1
    with pytest.raises(InvalidRequest, match=r"guidance_scale=4.5 is outside 1.0..4.0"):
        sample(loaded, CAPTIONS, SEEDS, 2, guidance=4.5)


WAY = {2: Schedule(times=(1.0, 0.4, 0.0), solver="dx")}


def test_a_policy_begins_as_its_teachers_straight_steps(teacher: Teacher) -> None:
    beginner = teacher.beginner(frozenset({"s"}), points=3)
    cond, x, t, s = teacher.encode(CAPTIONS), torch.randn(3, *teacher.shape), torch.full((3,), 0.7), torch.zeros(3)
    with torch.no_grad():
        torch.testing.assert_close(beginner.jump(x, t, s, cond), teacher.denoiser.jump(x, t, s, cond))
        assert beginner.policy(x, t, s, cond).points.shape == (3, 3, *teacher.shape)


def test_a_policy_is_served_as_it_was_trained(teacher: Teacher) -> None:
    registry, student = tiny_sd.teacher().registry, teacher.beginner(frozenset({"s"}), points=3)
    torch.manual_seed(4)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.02 * torch.randn_like(value))
    version = artefact.make_student(
        registry,
        teacher.manifest.version,
        "ways",
        denoiser_weights=diffusers.blob_weights(student.state_dict()),
        schedules=WAY,
        guidance=baked(2.0),
        inputs=("s",),
        points=3,
        dtype="fp32",
    )
    manifest = registry.student(version)
    assert (manifest.points, manifest.solver_for(2)) == (3, "dx")
    served = sample(load_student(registry, manifest), CAPTIONS, SEEDS, 2)
    trained = sample(teacher.student(student, WAY, baked(2.0)), CAPTIONS, SEEDS, 2)
    assert (served.int() - trained.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="solver dx is for networks of several points"):
        StudentManifest.model_validate(manifest.model_dump() | {"points": 1})


def test_a_guided_teacher_is_u_plus_w_times_c_minus_u(teacher: Teacher) -> None:
    cond, x, t = teacher.encode(CAPTIONS), torch.randn(3, *teacher.shape), torch.full((3,), 0.7)
    null = teacher.encode([""]).expand_as(cond)
    with torch.no_grad():
        c, u = teacher.denoiser(x, t, cond)[0], teacher.denoiser(x, t, null)[0]
        guided = teacher.guided(2.5)(x, t, cond)[0]
    torch.testing.assert_close(guided, u + 2.5 * (c - u), rtol=1e-4, atol=1e-4)
    assert teacher.guided(1.0) is teacher.denoiser


def test_float_pictures_round_to_those_that_are_served(teacher: Teacher) -> None:
    latents = torch.randn(2, *teacher.shape)
    with torch.no_grad():
        served = teacher.decoder(latents=latents).numpy()
    assert np.abs(np.rint(teacher.pictures(latents)) - served.astype(np.float32)).max() <= 1


def test_prompts_are_encoded_once(teacher: Teacher, tmp_path: Path) -> None:
    first = prompts.encoded(teacher, CAPTIONS, tmp_path)
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    again = prompts.encoded(teacher, CAPTIONS, tmp_path)
    assert kept.stat().st_mtime_ns == before
    torch.testing.assert_close(first.cond, again.cond)
    prompts.encoded(teacher, CAPTIONS[:2], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_captions_are_those_of_the_rows(teacher: Teacher, tmp_path: Path) -> None:
    source = prompts.encoded(teacher, CAPTIONS, tmp_path)
    for position in range(3):
        cond = source.rows(position, 2).cond
        torch.testing.assert_close(cond, teacher.encode(source.captions(position, 2)))


def test_a_job_brings_its_own_prompts_or_names_a_source() -> None:
    assert prompts.texts(["a", "b"]) == ["a", "b"]
    named = prompts.texts("shapes", count=5)
    assert len(named) == 5
    assert prompts.texts(None, count=5) == named
    with pytest.raises(InvalidRequest, match="no source"):
        prompts.texts("imagenet")
