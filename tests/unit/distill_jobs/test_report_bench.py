"""The table of the student bench judges the median of the seeds."""

import pytest

from bench.student_table import ASKED, Asked, lines, markdown

FIGURES = ("fd_ratio", "diversity_ratio", "alignment_ratio", "grain_ratio")


def student(value: float) -> dict[int, dict[str, float]]:
    return {steps: dict.fromkeys(FIGURES, value) for steps in (1, 2, 4)}


def test_every_asked_line_is_judged() -> None:
    assert len(lines([student(1.0)])) == len(ASKED) == 12
    assert all(line.kept for line in lines([student(1.0)]))


@pytest.mark.parametrize(
    ("values", "at_most", "kept"),
    [
        ((1.0, 1.2, 9.0), True, True),
        ((1.0, 1.3, 1.4), True, False),
        ((1.3, 1.25, 0.0), False, True),
        ((1, 1, 2), False, False),
    ],
)
def test_the_median_of_the_seeds_decides(values: tuple[float, ...], at_most: bool, kept: bool) -> None:
    (line,) = lines([student(value) for value in values], [Asked("fd_ratio", 1, 1.25, at_most)])
    assert line.kept is kept
    assert line.values == values


def test_the_table_has_a_row_for_each_line_and_a_column_for_each_seed() -> None:
    text = markdown(lines([student(1.0), student(2.0), student(3.0)]))
    head, _, *rows = text.splitlines()
    assert head.count("seed") == 3
    assert len(rows) == 12
    assert "≤ 1.25 | 1.000 | 2.000 | 3.000 | 2.000 | missed" in rows[0]
