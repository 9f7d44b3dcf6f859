"""Corrections of a teacher whose word is known: what they come to by hand, and whose steps are whose."""

import pytest
import torch

from engines import refine, solvers
from engines.corrected import Corrected
from engines.errors import InvalidRequest
from engines.manifest import ProcessSpec, Step
from engines.process import make
from engines.refine import CORRECTION
from engines.solvers import State
from engines.student import Aid, sample
from tests.unit.server import toy

TEACHER = toy.manifest("teacher", weights="t", guided=True)


def of(times: list[tuple[float, float, bool]], process: ProcessSpec, eta: float = 0.0) -> Corrected:
    plan = [
        Step(net="denoiser", t=t, s=s, w=None, eta=0.0 if by_teacher else eta, by_teacher=by_teacher)
        for t, s, by_teacher in times
    ]
    own = [step for step in plan if not step.by_teacher]
    return Corrected(solvers.make("ddim", make(process), "x0", own), plan)


def test_the_teacher_is_asked_after_each_of_the_first_half_of_the_steps() -> None:
    plan = refine.plan(toy.manifest("student", base=TEACHER.version, eta=1.0), TEACHER, 4, None, CORRECTION)
    assert [(step.t, step.s, step.w, step.eta, step.by_teacher) for step in plan] == [
        (1.0, 0.75, None, 1.0, False),
        (0.75, 0.75, 2.0, 0.0, True),
        (0.75, 0.5, None, 1.0, False),
        (0.5, 0.5, 2.0, 0.0, True),
        (0.5, 0.25, None, 1.0, False),
        (0.25, 0.0, None, 1.0, False),
    ]


@pytest.mark.parametrize("kind", ["rf", "vp", "edm", "trig"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_teacher_who_knows_the_picture_takes_all_of_the_student_s_error_away(kind: str, eta: float) -> None:
    """Data of one point m: the teacher's estimate is m anywhere, and what is left is m under the same noise."""
    process = make(ProcessSpec(kind=kind))
    rule = of([(0.9, 0.5, False), (0.5, 0.5, True), (0.5, 0.0, False)], ProcessSpec(kind=kind), eta)
    torch.manual_seed(0)
    m, fresh = torch.full((2, 1, 2, 2), 0.7), torch.randn(2, 1, 2, 2)
    eps = torch.randn(2, 1, 2, 2)
    t, s = torch.tensor([0.9]), torch.tensor([0.5])
    start = State(process.mix(m, eps, t), 0)
    wrong = rule.advance(start, m + 0.3, fresh if eta else None)
    right = rule.advance(start, m, fresh if eta else None)
    corrected = rule.advance(wrong, m)
    assert rule.needs_noise(start) == bool(eta)
    assert (rule.target(wrong), corrected.i, corrected.history) == (0.0, 2, ())
    noise = fresh if eta else (wrong.x - process.alpha(s) * (m + 0.3)) / process.sigma(s)
    assert torch.allclose(corrected.x, process.mix(m, noise, s), atol=1e-6)
    assert torch.allclose(rule.advance(right, m).x, right.x, atol=1e-6)
    assert torch.allclose(rule.advance(corrected, m).x, m, atol=1e-6)


def test_what_the_two_agree_on_stays_bit_for_bit() -> None:
    rule = of([(1.0, 0.5, False), (0.5, 0.5, True), (0.5, 0.0, False)], ProcessSpec())
    x, x0 = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    after = rule.advance(State(x, 0), x0)
    assert torch.equal(rule.advance(after, x0).x, after.x)


def test_a_student_that_remembers_its_estimates_is_refused() -> None:
    student = toy.manifest("student", base=TEACHER.version, solver="dpmpp_2m")
    with pytest.raises(InvalidRequest, match="earlier estimates"):
        refine.plan(student, TEACHER, 4, None, CORRECTION)
    with pytest.raises(InvalidRequest, match=r"refine=correction cannot be had: .* takes one step"):
        refine.plan(toy.manifest("student", base=TEACHER.version), TEACHER, 1, None, CORRECTION)


def test_a_corrected_picture_is_the_same_in_any_batch() -> None:
    teacher = toy.student(toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True)
    student = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version, eta=1.0)
    aid, prompts, seeds = Aid(teacher, CORRECTION), ["a red circle", "a ring", "two"], [7, 8, 9]
    together = sample(student, prompts, seeds, 4, aid=aid)
    alone = [sample(student, [prompt], [seed], 4, aid=aid)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, sample(student, prompts, seeds, 4))
