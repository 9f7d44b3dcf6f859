"""Rewards: the alignment that the teacher sees in closed form, and a held-out score beside what is climbed."""

from typing import Any

import pytest
import torch

from distill_jobs import times
from distill_jobs.terms.rewards import alignment
from engines.errors import InvalidRequest, UnknownPlugin
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import MEAN, NULL_MEAN, STD, batch_of, teacher_of
from tests.unit.distill_jobs.oracle import every_kind, every_process
from tests.unit.distill_jobs.terms.oracle import samples, term_gradients, term_of


@every_kind
@every_process
def test_the_alignment_gradient_is_the_closed_forms(
    process: Process, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T_m(y_t) - y = (1 - k a)(m - y) + k s eps, so the reward rises by 2 (1 - k a)^2 (m_c - m_null) per unit."""
    monkeypatch.setattr(alignment, "_LEVELS", times.Uniform(0.5, 0.5))
    t = times.on(process, torch.tensor([0.5], dtype=torch.float64))
    a, s = float(process.alpha(t)), float(process.sigma(t))
    left = s**2 / (a**2 * STD**2 + s**2)  # 1 - k a
    slope = 2 * left**2 * (MEAN - NULL_MEAN)
    by_mean, by_std = term_gradients("reward", process, kind, rows=64)
    assert by_mean == pytest.approx(-slope)
    assert abs(by_std) < 0.1 * slope


def test_alignment_tells_the_condition_from_none() -> None:
    one, batch = term_of("reward", RF(), "flow", shift=0.0), batch_of(512)
    other = term_of("reward", RF(), "flow", shift=NULL_MEAN - MEAN)
    assert one.reward(samples(one, batch), batch).mean() > 0.1  # type: ignore[attr-defined]
    assert other.reward(samples(other, batch), batch).mean() < -0.1  # type: ignore[attr-defined]


def test_alignment_with_the_conditions_exchanged_fails_the_oracle() -> None:
    class Exchanged(alignment.Alignment):
        def __call__(self, *args: Any) -> torch.Tensor:
            return -super().__call__(*args)

    right = term_of("reward", RF(), "flow")
    wrong = Exchanged(right.cast)
    batch = batch_of(64)
    assert (
        wrong(samples(right, batch), batch).mean() < 0 < right.reward(samples(right, batch_of(64)), batch_of(64)).mean()
    )  # type: ignore[attr-defined]


def test_the_held_out_reward_is_reported_and_is_another_one() -> None:
    one, batch = term_of("reward", RF(), "flow"), batch_of(256)
    y = samples(one, batch).detach()
    seen = one.report(y, batch)
    assert float(seen["held_out"]) == pytest.approx(float(y.flatten(2).std(dim=2, unbiased=False).mean()), rel=1e-4)


def test_alignment_needs_a_guided_teacher_and_a_reward_a_file() -> None:
    with pytest.raises(InvalidRequest, match="needs a guided teacher"):
        term_of("reward", RF(), "flow", teacher=teacher_of(RF(), "flow").denoiser)
    with pytest.raises(UnknownPlugin, match="choose from alignment, contrast"):
        term_of("reward", RF(), "flow", settings={"reward": "beauty"})
