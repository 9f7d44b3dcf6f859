"""How many engine calls share a processor's threads: chosen by measuring a denoiser where it will run.

A large network is computed as fast by all cores together, and a lone request has them all. In a small one cores wait
for each other at the end of every layer; then as many calls at once as there are cores take hardly longer each.
Measured with the embedded teacher on two cores (OpenVINO fp32, weights set, batch 8): one call of two threads 14 ms,
two calls at once of one thread 14.5 ms.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from engines.backends.base import Backend, Graph, Profile, machine

PATIENCE = 1.5
"""How much longer a lone call may take for it, in times of what it takes on all threads."""
_FILE = "streams.json"
_CALLS = 7


def tuned(backend: Backend, graph: Graph, profile: Profile, now_s: Callable[[], float] = time.perf_counter) -> Profile:
    """`profile`, one stream of all threads, cut into as many streams as a lone call bears. Kept in the engine cache."""
    if not backend.concurrent or profile.threads == 1:
        return profile

    def measure(folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(_streams(backend, graph, profile, now_s)))

    what = ("streams", str(profile), backend.name, machine(profile.device), str(PATIENCE))
    streams = int(json.loads((graph.kept(what, measure) / _FILE).read_text()))
    return _cut(profile, streams)


def _streams(backend: Backend, graph: Graph, profile: Profile, now_s: Callable[[], float]) -> int:
    """The most streams, a half, a quarter … of the threads, that are borne."""
    lone_s = _lone_s(backend, graph, profile, now_s)
    streams = profile.threads
    while streams > 1 and _lone_s(backend, graph, _cut(profile, streams), now_s) > PATIENCE * lone_s:
        streams //= 2
    return streams


def _cut(profile: Profile, streams: int) -> Profile:
    return replace(profile, streams=streams, threads=profile.threads // streams)


def _lone_s(backend: Backend, graph: Graph, profile: Profile, now_s: Callable[[], float]) -> float:
    """Of one row: the quickest of some calls, for other work only makes them slower."""
    alone = replace(profile, batches=profile.batches[:1])
    engine = backend.load(backend.build(graph, alone), {name: torch.zeros(s) for name, s in graph.shapes.items()})
    inputs, took_s = graph.example(profile.batches[0]), []
    for _ in range(_CALLS):
        begun_s = now_s()
        engine.run(**inputs)
        took_s.append(now_s() - begun_s)
    engine.close()
    return min(took_s)
