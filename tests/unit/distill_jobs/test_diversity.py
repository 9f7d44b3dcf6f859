"""Diversity against distances that can be read off."""

import numpy as np
import pytest

from distill_jobs.evaluate import diversity


def test_it_is_the_mean_distance_between_pictures_of_one_caption() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [10.0, 1.0]])
    assert diversity.spread(features, np.array([0, 0, 1, 1])) == pytest.approx((5 + 1) / 2)


def test_all_pairs_of_a_caption_count_and_captions_weigh_the_same() -> None:
    features = np.array([[0.0], [1.0], [3.0], [0.0], [10.0]])
    assert diversity.spread(features, np.array([0, 0, 0, 1, 1])) == pytest.approx(((1 + 2 + 3) / 3 + 10) / 2)


def test_distances_between_captions_do_not_count() -> None:
    features = np.array([[0.0], [0.0], [100.0], [100.0]])
    assert diversity.spread(features, np.array([0, 0, 1, 1])) == 0


def test_a_caption_with_one_picture_says_nothing() -> None:
    features = np.array([[0.0], [2.0], [50.0]])
    assert diversity.spread(features, np.array([0, 0, 1])) == 2
    with pytest.raises(ValueError, match="at least two pictures"):
        diversity.spread(features, np.array([0, 1, 2]))


def test_the_order_of_the_pictures_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    features, groups, order = rng.normal(size=(12, 3)), np.arange(12) // 3, rng.permutation(12)
    assert diversity.spread(features, groups) == pytest.approx(diversity.spread(features[order], groups[order]))


def test_the_ratio_is_to_real_pictures() -> None:
    assert diversity.ratio(np.array([[0.0], [1.0]]), np.array([0, 0]), real_spread=4.0) == 0.25
