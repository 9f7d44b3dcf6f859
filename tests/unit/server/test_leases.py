"""What a picture costs by its plan, where a teacher has a part in it."""

import pytest

from engines.manifest import Judge
from engines.refine import CORRECTION, FIRST_STEP, Refinement
from server.leases import Evaluations, evaluations
from tests.unit.server import toy

TEACHER = toy.manifest("teacher", weights="t", guided=True, counts=(8,))
STUDENT = toy.manifest("student", base=TEACHER.version).judged(Judge(steps=8, doubts={2: (1.0,) * 10}))


def test_a_guided_teacher_s_step_is_two_rows_and_what_a_share_comes_to_is_expected_of_that_share() -> None:
    assert evaluations(STUDENT, 2) == Evaluations(2, 2.0)
    assert evaluations(STUDENT, 2, None, TEACHER, FIRST_STEP) == Evaluations(3, 3.0)
    assert evaluations(STUDENT, 4, None, TEACHER, CORRECTION) == Evaluations(8, 8.0)
    redone = evaluations(STUDENT, 2, None, TEACHER, Refinement("redo", 0.25))
    assert redone.most == 2 + 2 + 3 * 2  # its own, the judge's, and what is left of eight steps after the middle
    assert redone.expected == pytest.approx(2 + 2 + 0.25 * 3 * 2)
