"""Straight lines between two states of a path, and the teacher's path between two noise levels.

A line is a pair (x0, eps): its state at any t is alpha x0 + sigma eps. It is straight in rectified flow and what one
DDIM step follows in every process, so a student that predicts the line through both ends of a piece of path takes that
piece in one step.
"""

import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from engines.denoiser import BaseDenoiser, Cond
from engines.solvers import continued

Line = tuple[Tensor, Tensor]  # (x0, eps)
END = 0.02  # the least noise level at which a student learns a line: near 0 every line through x is right


def flow_error(guess: Line, line: Line) -> Tensor:
    """The error of rectified flow's velocity eps - x0, whatever the process."""
    return (guess[1] - guess[0]) - (line[1] - line[0])


def snr_error(guess: Line, line: Line) -> Tensor:
    """max(SNR, 1) |x0 error|^2 per row [B]. Two lines through one x_t have eps errors of alpha / sigma times the x0
    error, so this is the greater of both errors. Source: arXiv 2202.00512 §4, truncated SNR."""
    x0, eps = (over_rows((ours - theirs).square()) for ours, theirs in zip(guess, line, strict=True))
    return torch.maximum(x0, eps)


def ask(student: BaseDenoiser, x: Tensor, t: Tensor, low: Tensor, batch: Batch) -> Line:
    """The student's line at x. A network that reads s is asked for a random s in `low`..t: its sampler will give it
    one, and the line does not depend on it."""
    s = low + batch.draw(times.Uniform()) * (t - low)
    line: Line = student(x, t, batch.cond, s if "s" in student.inputs else None)
    return line


def path(
    teacher: BaseDenoiser, x: Tensor, high: float, low: float, steps: int, cond: Cond, solver: str
) -> list[Tensor]:
    """The states of the teacher's path from x at noise level `high` to `low` in equal steps, both ends with them."""
    levels = tuple(high + (low - high) * i / steps for i in range(steps + 1))
    grid = times.grid(teacher.process, levels)[: steps + 1]
    return continued(teacher, x, grid, cond, solver=solver)
