"""What tracing costs a request that nobody traces: `python -m bench.tracing_off`.

The calls that gateway and worker make for tracing on the way of one request, without an endpoint, against the same way
with them cut out; both observe their histograms. Pairs alternate, and CPU time of the thread counts, so that other work
on the machine is not in it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

from prometheus_client import CollectorRegistry
from rich.console import Console
from starlette.datastructures import Headers

from bench.machine import described, spread
from server import tracing
from server.brokers.base import Claim, Finished
from server.metrics import Metrics
from server.request_trace import RequestTraces

out = Console(stderr=True)
_S = 0.01  # what is observed
_STEPS = (1, 4, 32)
_BESIDE_STEPS = 2  # engine calls to read the prompt and to draw the picture


class Way:
    """Of one request: `traced` makes every call for tracing, `bare` none."""

    def __init__(self) -> None:
        metrics = Metrics(CollectorRegistry())
        self._request = metrics.request_seconds.labels("shapes", "low", "shapes@0")
        self._queue = metrics.queue_seconds.labels("shapes")
        self._stage = metrics.stage_seconds.labels("shapes", "denoise")
        self._step = metrics.step_seconds.labels("shapes", "shapes@0", "openvino")
        self._traces = RequestTraces(None, lambda: 0)
        names = ("host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "content-type")
        self._headers = Headers(raw=[(name.encode(), b"x") for name in names])

    def traced(self, steps: int) -> None:
        self._headers.get("traceparent")
        trace = self._traces.begin(cast(Claim, None))
        for _ in range(steps + _BESIDE_STEPS):
            exemplar = self._traces.called((), _S)
            self._stage.observe(_S, exemplar)
            self._step.observe(_S, exemplar)
        tracing.now_ns()
        if trace is not None:
            raise AssertionError("this is traced")
        self._queue.observe(_S, trace.span.exemplar if trace else None)
        self._traces.end(cast(Finished, None), None)
        self._request.observe(_S, tracing.exemplar.get())

    def bare(self, steps: int) -> None:
        for _ in range(steps + _BESIDE_STEPS):
            self._stage.observe(_S)
            self._step.observe(_S)
        self._queue.observe(_S)
        self._request.observe(_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000, help="of each kind in a run")
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    way, report = Way(), described("bench.tracing_off")
    for steps in _STEPS:
        differences = [_difference_us(way, steps, given.requests) for _ in range(given.runs)]
        report[f"us_per_request_of_{steps}_steps"] = spread(differences)
    out.print_json(json.dumps(report))


def _difference_us(way: Way, steps: int, requests: int) -> float:
    """Median over pairs of short slices, in alternating order."""
    slices = []
    for index in range(20):
        order = (way.traced, way.bare) if index % 2 else (way.bare, way.traced)
        took = {work.__name__: _cpu_s(work, steps, requests // 20) for work in order}
        slices.append((took["traced"] - took["bare"]) / (requests // 20) * 1e6)
    return statistics.median(slices)


def _cpu_s(work: Callable[[int], Any], steps: int, requests: int) -> float:
    begun_s = time.thread_time()
    for _ in range(requests):
        work(steps)
    return time.thread_time() - begun_s


if __name__ == "__main__":
    main()
