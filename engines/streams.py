"""How many engine calls share a processor's threads: chosen by measuring a denoiser where it will run.

A large network is computed as fast by all cores together. In a small one cores wait for each other at the end of every
layer; then as many calls at once as there are cores take hardly longer each. Measured with the embedded teacher on two
cores (OpenVINO fp32, weights set, batch 8): one call of two threads 14 ms, two calls at once of one thread 14.5 ms.

A call that nothing accompanies has all threads, whatever the streams: that is `alone`. Measured there: one row 5.8 ms
in a stream of one thread, 4.5 ms on both.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from engines.backends.base import Backend, Engine, Graph, Profile, fitting, machine

GAIN = 1.1
"""How much less of time or of processor time a call must take with more streams. They overlap what is between calls as
well: where time gained 1.22, the whole server did 1.4 times as much."""
MOST = 4
"""Streams at most: each may have compiled models, and constants, of its own. Many cores are for several workers."""
ALONE_ROWS = 2
"""Up to so many rows (one that is guided is two) a lone call gains by all threads where streams gain at all."""
Clock = Callable[[], float]
CLOCKS: Sequence[Clock] = (time.perf_counter, time.process_time)
_FILE = "streams.json"
_ROWS = 8
_ROUNDS, _LEAST_S, _CALLS = 3, 1.0, 4  # rounds at least, and for how long at least; the calls of each
_REVISION = "3"  # of this measurement and of what backends do with streams

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Nothing else runs beside these engine calls of this thread: they may have the threads of all streams."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def is_alone() -> bool:
    return _alone.get()


def whole(profile: Profile) -> Profile:
    """`profile` for calls that are alone: one stream that has the threads of all."""
    return _cut(profile, profile.threads * profile.streams, 1)


def tuned(backend: Backend, graph: Graph, profile: Profile, clocks: Sequence[Clock] = CLOCKS) -> Profile:
    """`profile`, one stream of all threads, cut into the streams that get most done. Kept in the engine cache.

    Time tells little on a machine that is busy with other things, as when a system starts. What a call takes of the
    processor tells something there as well, for threads that wait for each other do not sleep at once.
    """
    if not backend.concurrent or profile.threads == 1:
        return profile

    def measure(folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(_streams(backend, graph, profile, clocks)))

    what = ("streams", _REVISION, str(profile), backend.name, machine(profile.device))
    streams = int(json.loads((graph.kept(what, measure) / _FILE).read_text()))
    return _cut(profile, profile.threads, streams)


def _streams(backend: Backend, graph: Graph, profile: Profile, clocks: Sequence[Clock]) -> int:
    """The next number that shares the threads evenly, as long as it gets more done."""
    streams, taken = 1, _call_s(backend, graph, profile, clocks)
    for more in (n for n in range(2, MOST + 1) if profile.threads % n == 0):
        then = _call_s(backend, graph, _cut(profile, profile.threads, more), clocks)
        if all(GAIN * after > before for before, after in zip(taken, then, strict=True)):
            break
        streams, taken = more, then
    return streams


def _cut(profile: Profile, threads: int, streams: int) -> Profile:
    return replace(profile, streams=streams, threads=threads // streams)


def _call_s(backend: Backend, graph: Graph, profile: Profile, clocks: Sequence[Clock]) -> list[float]:
    """Seconds per call with all streams at work, by each clock: of rounds the least, for other work only adds."""
    rows = fitting(_ROWS, profile.batches)
    weights = {name: torch.zeros(shape) for name, shape in graph.shapes.items()}
    engine = backend.load(backend.build(graph, replace(profile, batches=(rows,))), weights)
    calls = partial(_calls, engine, graph, rows)
    try:
        with ThreadPoolExecutor(profile.streams) as pool:
            begun_s = clocks[0]()
            rounds: list[list[float]] = []
            while len(rounds) < _ROUNDS or clocks[0]() - begun_s < _LEAST_S:
                rounds.append(_round_s(pool, calls, profile.streams, clocks))
    finally:
        engine.close()
    return [min(taken) / (_CALLS * profile.streams) for taken in zip(*rounds, strict=True)]


def _round_s(pool: ThreadPoolExecutor, calls: Callable[[], None], streams: int, clocks: Sequence[Clock]) -> list[float]:
    begun = [clock() for clock in clocks]
    for stream in [pool.submit(calls) for _ in range(streams)]:
        stream.result()
    return [clock() - since for clock, since in zip(clocks, begun, strict=True)]


def _calls(engine: Engine, graph: Graph, rows: int) -> None:
    inputs = graph.example(rows)
    for _ in range(_CALLS):
        engine.run(**inputs)
