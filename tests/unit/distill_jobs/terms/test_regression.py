"""The regression term is zero where the student's jump ends as the teacher's path does, and not beside it."""

from typing import Any

import pytest

from distill_jobs import times
from distill_jobs.terms.regression import Regression
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import STD, batch_of, exact_pairs
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, other_guidance, top
from tests.unit.distill_jobs.terms.oracle import term_loss, term_of


def on_pairs(process: Process, kind: Kind, distance: str = "latent", **parts: Any) -> float:
    """On exact trajectories that the batch holds."""
    one = term_of("regression", process, kind, settings={"share": 1.0, "distance": distance, "start": 1.0}, **parts)
    pairs = exact_pairs(process, batch_of().noise, times.grid(process, (top(kind), 0.5))[:-1])
    one.config = one.config.model_copy(update={"start": top(kind)})
    return term_loss(one, batch_of(pair=pairs))


@every_kind
@every_process
@pytest.mark.parametrize("reads_s", [True, False], ids=["flow map", "plain network"])
@pytest.mark.parametrize("distance", ["latent", "features"])
def test_regression_is_zero_at_the_true_endpoint_map_only(
    process: Process, kind: Kind, reads_s: bool, distance: str
) -> None:
    assert on_pairs(process, kind, distance, reads_s=reads_s) < 1e-6
    assert on_pairs(process, kind, distance, reads_s=reads_s, shift=TRUTH + OFF) > 0.02
    assert on_pairs(process, kind, distance, reads_s=reads_s, std=1.2 * STD) > 0.01


def followed(kind: Kind = "flow", process: Process | None = None, **parts: Any) -> float:
    """On trajectories that the term follows itself."""
    settings = {"share": 0.5, "teacher_steps": 64, "start": top(kind)}
    return term_loss(term_of("regression", process or RF(), kind, settings=settings, **parts), batch_of())


@every_kind
@every_process
def test_regression_follows_the_teacher_where_the_batch_has_no_trajectories(process: Process, kind: Kind) -> None:
    assert followed(kind, process) < 5e-3  # the teacher's path has steps
    assert followed(kind, process, shift=TRUTH + OFF) > 0.05
    assert followed(kind, process, std=1.2 * STD) > 0.02


def test_regression_on_the_other_guidance_convention_fails_the_oracle() -> None:
    assert followed(teacher=other_guidance(RF(), "flow")) > 0.1


class Backwards(Regression):
    """Asks the start to be where the end is."""

    def _ends(self, *args: Any) -> Any:
        start, end = super()._ends(*args)
        return end, start


def test_regression_with_time_reversed_fails_the_oracle() -> None:
    assert on_pairs(RF(), "flow", term=Backwards) > 0.1
