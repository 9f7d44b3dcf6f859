"""Rewards: the alignment that the teacher sees in closed form, and a held-out score beside what is climbed."""

from typing import Any

import pytest
import torch

from distill_jobs import times
from distill_jobs.batches import repeated
from distill_jobs.roles import Cast
from distill_jobs.terms.base import Wanted
from distill_jobs.terms.rewards import alignment
from distill_jobs.terms.rewards.colourfulness import Colourfulness
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


def test_the_distance_of_two_samples_of_a_condition_is_reported_and_falls_with_variety() -> None:
    def distance(std: float) -> float:
        one, wide = term_of("reward", RF(), "flow", std=std), repeated(batch_of(512), 2)
        return float(one.report(samples(one, wide).detach(), wide)["distance"])

    assert type(term_of("reward", RF(), "flow")).samples == 2
    assert distance(STD) == pytest.approx(2**0.5 * STD, rel=0.03)
    assert distance(0.01) < 0.05 * distance(STD)


def test_alignment_needs_a_guided_teacher_and_a_reward_a_file() -> None:
    with pytest.raises(InvalidRequest, match="needs a guided teacher"):
        term_of("reward", RF(), "flow", teacher=teacher_of(RF(), "flow").denoiser)
    with pytest.raises(UnknownPlugin, match="choose from alignment, colourfulness, contrast"):
        term_of("reward", RF(), "flow", settings={"reward": "beauty"})


# pictures ------------------------------------------------------------------------------------------------------------


def pictured(**cast: Any) -> Cast:
    teacher = teacher_of(RF(), "flow")
    return Cast(teacher, student=teacher.denoiser, **cast)


def test_colourfulness_is_the_spread_and_the_distance_from_grey_of_what_is_decoded() -> None:
    """Half of the pixels are red, half blue: rg is 255 or 0, yb is 255 / 2 or -255."""
    red_and_blue = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    red_and_blue[:, 0, 0], red_and_blue[:, 2, 1] = 255, 255
    grey = torch.full_like(red_and_blue, 77)
    reward = Colourfulness(pictured(decode=lambda y: y + grey))
    none, some = (float(reward(y, batch_of(1))) for y in (0 * grey, red_and_blue))
    spread, tint = ((255 / 2) ** 2 + (255 * 3 / 4) ** 2) ** 0.5, ((255 / 2) ** 2 + (255 / 4) ** 2) ** 0.5
    assert none == pytest.approx(0, abs=0.1)
    assert some == pytest.approx(spread + 0.3 * tint, rel=1e-4)


def test_a_reward_of_pictures_has_a_slope_through_the_decoder() -> None:
    """Twice as far from grey is twice as colourful, so the slope along y is the reward itself."""

    def decode(y: torch.Tensor) -> torch.Tensor:
        return 128 + 20 * torch.cat([y, 0 * y[:, :1]], dim=1)

    y = batch_of(4).noise.requires_grad_()
    colours = Colourfulness(pictured(decode=decode))(y, batch_of(4)).sum()
    (slope,) = torch.autograd.grad(colours, y)
    assert float((y.detach() * slope).sum()) == pytest.approx(float(colours.detach()), rel=1e-3)


def test_a_reward_of_pictures_needs_a_decoder() -> None:
    term, config = Wanted("reward", settings={"reward": "colourfulness"}).resolve()
    with pytest.raises(InvalidRequest, match="there is no decoder"):
        term(pictured(), config)
