"""A small line chart as plain geometry: scales, ticks and paths in SVG's own units, for a template to draw (pure).

Reports are read where nothing can be downloaded and no script runs, so a chart is a picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 38
_MOST_POINTS = 240
_LOG_FROM = 20  # values that span this much are drawn on a logarithmic scale
_INK = "#3b4252"
# Okabe and Ito's colours, which people with any colour vision can tell apart; without black and yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True, slots=True)
class Point:
    """A value, with its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: tuple[Point, ...]
    colour: str = _INK
    dashed: bool = False
    marked: bool = False  # a dot at every point: for few points that were measured, not followed


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    label: str
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """A series as it is drawn."""

    name: str
    colour: str
    dashed: bool
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    logarithmic: bool


class Scale:
    """Values to places: straight, or by their logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        if high <= low:
            room = abs(low) * 0.1 or 1.0
            low, high = (low / 1.2, high * 1.2) if log else (low - room, high + room)
        self.low, self.high, self.log = low, high, log
        self._start, self._span = start, end - start
        self._from, self._to = self._of(low), self._of(high)

    def __call__(self, value: float) -> float:
        return round(self._start + self._span * (self._of(value) - self._from) / (self._to - self._from), 1)

    def ticks(self) -> tuple[Tick, ...]:
        values = _decades(self.low, self.high) if self.log else ()
        if len(values) < 2:
            values = _round_values(self.low, self.high)
        return tuple(Tick(self(value), f"{value:.6g}") for value in values if value > 0 or not self.log)

    def _of(self, value: float) -> float:
        return math.log(value) if self.log else value


def chart(title: str, x_label: str, series: Sequence[Series], *, log_x: bool = False) -> Chart | None:
    """None where there is nothing to draw. Values that are no numbers are left out; long series are averaged."""
    drawn = [(one, tuple(p for p in one.points if math.isfinite(p.x) and math.isfinite(p.y))) for one in series]
    drawn = [(one, thinned(points)) for one, points in drawn if points]
    if not drawn:
        return None
    every = [point for _, points in drawn for point in points]
    xs = [p.x for p in every]
    ys = [value for p in every for value in (p.y, p.low, p.high) if value is not None and math.isfinite(value)]
    log_y = min(ys) > 0 and max(ys) / min(ys) >= _LOG_FROM
    pad = 0.0 if log_y else 0.06 * (max(ys) - min(ys))
    x = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=log_x)
    y = Scale(min(ys) - pad, max(ys) + pad, HEIGHT - BOTTOM, TOP, log=log_y)
    return Chart(title, x_label, tuple(_line(one, points, x, y) for one, points in drawn), x.ticks(), y.ticks(), log_y)


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> tuple[Point, ...]:
    """At most so many: means of equal runs, which keep the trend of a noisy loss."""
    size = -(-len(points) // most)
    if size <= 1:
        return tuple(points)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple(Point(sum(p.x for p in run) / len(run), sum(p.y for p in run) / len(run)) for run in runs)


def _line(series: Series, points: tuple[Point, ...], x: Scale, y: Scale) -> Line:
    path = "M" + "L".join(f"{x(p.x)} {y(p.y)}" for p in points)
    dots = tuple(
        Dot(
            x(p.x),
            y(p.y),
            f"{series.name}: {p.y:.4g} at {p.x:g}",
            None if p.low is None else y(p.low),
            None if p.high is None else y(p.high),
        )
        for p in points
        if series.marked
    )
    return Line(series.name, series.colour, series.dashed, path, dots)


def _round_values(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def _decades(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times the powers of ten; of a wide range the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    found = (m * 10.0**power for power in powers for m in steps)
    return tuple(value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9))
