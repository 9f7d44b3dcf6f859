"""The moment term is at rest at the teacher's distribution and points back to it, for every process and prediction."""

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.terms.moment import Moment
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import STD, batch_of
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process, other_guidance
from tests.unit.distill_jobs.terms.oracle import samples, term_gradients, term_of


@every_kind
@every_process
def test_moments_rest_at_the_truth_and_point_back_to_it(process: Process, kind: Kind) -> None:
    at = term_gradients("moment", process, kind)
    assert at == pytest.approx((0, 0), abs=0.01)
    for side in (-1, 1):
        by_mean, _ = term_gradients("moment", process, kind, shift=TRUTH + side * 0.5)
        _, by_std = term_gradients("moment", process, kind, std=STD * (1.5 if side > 0 else 0.6))
        assert side * by_mean > 0.2
        assert side * by_std > 0.02


class WrongSign(Moment):
    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return -super().student_loss(y, batch)


def test_moments_with_the_wrong_sign_fail_the_oracle() -> None:
    assert term_gradients("moment", RF(), "flow", shift=TRUTH + 0.5, term=WrongSign)[0] < -0.02


def test_moments_with_the_other_guidance_convention_fail_the_oracle() -> None:
    assert abs(term_gradients("moment", RF(), "flow", teacher=other_guidance(RF(), "flow"))[0]) > 0.02


def test_the_mean_over_batches_has_no_share_of_their_variance() -> None:
    """At the truth a square of one batch's moments would be above 0 by their variance; the halves' product is not."""
    one = term_of("moment", RF(), "flow")
    with torch.no_grad():
        batches = [batch_of(16, seed) for seed in range(40)]
        losses = torch.stack([one.student_loss(samples(one, batch), batch) for batch in batches])
    assert losses.mean().abs() < 3 * losses.std() / 40**0.5
    assert (losses < 0).any()


def test_one_row_has_no_halves() -> None:
    one = term_of("moment", RF(), "flow")
    with pytest.raises(InvalidRequest, match="batch must be 2 or more"):
        one.student_loss(samples(one, batch_of(1)), batch_of(1))
