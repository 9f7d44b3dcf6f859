"""The teacher's first step: the plan of both, and pictures equal to two samplers one after the other, bit for bit."""

from typing import Any

import pytest
import torch

from engines import refine, solvers
from engines.errors import InvalidRequest, StepsNotAllowed
from engines.frames import Frames
from engines.manifest import Guidance, ProcessSpec, StudentManifest
from engines.noise import noise
from engines.refine import FIRST_STEP
from engines.solvers import State
from engines.student import Aid, sample
from tests.unit.server import toy

TEACHER = toy.manifest("teacher", weights="t", guided=True)


def student(**options: Any) -> StudentManifest:
    return toy.manifest("student", **{"base": TEACHER.version, **options})


def test_the_first_step_is_the_teacher_s_with_its_guidance_and_along_its_flow() -> None:
    plan = refine.plan(student(eta=1.0), TEACHER, 4, None, FIRST_STEP)
    assert [(step.t, step.s, step.w, step.eta) for step in plan] == [
        (1.0, 0.75, 2.0, 0.0),
        (0.75, 0.5, None, 1.0),
        (0.5, 0.25, None, 1.0),
        (0.25, 0.0, None, 1.0),
    ]


def test_a_teacher_that_is_not_guided_there_by_itself_is_not_here() -> None:
    guidance = Guidance(mode="cfg", default=2.0, maximum=8.0, interval=(0.2, 0.8))
    late = toy.manifest("teacher", weights="t", guidance=guidance)
    assert refine.plan(toy.manifest("student", base=late.version), late, 4, None, FIRST_STEP)[0].w is None


@pytest.mark.parametrize(
    ("options", "steps", "says"),
    [
        ({}, 1, "takes one step"),
        ({"base": None}, 4, "was not made from teacher@"),
        ({"process": ProcessSpec(shift=3.0)}, 4, "differ in process"),
    ],
)
def test_what_does_not_fit_is_refused_with_why(options: dict[str, Any], steps: int, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        refine.plan(student(**options), TEACHER, steps, None, FIRST_STEP)
    assert caught.value.param == "refine"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prediction": "x0"}, "differ in prediction"),
        ({"latent_channels": 4}, "differ in latent_channels"),
        ({"frames": Frames(number=9, per_latent=4, fps=16)}, "differ in frames"),
        ({"components": toy.manifest(weights="w").components | {"encoder": TEACHER.components["denoiser"]}}, "encoder"),
    ],
)
def test_students_of_another_space_than_their_teacher_s_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        refine.plan(student().model_copy(update=change), TEACHER, 4, None, FIRST_STEP)


def test_steps_learnt_for_the_student_alone_are_refused() -> None:
    learnt = student().schedules[2].model_copy(update={"solver": "linear", "coefficients": ((1.0, 0.5), (0.0, 1.0))})
    with pytest.raises(InvalidRequest, match="solver linear"):
        refine.plan(student().model_copy(update={"schedules": {2: learnt}}), TEACHER, 2, None, FIRST_STEP)


def test_the_student_s_own_contract_still_holds() -> None:
    with pytest.raises(StepsNotAllowed):
        refine.plan(student(), TEACHER, 3, None, FIRST_STEP)
    with pytest.raises(InvalidRequest, match="guidance_scale"):
        refine.plan(student(), TEACHER, 4, 3.0, FIRST_STEP)


def test_the_teacher_is_found_among_what_serves() -> None:
    assert refine.teacher_of(student(), {TEACHER.version}) == TEACHER.version
    assert refine.teacher_of(student(), set()) is None
    assert refine.teacher_of(TEACHER, {TEACHER.version}) is None


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_a_picture_is_one_step_of_the_teacher_and_then_the_student_s_sampler(solver: str) -> None:
    teacher = toy.student(toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True, solver=solver)
    made = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version, solver=solver)
    found = sample(made, ["a red circle"], [7], 4, aid=Aid(teacher, FIRST_STEP))

    cond, x = made.family.encode(["a red circle"]), noise(7, 0, made.latent_shape)[None]
    first = teacher.manifest.plan(4)[:1]
    alone = solvers.make(solver, teacher.process, "flow", first)
    pred = teacher.family.denoise(x, torch.tensor([1.0]), cond, torch.tensor([0.75]), [2.0])
    x = alone.advance(State(x, 0), pred).x
    rest = solvers.make(solver, made.process, "flow", made.manifest.plan(4)[1:])
    state = State(x, 0)
    while not rest.done(state):
        t, s = (torch.tensor([time]) for time in (rest.plan[state.i].t, rest.plan[state.i].s))
        state = rest.advance(state, made.family.denoise(state.x, t, cond, s, [None]))
    assert torch.equal(found, made.family.decode(state.x))
    assert not torch.equal(found, sample(made, ["a red circle"], [7], 4))
    assert not torch.equal(found, sample(teacher, ["a red circle"], [7], 4))
