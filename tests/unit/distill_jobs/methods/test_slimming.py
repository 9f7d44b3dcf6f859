"""Slimming at the teacher itself, beside it, and over a real network with fewer layers."""

from typing import Any

import pytest
import torch

from distill_jobs.batches import Rows, make_batch
from distill_jobs.methods import slimming
from distill_jobs.methods.base import resolve
from distill_jobs.roles import Cast
from distill_jobs.teachers import diffusers
from distill_jobs.teachers.diffusers import Teacher
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests import tiny_sd
from tests.unit.distill_jobs.closed_form import STD
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, other_guidance, top, trajectory_loss

every_name = pytest.mark.parametrize("name", slimming.PRESETS)


def slimming_loss(name: str, process: Process, kind: Kind, **other: Any) -> float:
    settings = {"top": 0.9 * top(kind)}
    return trajectory_loss(name, process, kind, settings=settings, **other)


@every_kind
@every_process
@every_name
def test_slimming_is_zero_at_the_guided_teacher_only(name: str, process: Process, kind: Kind) -> None:
    assert slimming_loss(name, process, kind) < 1e-6
    assert slimming_loss(name, process, kind, shift=TRUTH + OFF) > 1e-4
    assert slimming_loss(name, process, kind, std=1.3 * STD) > 1e-4


def test_the_other_guidance_convention_fails_the_oracle() -> None:
    assert slimming_loss("slimming", RF(), "flow", teacher=other_guidance(RF(), "flow")) > 1e-3


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    tiny = tiny_sd.teacher()
    return diffusers.load(tiny.registry, tiny.version)


def losses(teacher: Teacher, name: str, *, middle: bool, shake: str | None = None) -> dict[str, float]:
    slim = None if middle else teacher.slimmed(None, middle=False)
    student = teacher.beginner(frozenset(), slim)
    if shake is not None:
        with torch.no_grad():
            dict(student.named_parameters())[shake].add_(0.1)
    method = resolve(name).method(Cast(teacher.denoiser, student=student), resolve(name).config({}))
    cond = teacher.encode(["a red circle", "a blue square"])
    batch = make_batch(Rows(cond, x=torch.randn(2, *teacher.shape)), teacher.shape, seed=0)
    return {key: float(value) for key, value in method.loss("student", batch).items()}


def test_a_student_with_all_layers_begins_without_any_loss(teacher: Teacher) -> None:
    found = losses(teacher, "slimming", middle=True)
    assert found == pytest.approx({"output": 0.0, "features": 0.0}, abs=1e-10)


def test_a_student_without_the_middle_sees_the_same_before_it_and_something_else_after_it(teacher: Teacher) -> None:
    found = losses(teacher, "slimming", middle=False)
    assert found["output"] > 0
    assert found["features"] > 0


def test_features_are_of_the_blocks_and_the_output_of_the_whole(teacher: Teacher) -> None:
    block = losses(teacher, "slimming", middle=True, shake="net.unet.down_blocks.0.resnets.0.conv2.weight")
    head = losses(teacher, "slimming", middle=True, shake="net.unet.conv_out.weight")
    assert block["features"] > 1e-4
    assert head["features"] == pytest.approx(0.0, abs=1e-10)
    assert head["output"] > 1e-4


def test_a_unet_with_one_layer_has_none_to_leave_out(teacher: Teacher) -> None:
    with pytest.raises(InvalidRequest, match="the teacher has 1"):
        teacher.slimmed(2, middle=True)
