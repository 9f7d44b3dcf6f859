"""The Fréchet distance at several sample counts, and the share of clipped values."""

import numpy as np
import pytest

from distill_jobs.evaluate import frechet
from distill_jobs.evaluate.clipping import clipped
from distill_jobs.evaluate.frechet import Gaussian
from distill_jobs.evaluate.questions import questions
from distill_jobs.evaluate.sizes import at_sizes

STANDARD = Gaussian(np.zeros(3), np.eye(3))


def test_each_count_is_the_distance_of_the_first_rows() -> None:
    rows, asked = np.random.default_rng(0).normal(0.5, size=(1200, 3)), questions(1200)
    resamples: list[None] = []
    found = at_sizes(rows, asked, STANDARD, rounds=20, check=lambda: resamples.append(None))
    assert len(resamples) == 2 * 20
    assert [one.n for one in found] == [500, 1000]
    for one in found:
        assert one.fd == frechet.distance(frechet.fit(rows[: one.n]), STANDARD)
        assert one.fd_ci[0] < one.fd < one.fd_ci[1]
        assert one.fd == pytest.approx(3 * 0.25, abs=0.15)


def test_more_pictures_narrow_the_interval() -> None:
    rows, asked = np.random.default_rng(1).normal(0.5, size=(2400, 3)), questions(2400)
    widths = [one.fd_ci[1] - one.fd_ci[0] for one in at_sizes(rows, asked, STANDARD, rounds=100)]
    assert widths[0] / widths[2] == pytest.approx(2, rel=0.4)  # a quarter of the pictures, twice the width


def test_a_count_that_is_not_reached_is_left_out() -> None:
    assert at_sizes(np.zeros((500, 3)), questions(500), STANDARD, rounds=20) == ()


def test_clipped_values_are_those_that_round_to_an_end_of_the_range() -> None:
    levels = np.zeros((1, 3, 2, 2), dtype=np.float32)
    levels[0, :, 0] = [[0.0, 0.5], [0.51, 254.5], [254.51, 255.0]]
    levels[0, :, 1] = 128
    assert clipped(levels) == pytest.approx(4 / 12)
    assert clipped(np.rint(levels).astype(np.uint8)) == pytest.approx(4 / 12)
