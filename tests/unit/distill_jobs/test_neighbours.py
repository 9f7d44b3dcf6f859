"""Precision, recall, density and coverage on sets whose figures are known."""

import numpy as np
import pytest

from distill_jobs.evaluate import neighbours
from distill_jobs.evaluate.density_coverage import density_coverage
from distill_jobs.evaluate.neighbours import MOST_ROWS, distances, radii
from distill_jobs.evaluate.precision_recall import precision_recall


def normal(n: int, seed: int, dims: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dims))


def line(start: float, n: int = 1000) -> np.ndarray:
    """Evenly spaced points of a segment of length 1, each a hair beside those of another segment."""
    return (start + np.arange(n) / n)[:, None]


def test_distances_do_not_depend_on_the_chunk() -> None:
    a, b = normal(10, 0), normal(7, 1)
    plain = np.linalg.norm(a[:, None] - b[None], axis=-1)
    for chunk in (1, 3, 100):
        np.testing.assert_allclose(np.concatenate(list(distances(a, b, chunk=chunk))), plain, atol=1e-7)


def test_a_radius_reaches_to_the_kth_other_row() -> None:
    rows = np.array([[0.0], [1.0], [3.0], [7.0]])
    np.testing.assert_allclose(radii(rows, 1), [1, 1, 2, 4], atol=1e-6)
    np.testing.assert_allclose(radii(rows, 2), [3, 2, 3, 6], atol=1e-6)
    with pytest.raises(ValueError, match="more than 4 pictures"):
        radii(rows, 4)


def test_a_set_against_itself_is_perfect() -> None:
    rows = normal(300, 0)
    found = precision_recall(rows, rows)
    assert (found.precision, found.recall) == (1, 1)
    assert density_coverage(rows, rows).coverage == 1
    # A ball holds its centre and the k − 1 nearer than the k-th, which stands on the edge and may round either way.
    assert 1 <= density_coverage(rows, rows).density <= 6 / 5


def test_sets_apart_share_nothing() -> None:
    near, far = normal(200, 0), normal(200, 1) + 100
    found, counted = precision_recall(far, near), density_coverage(far, near)
    assert (found.precision, found.recall, counted.density, counted.coverage) == (0, 0, 0, 0)


def test_a_segment_moved_by_a_third_shares_two_thirds() -> None:
    found, counted = precision_recall(line(1 / 3 + 1e-5), line(0)), density_coverage(line(1 / 3 + 1e-5), line(0))
    assert (found.precision, found.recall) == pytest.approx((2 / 3, 2 / 3), abs=0.01)
    assert counted.coverage == pytest.approx(2 / 3, abs=0.01)
    assert counted.density == pytest.approx(2 / 3 * 6 / 5, abs=0.01)  # a ball of this grid holds six made points


def test_a_lost_mode_costs_recall_and_coverage_and_nothing_else() -> None:
    real = np.concatenate([normal(300, 0), normal(300, 1) + 50])
    made = np.concatenate([normal(300, 2), normal(300, 3)])
    found, counted = precision_recall(made, real), density_coverage(made, real)
    assert found.precision > 0.8
    assert 0.4 < found.recall <= 0.5
    assert counted.density == pytest.approx(1, abs=0.15)
    assert 0.4 < counted.coverage <= 0.5


def test_stray_pictures_cost_precision_and_not_recall() -> None:
    real = normal(400, 0)
    made = np.concatenate([normal(300, 1), normal(100, 2) * 40 + 400])
    clean = precision_recall(normal(400, 3), real)
    found = precision_recall(made, real)
    assert found.precision == pytest.approx(0.75 * clean.precision, abs=0.05)
    assert found.recall > 0.8


def test_one_stray_real_picture_spoils_precision_and_not_density() -> None:
    """Naeem et al., section 3: a ball round an outlier is wide, and holds whatever is made near it."""
    real = np.concatenate([normal(200, 0, dims=2), [[30.0, 0.0]]])
    made = normal(100, 1, dims=2) + np.array([25.0, 0.0])
    assert precision_recall(made, real).precision == 1
    assert density_coverage(made, real).density < 0.3


@pytest.mark.parametrize("k", [1, 3, 5])
def test_two_samples_of_one_distribution_have_the_expectations_of_the_paper(k: int) -> None:
    """Naeem et al., lemmas 1 and 2: density 1, coverage 1 − (N−1)…(N−k)/((2N−1)…(2N−k)), whatever the distribution."""
    n, found = 200, [density_coverage(normal(200, i), normal(200, 1000 + i), k=k) for i in range(30)]
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    assert np.mean([one.coverage for one in found]) == pytest.approx(expected, abs=0.01)
    assert np.mean([one.density for one in found]) == pytest.approx(1, abs=0.03)


def test_only_the_first_rows_of_large_sets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_ROWS == 2000
    monkeypatch.setattr(neighbours, "MOST_ROWS", 50)
    rows = normal(60, 0)
    other = np.concatenate([rows[:50], rows[50:] + 100])
    assert precision_recall(other, rows).precision == 1
    assert density_coverage(other, rows).coverage == 1
