"""The bare engine loop: what the compiled engine makes with nothing around it, the ceiling of every server."""

import time
from collections.abc import Mapping

from bench.peers.pictures import Ask, Painter

_LEAST_S = 0.4
_PROMPT = "a small red circle above a large blue square on a white background"


def seconds_per_picture(painter: Painter) -> Mapping[str, Mapping[int, float]]:
    """By kind and batch size: encode, all steps and decode of whole batches, again and again."""
    return {
        kind: {rows: _timed(painter, kind, rows) for rows in painter.config.batches} for kind in painter.config.kinds
    }


def _timed(painter: Painter, kind: str, rows: int) -> float:
    asked = [Ask(kind, _PROMPT, seed) for seed in range(rows)]
    painter.paint(asked)
    made, begun_s = 0, time.perf_counter()
    while made == 0 or time.perf_counter() - begun_s < _LEAST_S:
        painter.paint(asked)
        made += rows
    return (time.perf_counter() - begun_s) / made
