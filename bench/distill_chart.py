"""The leaderboard as a picture: one line a method, its distance at 1, 2 and 4 steps on a logarithmic axis."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_COLOURS = {"1": "#d55e00", "2": "#e69f00", "4": "#0072b2"}  # told apart by the colour-blind
_LEFT, _WIDTH, _RIGHT, _TOP, _LINE, _BOTTOM = 190, 540, 30, 46, 17, 30
_TICKS = (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10)


def chart(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> str:
    """SVG of `rows`, (label, figures by step count) from the top down; a figure has `fd_ratio` and `fd_ratio_ci`, its
    95 % interval or None. What lies outside the axis stands at its edge."""
    width, bottom = _LEFT + _WIDTH + _RIGHT, _TOP + _LINE * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + _BOTTOM}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="#fff"/>',
        _text(_LEFT, 16, title, size=13),
        *_legend(),
        *(_tick(at, bottom) for at in _TICKS),
        _text(_LEFT + _WIDTH, bottom + 24, "ratio to the guided teacher at its own steps; left is better", "end"),
        *(part for place, row in enumerate(rows) for part in _row(_TOP + _LINE * (place + 0.5), *row)),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _row(y: float, label: str, figures: Mapping[str, Any]) -> list[str]:
    parts = [_text(_LEFT - 10, y + 4, label, "end")]
    for steps, colour in _COLOURS.items():
        if figure := figures.get(steps):
            low, high = figure["fd_ratio_ci"] or (figure["fd_ratio"], figure["fd_ratio"])
            said = f"{label}, {steps} step{'s' * (steps != '1')}: {figure['fd_ratio']:.2f} ({low:.2f} to {high:.2f})"
            parts.append(
                f'<g stroke="{colour}" fill="{colour}"><title>{escape(said)}</title>'
                f'<line x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke-opacity="0.5"/>'
                f'<circle cx="{_x(figure["fd_ratio"]):.1f}" cy="{y:.1f}" r="3.5"/></g>'
            )
    return parts


def _tick(at: float, bottom: float) -> str:
    colour = "#444" if at == 1 else "#ddd"
    line = f'<line x1="{_x(at):.1f}" x2="{_x(at):.1f}" y1="{_TOP}" y2="{bottom}" stroke="{colour}"/>'
    return line + _text(_x(at), bottom + 12, f"{at:g}", "middle")


def _legend() -> list[str]:
    parts = []
    for place, (steps, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 70 * place
        parts.append(f'<circle cx="{x + 4}" cy="31" r="3.5" fill="{colour}"/>')
        parts.append(_text(x + 12, 35, f"{steps} step{'s' * (steps != '1')}"))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222">{escape(text)}</text>'


def _x(ratio: float) -> float:
    low, high = math.log(_TICKS[0]), math.log(_TICKS[-1])
    return _LEFT + _WIDTH * min(1.0, max(0.0, (math.log(max(ratio, 1e-9)) - low) / (high - low)))
