"""The mode-seeking term pushes samples of one condition apart, and nowhere in particular."""

import pytest
from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.terms.mode_seeking import ModeSeeking
from engines.process import RF
from tests.unit.distill_jobs.closed_form import STD, batch_of
from tests.unit.distill_jobs.oracle import TRUTH
from tests.unit.distill_jobs.terms.oracle import samples, term_gradients, term_of


def test_the_loss_is_the_inverse_of_how_much_of_the_noises_distance_is_left() -> None:
    """Samples N(m, std^2) keep std of it: 1 / (std + floor), and -std / (std + floor)^2 by log std."""
    one, batch = term_of("mode_seeking", RF(), "flow"), batch_of()
    assert float(one.student_loss(samples(one, batch), batch)) == pytest.approx(1 / (STD + 0.1))
    assert term_gradients("mode_seeking", RF(), "flow", rows=64) == pytest.approx((0, -STD / (STD + 0.1) ** 2))


def test_the_push_is_harder_the_more_alike_samples_are_and_finite_where_they_are_one() -> None:
    def push(std: float) -> float:
        return -term_gradients("mode_seeking", RF(), "flow", rows=64, std=std, shift=TRUTH)[1] / std

    assert push(0.1) > 2 * push(STD)
    assert push(1e-9) < 1 / 0.1**2 + 1e-3


class Gathering(ModeSeeking):
    """The wrong sign: samples are drawn together."""

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return -super().student_loss(y, batch)


def test_mode_seeking_with_the_wrong_sign_fails_the_oracle() -> None:
    assert term_gradients("mode_seeking", RF(), "flow", rows=64, term=Gathering)[1] > 0.5


def test_what_it_reports_is_the_distance_of_the_samples() -> None:
    one, batch = term_of("mode_seeking", RF(), "flow"), batch_of(4096)
    distance = float(one.report(samples(one, batch).detach(), batch)["distance"])
    assert distance == pytest.approx(STD * 2**0.5, rel=0.03)
