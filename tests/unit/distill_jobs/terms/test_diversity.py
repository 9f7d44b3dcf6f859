"""The diversity term is zero where the student's first jump follows the teacher, and not beside it."""

from typing import Any

import pytest

from distill_jobs.batches import Batch
from distill_jobs.terms import diversity
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import STD, batch_of
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, other_guidance, top
from tests.unit.distill_jobs.terms.oracle import term_loss, term_of


def loss(process: Process, kind: Kind, batch: Batch | None = None, **parts: Any) -> float:
    settings = {"start": top(kind), "anchor": 0.5, "teacher_steps": 64}
    return term_loss(term_of("diversity", process, kind, settings=settings, **parts), batch or batch_of())


@every_kind
@every_process
def test_diversity_is_zero_where_the_first_jump_is_the_teachers_only(process: Process, kind: Kind) -> None:
    assert loss(process, kind) < 0.01  # the teacher's path has steps
    assert loss(process, kind, shift=TRUTH + OFF) > 0.03
    assert loss(process, kind, std=1.2 * STD) > 0.02


def test_diversity_with_the_other_guidance_convention_fails_the_oracle() -> None:
    assert loss(RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.1


def test_diversity_with_the_teachers_path_reversed_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = diversity.trajectory

    def backwards(*args: Any, **options: Any) -> Any:
        return forwards(*args, **options)[::-1]

    monkeypatch.setattr(diversity, "trajectory", backwards)
    assert loss(RF(), "flow") > 0.1


def test_a_student_that_makes_one_picture_of_every_noise_misses_the_anchors_spread() -> None:
    """Halfway, samples of deviation d stand (1 + d^2)^.5 / 2 apart; per unit of level that is twice as much."""
    missing = (1 + STD**2) ** 0.5 - 1
    assert loss(RF(), "flow", std=1e-3) == pytest.approx(missing, rel=0.05)


def test_the_anchor_lies_below_the_start() -> None:
    with pytest.raises(InvalidRequest, match=r"anchor 0\.9 must lie below start 0\.9"):
        term_of("diversity", RF(), "flow", settings={"start": 0.9, "anchor": 0.9})
