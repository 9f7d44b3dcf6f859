"""The Fréchet distance against closed forms, and its bootstrap interval."""

import numpy as np
import pytest

from distill_jobs.evaluate import frechet
from distill_jobs.evaluate.frechet import Gaussian


def rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def normal(n: int, seed: int, *, mean: float = 0.0, dims: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, size=(n, dims))


def test_commuting_covariances_have_the_closed_form() -> None:
    a = Gaussian(np.array([1.0, -2.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([0.0, 1.0]), np.diag([1.0, 16.0]))
    assert frechet.distance(a, b) == pytest.approx((1 + 9) + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_covariances_that_do_not_commute_cost_their_optimal_transport() -> None:
    """A symmetric positive A moves N(0, S) to N(0, A S A) at the least cost, E|A x − x|² = tr((A−1) S (A−1))."""
    s = rotation(0.4) @ np.diag([5.0, 0.3]) @ rotation(0.4).T
    a = rotation(-0.9) @ np.diag([2.0, 0.5]) @ rotation(-0.9).T
    zero, off = np.zeros(2), a - np.eye(2)
    found = frechet.distance(Gaussian(zero, s), Gaussian(zero, a @ s @ a))
    assert found == pytest.approx(np.trace(off @ s @ off))


def test_it_is_symmetric_and_zero_only_at_itself() -> None:
    a, b = frechet.fit(normal(50, 1)), frechet.fit(normal(50, 2, mean=0.3))
    assert frechet.distance(a, b) == pytest.approx(frechet.distance(b, a))
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet.distance(a, b) > 0.3


def test_fewer_pictures_than_dimensions_stay_finite() -> None:
    few, many = frechet.fit(normal(5, 1, dims=40)), frechet.fit(normal(500, 2, dims=40))
    assert 0 < frechet.distance(few, many) < 80


def test_a_fit_finds_mean_and_covariance() -> None:
    rows = normal(20_000, 3, dims=2) @ np.array([[2.0, 0.0], [1.0, 1.0]]) + [5.0, -1.0]
    found = frechet.fit(rows)
    np.testing.assert_allclose(found.mean, [5, -1], atol=0.06)
    np.testing.assert_allclose(found.covariance, [[5, 1], [1, 1]], atol=0.15)


def test_a_weight_of_two_is_a_row_that_is_there_twice() -> None:
    rows = normal(6, 4)
    weighted = frechet.fit(rows, np.array([2.0, 1, 0, 1, 1, 1]))
    repeated = frechet.fit(rows[[0, 0, 1, 3, 4, 5]])
    np.testing.assert_allclose(weighted.mean, repeated.mean)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance)


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet.fit(normal(1, 0))


def test_the_floor_falls_with_the_number_of_pictures() -> None:
    target = frechet.fit(normal(20_000, 5))
    floors = [frechet.distance(frechet.fit(normal(n, 6)), target) for n in (100, 400, 1600)]
    assert floors[0] > 2 * floors[1] > 4 * floors[2]


def test_the_interval_holds_the_distance_of_other_samples_of_the_same_size() -> None:
    target = frechet.fit(normal(20_000, 5))
    found = frechet.interval(normal(500, 7, mean=0.5), target, np.arange(500))
    others = [frechet.distance(frechet.fit(normal(500, seed, mean=0.5)), target) for seed in range(100, 140)]
    inside = [found.low - 0.05 <= other <= found.high + 0.05 for other in others]
    assert np.mean(inside) > 0.75
    assert found.high - found.low < 0.6


def test_resampling_repeats_does_not_lift_the_interval_off_the_value() -> None:
    rows, target = normal(200, 7, dims=20), frechet.fit(normal(20_000, 5, dims=20))
    found = frechet.interval(rows, target, np.arange(200))
    assert found.low < frechet.distance(frechet.fit(rows), target) < found.high


def test_pictures_of_one_caption_are_resampled_together() -> None:
    captions = np.repeat(normal(50, 8, mean=1.0), 8, axis=0)  # eight equal pictures each
    target, groups = frechet.fit(normal(5000, 5)), np.arange(400) // 8
    together = frechet.interval(captions, target, groups)
    alone = frechet.interval(captions, target, np.arange(400))
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_a_ratio_of_answers_to_the_same_questions_has_no_width_where_they_are_equal() -> None:
    rows, target = normal(300, 9, mean=0.4), frechet.fit(normal(5000, 5))
    found = frechet.ratio_interval(rows, rows, target, np.arange(300))
    assert (found.low, found.high) == pytest.approx((1, 1))
    worse = frechet.ratio_interval(rows + 0.6, rows, target, np.arange(300))
    assert worse.low > 2


def test_a_bootstrap_can_be_stopped_before_every_resample() -> None:
    rows, target, asked = normal(60, 1), frechet.fit(normal(60, 2)), [0]

    def check() -> None:
        asked[0] += 1
        if asked[0] == 4:
            raise InterruptedError

    judged = [0]

    def statistic(weights: np.ndarray) -> float:
        judged[0] += 1
        return frechet.distance(frechet.fit(rows, weights), target)

    with pytest.raises(InterruptedError):
        frechet.bootstrap(statistic, np.arange(60), check=check)
    assert judged == [1 + 3]  # the rows as they are, and three resamples
