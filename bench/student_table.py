"""The table of `bench.student`: each asked line beside what the seeds reached, and whether their median keeps it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Figures = Mapping[str, Any]
"""One `Metrics` as JSON."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One figure of one step count, with its limit."""

    figure: str
    steps: int
    limit: float
    at_most: bool


@dataclass(frozen=True, slots=True)
class Line:
    figure: str
    steps: int
    asked: str
    values: tuple[float, ...]  # one per seed
    median: float
    kept: bool


_FD_LIMITS = {1: 1.25, 2: 1.1, 4: 1.0}
ASKED = (
    *(Asked("fd_ratio", steps, limit, True) for steps, limit in _FD_LIMITS.items()),
    *(Asked("diversity_ratio", steps, 0.9, False) for steps in _FD_LIMITS),
    *(Asked("alignment_ratio", steps, 0.97, False) for steps in _FD_LIMITS),
    *(Asked("grain_ratio", steps, 1.5, True) for steps in _FD_LIMITS),
)


def lines(students: Sequence[Mapping[int, Figures]], asked: Sequence[Asked] = ASKED) -> list[Line]:
    """Judges the median over the students (one per seed, figures by step count)."""
    return [_line(rule, tuple(float(student[rule.steps][rule.figure]) for student in students)) for rule in asked]


def markdown(rows: Sequence[Line]) -> str:
    width = max(len(row.values) for row in rows)
    head = ["figure", "steps", "asked", *(f"seed {i}" for i in range(width)), "median", ""]
    body = [
        [row.figure, str(row.steps), row.asked, *(f"{v:.3f}" for v in row.values), f"{row.median:.3f}", _word(row)]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def as_json(rows: Sequence[Line]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _line(rule: Asked, values: tuple[float, ...]) -> Line:
    median = statistics.median(values)
    kept = median <= rule.limit if rule.at_most else median >= rule.limit
    return Line(rule.figure, rule.steps, f"{'≤' if rule.at_most else '≥'} {rule.limit:g}", values, median, kept)


def _word(row: Line) -> str:
    return "kept" if row.kept else "missed"
