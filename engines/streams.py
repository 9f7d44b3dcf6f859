"""How many engine calls share a processor's threads: chosen by measuring a denoiser where it will run.

A large network is computed as fast by all cores together. In a small one cores wait for each other at the end of every
layer; then as many calls at once as there are cores take hardly longer each. Measured with the embedded teacher on two
cores (OpenVINO fp32, weights set, batch 8): one call of two threads 14 ms, two calls at once of one thread 14.5 ms.

A call that nothing accompanies has all threads, whatever the streams: that is `alone`. Measured there: one row 5.8 ms
in a stream of one thread, 4.5 ms on both.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from engines.backends.base import Backend, Engine, Graph, Profile, fitting, machine

GAIN = 1.1
"""How much more calls alone must get done by more streams, which besides overlap what is between calls: where that was
1.22, the whole server did 1.4 times as much."""
MOST = 4
"""Streams at most: each may have compiled models, and constants, of its own. Many cores are for several workers."""
ALONE_ROWS = 2
"""Up to so many rows (one that is guided is two) a lone call gains by all threads where streams gain at all."""
_FILE = "streams.json"
_ROWS = 8
_ROUNDS, _CALLS = 3, 4
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


def tuned(backend: Backend, graph: Graph, profile: Profile, now_s: Callable[[], float] = time.perf_counter) -> Profile:
    """`profile`, one stream of all threads, cut into the streams that get most done. Kept in the engine cache."""
    if not backend.concurrent or profile.threads == 1:
        return profile

    def measure(folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(_streams(backend, graph, profile, now_s)))

    what = ("streams", _REVISION, str(profile), backend.name, machine(profile.device))
    streams = int(json.loads((graph.kept(what, measure) / _FILE).read_text()))
    return _cut(profile, profile.threads, streams)


def _streams(backend: Backend, graph: Graph, profile: Profile, now_s: Callable[[], float]) -> int:
    """The next number that shares the threads evenly, as long as it gets more done."""
    streams, call_s = 1, _call_s(backend, graph, profile, now_s)
    for more in (n for n in range(2, MOST + 1) if profile.threads % n == 0):
        more_s = _call_s(backend, graph, _cut(profile, profile.threads, more), now_s)
        if GAIN * more_s > call_s:
            break
        streams, call_s = more, more_s
    return streams


def _cut(profile: Profile, threads: int, streams: int) -> Profile:
    return replace(profile, streams=streams, threads=threads // streams)


def _call_s(backend: Backend, graph: Graph, profile: Profile, now_s: Callable[[], float]) -> float:
    """Seconds per call with all streams at work: the quickest round, for other work only makes them slower."""
    rows = fitting(_ROWS, profile.batches)
    weights = {name: torch.zeros(shape) for name, shape in graph.shapes.items()}
    engine = backend.load(backend.build(graph, replace(profile, batches=(rows,))), weights)
    calls = partial(_calls, engine, graph, rows)
    try:
        with ThreadPoolExecutor(profile.streams) as pool:
            rounds = [_round_s(pool, calls, profile.streams, now_s) for _ in range(_ROUNDS)]
    finally:
        engine.close()
    return min(rounds) / (_CALLS * profile.streams)


def _round_s(pool: ThreadPoolExecutor, calls: Callable[[], None], streams: int, now_s: Callable[[], float]) -> float:
    begun_s = now_s()
    for stream in [pool.submit(calls) for _ in range(streams)]:
        stream.result()
    return now_s() - begun_s


def _calls(engine: Engine, graph: Graph, rows: int) -> None:
    inputs = graph.example(rows)
    for _ in range(_CALLS):
        engine.run(**inputs)
