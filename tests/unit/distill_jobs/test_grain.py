"""Grain and saturation on pictures whose figures are known."""

import math

import numpy as np
import pytest

from distill_jobs.evaluate import grain
from distill_jobs.evaluate.pixels import levels
from distill_jobs.teachers.shapes import data


def plain(level: float = 100.0, n: int = 2, side: int = 32) -> np.ndarray:
    return np.full((n, 3, side, side), level, dtype=np.float32)


def noisy(sigma: float, n: int = 4) -> np.ndarray:
    pictures = plain(128, n=n)
    return pictures + np.random.default_rng(0).normal(0, sigma, pictures.shape).astype(np.float32)


def test_a_plain_picture_and_an_even_ramp_have_none() -> None:
    ramp = plain() + np.arange(32, dtype=np.float32)
    assert grain.grain(plain()) == 0
    assert grain.grain(ramp) == pytest.approx(0, abs=1e-4)


def test_a_chequered_picture_has_eight_times_its_amplitude() -> None:
    board = np.where(np.indices((32, 32)).sum(0) % 2, 1.5, -1.5).astype(np.float32)
    assert grain.grain(plain() + board) == pytest.approx(8 * 1.5)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_gaussian_grain_of_a_flat_picture_has_the_closed_form(sigma: float) -> None:
    expected = sigma * math.sqrt(20) * math.sqrt(2 / math.pi)  # the kernel's norm times E|z|
    assert grain.grain(noisy(sigma)) == pytest.approx(expected, rel=0.05)


def test_edges_do_not_count() -> None:
    assert grain.grain(data.sample(32, 0).pixels) < 1e-3
    halves = plain()
    halves[..., 16:] += 24
    assert grain.grain(halves) == 0


def test_an_edge_in_one_channel_is_an_edge() -> None:
    halves = plain()
    halves[:, 2, :, 16:] += 24
    assert grain.grain(halves) == 0
    halves[:, 2, :, 16:] -= 1  # a range of 23 is flat, and its step is grain
    assert grain.grain(halves) > 0


def test_a_picture_of_nothing_but_grain_does_not_pass_as_flat() -> None:
    assert grain.grain(noisy(60)) > grain.grain(noisy(3)) > 5


def test_more_grain_scores_higher() -> None:
    scores = [grain.grain(noisy(sigma)) for sigma in (0, 0.3, 1, 3, 6, 12)]
    assert scores == sorted(scores)


def test_rounding_alone_makes_a_level_of_grain() -> None:
    faint = noisy(0.3)
    assert grain.grain(levels(faint)) < grain.grain(faint) < 1.2
    assert grain.grain(levels(noisy(0.5))) == pytest.approx(grain.grain(noisy(0.5)), rel=0.3)


def test_batches_add_up_to_the_whole() -> None:
    pictures = np.concatenate([noisy(1, n=20), plain(n=3)])
    tally = grain.GrainTally()
    for start in range(0, 23, 5):
        tally.add(pictures[start : start + 5])
    assert tally.mean() == pytest.approx(grain.grain(pictures))


def test_the_ratio_to_a_teacher_without_grain_is_finite() -> None:
    assert grain.ratio(0.0, 0.0) == 1
    assert grain.ratio(0.75, 0.0) == 4


def test_saturation_is_the_mean_distance_between_strongest_and_weakest_channel() -> None:
    pictures = plain(100).astype(np.uint8)
    assert grain.saturation(pictures) == 0
    pictures[:, 1] = 160
    pictures[:, 2, :16] = 80
    assert grain.saturation(pictures) == pytest.approx((80 + 60) / 2)
