"""The bare engine loop: what the compiled engine makes with nothing around it, the ceiling of every server."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from bench.peers.pictures import Ask, Painter

_LEAST_S = 0.4
_PROMPT = "a small red circle above a large blue square on a white background"


def seconds_per_picture(painter: Painter) -> Mapping[str, Mapping[int, float]]:
    """By kind and batch size: encode, all steps and decode of whole batches, again and again.

    The better of one engine that has all threads and an engine of one thread on each core.
    """
    one = msgspec.structs.replace(painter.config, threads=1)
    forms = [painter], [Painter(one) for _ in range(painter.config.threads)]
    return {
        kind: {rows: min(_timed(form, kind, rows) for form in forms) for rows in painter.config.batches}
        for kind in painter.config.kinds
    }


def _timed(painters: Sequence[Painter], kind: str, rows: int) -> float:
    with ThreadPoolExecutor(len(painters)) as pool:
        return 1 / sum(pool.map(lambda painter: 1 / _lone(painter, kind, rows), painters))


def _lone(painter: Painter, kind: str, rows: int) -> float:
    asked = [Ask(kind, _PROMPT, seed) for seed in range(rows)]
    painter.paint(asked)
    made, begun_s = 0, time.perf_counter()
    while made == 0 or time.perf_counter() - begun_s < _LEAST_S:
        painter.paint(asked)
        made += rows
    return (time.perf_counter() - begun_s) / made
