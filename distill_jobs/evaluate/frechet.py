"""Fréchet distance between Gaussian fits of two feature sets, with its bootstrap interval.

|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), the distance known from FID. Square roots by symmetric eigenvalues: they
stay real for the rank-deficient covariances of few pictures, where a general matrix root does not.

Source: Dowson and Landau 1982; arXiv 1706.08500, section "FID".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
AnyFloats = npt.NDArray[np.floating]
Check = Callable[[], None]
"""Called between pieces of work; it may raise to stop them."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a feature set."""

    mean: Doubles
    covariance: Doubles


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


def fit(features: AnyFloats, weights: Doubles | None = None) -> Gaussian:
    """Gaussian of features [N, D]; `weights` [N] counts rows (a row of weight 2 is there twice)."""
    rows = np.asarray(features, dtype=np.float64)
    counts = np.ones(len(rows)) if weights is None else weights
    total = counts.sum()
    if total < 2:
        raise ValueError(f"a covariance needs at least 2 pictures, not {total:g}")
    mean = counts @ rows / total
    centred = rows - mean
    return Gaussian(mean, (centred * counts[:, None]).T @ centred / (total - 1))


def distance(a: Gaussian, b: Gaussian) -> float:
    return _distance(a, b, _root(b.covariance))


def bootstrap(
    statistic: Callable[[Doubles], float],
    groups: npt.NDArray[np.int64],
    *,
    rounds: int = 100,
    seed: int = 0,
    check: Check = lambda: None,
) -> Interval:
    """95 % interval of `statistic(weights)` by resampling whole groups of rows (the pictures of one caption); `check`
    is called before each resample.

    A resampled set repeats pictures, which moves a Fréchet distance up by about one floor. The interval is therefore
    the spread round the mean of the resampled values, put round the value itself.
    """
    rng = np.random.default_rng([seed, 71])
    num_groups = int(groups.max()) + 1
    plain = statistic(np.ones(len(groups)))
    draws = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=rounds)
    values = np.zeros(rounds)
    for i, draw in enumerate(draws):
        check()
        values[i] = statistic(draw[groups].astype(np.float64))
    low, high = np.quantile(values - values.mean(), (0.025, 0.975))
    return Interval(max(0.0, plain + float(low)), plain + float(high))


def interval(
    features: AnyFloats,
    target: Gaussian,
    groups: npt.NDArray[np.int64],
    *,
    rounds: int = 100,
    check: Check = lambda: None,
) -> Interval:
    """Bootstrap interval of the distance of `features` to a fixed target."""
    rows, root = np.asarray(features, dtype=np.float64), _root(target.covariance)
    return bootstrap(lambda weights: _distance(fit(rows, weights), target, root), groups, rounds=rounds, check=check)


def ratio_interval(
    features: AnyFloats,
    others: AnyFloats,
    target: Gaussian,
    groups: npt.NDArray[np.int64],
    *,
    rounds: int = 100,
    check: Check = lambda: None,
) -> Interval:
    """Bootstrap interval of one set's distance over another's, where row i of both answers the same question."""
    a, b, root = np.asarray(features, dtype=np.float64), np.asarray(others, dtype=np.float64), _root(target.covariance)

    def ratio(weights: Doubles) -> float:
        return _distance(fit(a, weights), target, root) / _distance(fit(b, weights), target, root)

    return bootstrap(ratio, groups, rounds=rounds, check=check)


def _distance(a: Gaussian, b: Gaussian, root_b: Doubles) -> float:
    cross = np.linalg.eigvalsh(root_b @ a.covariance @ root_b).clip(0)
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum()
    return max(0.0, float(np.square(a.mean - b.mean).sum() + spread))


def _root(covariance: Doubles) -> Doubles:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(values.clip(0))) @ vectors.T)
