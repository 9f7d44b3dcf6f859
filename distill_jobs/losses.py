"""Distances and pseudo-targets, as pure functions of tensors [B, ...] -> a scalar."""

import torch
from torch import Tensor


def toward(x: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient at x is exactly direction / x.numel(), and whose value is half its mean square."""
    direction = direction.detach()
    return (direction * (x - x.detach())).mean() + 0.5 * direction.square().mean()


def over_rows(error: Tensor) -> Tensor:
    """The mean over everything but the rows: [B]."""
    return error.flatten(1).mean(dim=1)


def row_distance(one: Tensor, other: Tensor) -> Tensor:
    """The rows' root mean square distance [B], with a finite slope where they are one."""
    return (over_rows((one - other).square()) + 1e-12).sqrt()


def root_mse(error: Tensor, smooth: float | Tensor = 1e-3) -> Tensor:
    """The rows' root mean square, averaged: an outlier row counts linearly. `smooth` ([B] or one) rounds the corner at
    0: it is pseudo-Huber over whole rows, per element."""
    return ((over_rows(error.square()) + smooth**2).sqrt() - smooth).mean()


def huber(error: Tensor, c: float) -> Tensor:
    """Pseudo-Huber over whole rows, sqrt(|error|^2 + c^2) - c. Source: arXiv 2310.14189 §3.3."""
    return ((error.flatten(1).square().sum(dim=1) + c**2).sqrt() - c).mean()


def scale_of(error: Tensor, floor: float = 1e-3) -> Tensor:
    """Each row's mean absolute value, at least `floor` and without gradient, shaped to divide: [B, 1, ...]."""
    return over_rows(error.detach().abs()).clamp_min(floor).reshape(-1, *(1,) * (error.dim() - 1))


def pairwise_distance(x: Tensor) -> Tensor:
    """The mean root-mean-square distance of two different rows: falls to 0 when all samples are one."""
    rows = x.flatten(1).float()
    distance: Tensor = torch.pdist(rows).mean() / rows.shape[1] ** 0.5
    return distance
