"""What is made of leases: what a picture costs by its plan, and whose a version's requests are."""

import pytest

from engines.manifest import Judge
from engines.refine import CORRECTION, FIRST_STEP, Refinement
from server.leases import Evaluations, VersionState, WorkerLease, elsewhere_ms, evaluations
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


def test_a_version_is_left_to_who_has_it_for_as_long_as_a_load_would_take_here() -> None:
    def lease(**states: tuple[str, float]) -> WorkerLease:
        return WorkerLease(
            versions={"toys": {name: VersionState(state=state, ready_in_s=s) for name, (state, s) in states.items()}}
        )

    loads = {name: ("on_demand", load_s) for name, load_s in {"a": 0.7, "b": 30.0, "c": 0.0, "e": 1.0}.items()}
    mine = lease(**loads, d=("resident", 0.0))
    others = [
        lease(a=("resident", 0.0), c=("resident", 0.0), d=("resident", 0.0), e=("on_demand", 0.5)),
        lease(b=("loading", 9.0)),
    ]
    assert elsewhere_ms(mine, others) == {"a": 700, "b": 2000, "c": 100}
    assert elsewhere_ms(mine, [mine]) == {}
