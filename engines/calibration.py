"""Gives a student its judge: how much its teacher doubts pictures that neither has seen.

A threshold is an order statistic of held-out doubts (split conformal prediction): a picture of a prompt like those is
doubted more with at most the asked chance, whatever the doubts' distribution is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.errors import InvalidRequest
from engines.manifest import REDO_SHARES, Judge
from engines.redone import Redone
from engines.refine import REDO
from engines.solvers import State
from engines.student import Aid, LoadedStudent, Run

LEAST = math.ceil(1 / REDO_SHARES[0]) - 1  # pictures: of fewer, none bounds the smallest share


@dataclass(frozen=True, slots=True)
class Calibration:
    """The judge, and per step count how well its doubt ranks the pictures by what the teacher would change in them:
    Spearman's correlation with the mean square between the latents before and after."""

    judge: Judge
    correlation: dict[int, float]


def calibrate(
    student: LoadedStudent, teacher: LoadedStudent, steps: int, prompts: Sequence[str], *, batch: int = 8
) -> Calibration:
    """Each prompt is asked once, with its place as the seed. `steps` is of the teacher's schedule.

    Raises:
        InvalidRequest: the prompts are too few, or the two cannot work together so.
    """
    if len(prompts) < LEAST:
        raise InvalidRequest(f"{len(prompts)} prompts are too few: {LEAST} or more are needed", param="prompts")
    counts = sorted(student.manifest.schedules)
    nothing = Judge(steps=steps, doubts=dict.fromkeys(counts, (0.0,) * len(REDO_SHARES)))
    judged = replace(student, manifest=student.manifest.judged(nothing))
    doubts: dict[int, tuple[float, ...]] = {}
    correlation: dict[int, float] = {}
    for count in counts:
        found, changed = _heard(judged, Aid(teacher, REDO), count, prompts, batch)
        doubts[count], correlation[count] = thresholds(found), spearman(found, changed)
    return Calibration(Judge(steps=steps, doubts=doubts), correlation)


def thresholds(doubts: Sequence[float]) -> tuple[float, ...]:
    """For each of `REDO_SHARES` what a further doubt, drawn as these were, exceeds with at most that chance."""
    ranked, n = sorted(doubts), len(doubts)
    return tuple(ranked[math.ceil((n + 1) * (1 - share) - 1e-9) - 1] for share in REDO_SHARES)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of two rankings; values are taken to differ."""
    ranks = torch.tensor([one, other], dtype=torch.float64).argsort(dim=1).argsort(dim=1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _heard(
    student: LoadedStudent, aid: Aid, count: int, prompts: Sequence[str], batch: int
) -> tuple[list[float], list[float]]:
    """Of each picture its doubt, and how far the teacher's is from it."""
    doubts: list[float] = []
    changed: list[float] = []
    rule = student.solver(count, aid=aid)
    assert isinstance(rule, Redone)
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        watched = _Watched(rule)
        run = Run(student, part, list(range(start, start + len(part))), watched, aid=aid)
        run.encode()
        for _ in watched.plan:
            run.step()
        doubts += watched.doubts
        after = run.latents().cpu()
        changed += (after - torch.stack(watched.pictures)).square().flatten(1).mean(dim=1).tolist()
    return doubts, changed


class _Watched(Redone):
    """Redoes every row and keeps what it was."""

    def __init__(self, rule: Redone) -> None:
        super().__init__(rule.first, rule.second, rule.plan, threshold=-math.inf)
        self.pictures: list[Tensor] = []
        self.doubts: list[float] = []

    def settle(self, state: State) -> State:
        if self.judges(state):
            picture, doubted, *_ = state.history
            self.pictures.append(picture.cpu())
            self.doubts.append(doubted.item())
        return super().settle(state)
