"""The geometry of a chart: values land where the scale says, and odd series do no harm."""

import math

import pytest

from distill_jobs.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Point, Scale, Series, chart, thinned


def line(*values: float) -> Series:
    return Series("a", tuple(Point(float(i), value) for i, value in enumerate(values)), marked=True)


def test_the_ends_of_a_straight_scale_are_the_ends_of_its_axis() -> None:
    scale = Scale(2.0, 6.0, 100, 300)
    assert [scale(value) for value in (2, 3, 6)] == [100, 150, 300]
    assert [(tick.at, tick.label) for tick in scale.ticks()] == [
        (100, "2"), (150, "3"), (200, "4"), (250, "5"), (300, "6"),
    ]  # fmt: skip


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_scale() -> None:
    scale = Scale(0.01, 100.0, 0, 400, log=True)
    assert [scale(value) for value in (0.01, 0.1, 1, 10, 100)] == [0, 100, 200, 300, 400]
    assert [tick.label for tick in scale.ticks()] == ["0.01", "0.1", "1", "10", "100"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.93, 0.97), (-3.0, 7.0), (1e-5, 3e-5), (0.0, 25_000.0)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 7
    assert all(0 <= tick.at <= 100 for tick in ticks)


def test_a_line_stays_inside_its_frame() -> None:
    made = chart("t", "x", [line(3.0, -1.0, 2.0)])
    assert made is not None
    dots = made.lines[0].dots
    assert [dot.x for dot in dots] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert all(TOP < dot.y < HEIGHT - BOTTOM for dot in dots)
    assert dots[0].y < dots[2].y < dots[1].y  # a larger value stands higher
    assert made.lines[0].path.count("L") == 2


def test_values_of_many_magnitudes_are_drawn_by_their_logarithm_unless_some_are_negative() -> None:
    wide, negative = chart("t", "x", [line(100.0, 1.0, 0.1)]), chart("t", "x", [line(100.0, 1.0, -0.1)])
    assert wide is not None
    assert negative is not None
    assert (wide.logarithmic, negative.logarithmic) == (True, False)


def test_the_interval_of_a_point_has_room() -> None:
    made = chart("t", "x", [Series("a", (Point(1, 2.0, 0.0, 9.0), Point(2, 3.0)), marked=True)])
    assert made is not None
    first, second = made.lines[0].dots
    assert first.low is not None
    assert first.high is not None
    assert TOP < first.high < first.y < first.low < HEIGHT - BOTTOM
    assert (second.low, second.high) == (None, None)


def test_one_value_alone_and_equal_values_can_be_drawn() -> None:
    for series in (line(0.0), line(5.0, 5.0), line(-2.0)):
        made = chart("t", "x", [series], log_x=False)
        assert made is not None
        assert all(math.isfinite(dot.y) for dot in made.lines[0].dots)


def test_what_is_no_number_is_left_out_and_nothing_makes_no_chart() -> None:
    made = chart("t", "x", [line(1.0, math.nan, 3.0)])
    assert made is not None
    assert len(made.lines[0].dots) == 2
    assert chart("t", "x", [line(math.nan), line()]) is None


def test_long_series_keep_their_mean() -> None:
    points = [Point(float(i), float(i % 7)) for i in range(1000)]
    few = thinned(points, most=100)
    assert len(few) == 100
    assert sum(p.y for p in few) / 100 == pytest.approx(sum(p.y for p in points) / 1000)
    assert thinned(points[:50], most=100) == tuple(points[:50])
