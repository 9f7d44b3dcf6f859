"""The Fréchet distance ranks the ways a generator fails: each is worse than real pictures, and worse the more of it."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from distill_jobs.evaluate import frechet
from distill_jobs.evaluate.features import FeatureNetwork
from distill_jobs.evaluate.reference import Reference
from distill_jobs.teachers.shapes import data

N = 400
FAR_MORE = 1.03  # each severity must add at least 3 %: more than noise of the same pictures can


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.load()


@pytest.fixture(scope="module")
def network(reference: Reference) -> FeatureNetwork:
    return reference.network


@pytest.fixture(scope="module")
def pictures() -> data.Pictures:
    return data.sample(N, 2024)


@pytest.fixture(scope="module")
def clean(network: FeatureNetwork, pictures: data.Pictures) -> np.ndarray:
    return network.observe(pictures.pixels).features


def blurred(pixels: np.ndarray, sigma_px: float) -> np.ndarray:
    reach = int(3 * sigma_px) + 1
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_px) ** 2)
    blurry = pixels.astype(np.float32)
    for axis in (2, 3):
        padded = np.pad(blurry, [(reach, reach) if i == axis else (0, 0) for i in range(4)], mode="edge")
        shifts = (np.take(padded, range(i, i + pixels.shape[axis]), axis=axis) for i in range(len(weights)))
        blurry = sum(w * part for w, part in zip(weights / weights.sum(), shifts, strict=True)).astype(np.float32)
    return blurry


def grainy(pixels: np.ndarray, sigma_levels: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(pixels.shape, dtype=np.float32)
    return pixels + noise * np.float32(sigma_levels)


def miscoloured(pixels: np.ndarray, share: float) -> np.ndarray:
    wrong = pixels.copy()
    count = int(share * len(pixels))
    wrong[:count] = wrong[:count, [1, 2, 0]]
    return wrong


def ranks(distances: list[float]) -> bool:
    return all(more > FAR_MORE * less for less, more in pairwise(distances))


@pytest.mark.parametrize(
    ("spoil", "severities"),
    [(blurred, (0.8, 1.3, 2.0)), (grainy, (3, 6, 12)), (miscoloured, (0.1, 0.3, 0.6))],
    ids=["blur", "grain", "wrong colours"],
)
def test_spoilt_pictures_rank_by_how_spoilt_they_are(
    spoil: Callable[[np.ndarray, float], np.ndarray],
    severities: tuple[float, ...],
    network: FeatureNetwork,
    reference: Reference,
    pictures: data.Pictures,
    clean: np.ndarray,
) -> None:
    spoilt = [network.observe(spoil(pictures.pixels, severity)).features for severity in severities]
    distances = [frechet.distance(frechet.fit(seen), reference.real) for seen in (clean, *spoilt)]
    assert ranks(distances), distances


def test_dropped_attribute_combinations_rank_by_their_number(network: FeatureNetwork, reference: Reference) -> None:
    many = data.sample(1500, 2025)
    seen = network.observe(many.pixels).features
    combinations = [(c, k) for c in range(len(data.COLOURS)) for k in range(len(data.KINDS))]
    order = np.random.default_rng(0).permutation(len(combinations))
    distances = []
    for dropped in (0, 4, 10, 18):
        gone = {combinations[i] for i in order[:dropped]}
        shown = [i for i, row in enumerate(many.attributes) if not gone & {*zip(row[3::4], row[2::4], strict=True)}]
        distances.append(frechet.distance(frechet.fit(seen[shown[:300]]), reference.real))  # as many each time
    assert ranks(distances), distances


def test_repeated_pictures_rank_by_how_often_they_repeat(reference: Reference, clean: np.ndarray) -> None:
    repeated = [np.repeat(clean[: N // times], times, axis=0) for times in (1, 2, 4, 16)]
    distances = [frechet.distance(frechet.fit(seen), reference.real) for seen in repeated]
    assert ranks(distances), distances
