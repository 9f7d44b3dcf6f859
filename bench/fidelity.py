"""How near the simulation comes to a real worker: `python -m bench.fidelity` writes bench/fidelity.json.

One deployment at 50/30/20 of 1/2/4 steps in a closed loop, first in the real processes, then in simulation with as
many clients, on two curves. `engine`: what engine calls take with nothing else on the machine, so that the figures are
those of a server that costs nothing beside its engine. `live`: what the real worker's calls took in that very run, by
its log, so that what is left of the difference is the simulation's own.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console

from bench.clients import closed
from bench.costs import measured
from bench.fleet import STAGES, Fleet
from bench.load import Record
from bench.machine import described, quantile, spread
from bench.peers.models import STEPS, publish
from bench.peers.workloads import MIXES, requests
from bench.serve import engine_ms
from bench.system import CACHE, System
from distill_jobs.tasks.shapes import TASK
from engines.backends.base import BATCHES, choose
from engines.cost import CostKey, CostModel
from engines.registry.files import FilesRegistry
from server.batcher import Stage
from server.embedded import Stack, StackOptions

out = Console(stderr=True)
_OUT = Path(__file__).parent / "fidelity.json"
_MIX = MIXES["50/30/20"]
_WARM_S = 2.0
_ALONE_S = 2.0
_CAPTIONS = 8000  # more than are asked, so that hardly a prompt comes twice
_ENOUGH = 10  # calls of a size, for a median
_EDGE_S = 0.2  # of the window, at its end: clients stop then
_SHARES: Mapping[str, float] = {"p50": 0.5, "p95": 0.95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a window, after two to warm up")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--calls", type=int, default=100, help="of each size, for the curve of the bare engine")
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    report = described("bench.fidelity")
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        data, log = Path(folder) / "data", Path(folder) / "steps.jsonl"
        registry = FilesRegistry(data / "registry")
        version = publish(registry, set(map(str, STEPS)))["1"].version
        bare = measured(registry, version, given.backend, given.threads, given.calls)
        with _serving(data, log, given) as up:
            around_s = _around_s(up)
            windows = [_window(up, seed, given) for seed in range(given.runs)]
        calls = _calls(log)  # written to its end when the worker has ended
    runs = [_run(window, calls, bare, around_s, given.concurrency) for window in windows]
    report |= {"streams": bare.streams, "concurrency": given.concurrency, "around_ms": round(1000 * around_s, 2)}
    report["error"] = {
        f"{curve} {name}": spread([run[curve][name] / run["real"][name] - 1 for run in runs])
        for curve in ("live", "engine")
        for name in runs[0]["real"]
    }
    report["runs"] = runs
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    out.print_json(json.dumps(report))


# --- the real worker -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """What was asked, by the steps of each body, and answered between two times of the worker's clock."""

    seed: int
    steps: Sequence[int]
    records: Sequence[Record]
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Called:
    """An engine call of the real worker."""

    at_s: float
    stage: Stage
    rows: int
    seconds: float


@contextlib.contextmanager
def _serving(data: Path, log: Path, given: argparse.Namespace) -> Iterator[System]:
    env = {
        "WORKER_BACKEND": choose(given.backend).backend,
        "WORKER_BATCH_SIZES": json.dumps(BATCHES),
        "WORKER_CACHE_DIR": str(CACHE.resolve()),
        "WORKER_STEPS_LOG": str(log),
    }
    with Stack(StackOptions(data=data, port=0, distiller=False, threads=given.threads, env=env)) as stack:
        yield System(stack, data.parent)


def _around_s(up: System) -> float:
    """What a lone request takes beyond its engine calls."""
    records = up.loaded(mode="closed", concurrency=1, seconds=_ALONE_S, bodies=_bodies(1, 200)[0])
    return median(one.seconds - engine_ms(one.timing) / 1000 for one in records if one.status == 200)


def _window(up: System, seed: int, given: argparse.Namespace) -> Window:
    bodies, steps = _bodies(seed, _CAPTIONS)
    begin_s = time.time() + _WARM_S
    records = up.loaded(mode="closed", concurrency=given.concurrency, seconds=_WARM_S + given.seconds, bodies=bodies)
    if failed := [one for one in records if one.status != 200]:
        raise SystemExit(f"{len(failed)} of {len(records)} requests failed: {failed[0].error}")
    begin_s = max(begin_s, min(one.sent_s for one in records) + _WARM_S)
    return Window(seed, steps, records, begin_s, begin_s + given.seconds - _EDGE_S)


def _bodies(seed: int, count: int) -> tuple[list[str], list[int]]:
    asked = requests(_MIX, TASK.captions(count, seed), seed)
    steps = [int(one.kind) for one in asked]
    return [
        json.dumps({"model": TASK.name, "prompt": one.prompt, "seed": one.seed, "steps": each})
        for one, each in zip(asked, steps, strict=True)
    ], steps


def _calls(log: Path) -> list[Called]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [Called(one["at_s"], one["stage"], one["rows"], one["seconds"]) for one in lines if "stage" in one]


# --- the simulated one ---------------------------------------------------------------------------


def _run(window: Window, calls: Sequence[Called], bare: Fleet, around_s: float, clients: int) -> dict[str, Any]:
    mine = [one for one in calls if window.begin_s <= one.at_s < window.end_s]
    seconds = window.end_s - window.begin_s
    ended = [(window.steps[one.body], one.sent_s + one.seconds - window.begin_s, one.seconds) for one in window.records]
    found = {
        "real": _figures(ended, seconds),
        "engine": _simulated(bare, around_s, clients, seconds, window.seed),
        "live": _simulated(met(bare, mine), around_s, clients, seconds, window.seed),
        "rows_per_call": round(fmean(one.rows for one in mine if one.stage == "denoise"), 2),
    }
    out.print(found)
    return found


def met(bare: Fleet, calls: Sequence[Called]) -> Fleet:
    """`bare` with what calls took in a live run, in which all streams were busy; sizes that were hardly called are as
    much dearer than they were measured as the others of their stage are."""
    curve = CostModel()
    for stage in STAGES:
        took: dict[int, list[float]] = {size: [] for size in bare.sizes}
        for one in calls:
            if one.stage == stage:
                took[bare.padded(one.rows)].append(one.seconds)
        dearer = median(
            [second / bare.busy_s(stage, size) for size, seconds in took.items() for second in seconds] or [1.0]
        )
        for size, seconds in took.items():
            mine_s = median(seconds) if len(seconds) >= _ENOUGH else dearer * bare.busy_s(stage, size)
            curve.observe(CostKey(stage, stage, ()), size, mine_s)
    return replace(bare, costs=curve, overlapped=curve)


def _simulated(fleet: Fleet, around_s: float, clients: int, seconds: float, seed: int) -> dict[str, float]:
    mix = {int(kind): share for kind, share in _MIX.items()}
    told = closed(fleet, mix, clients=clients, seconds=_WARM_S + seconds, around_s=around_s, seed=seed)
    return _figures([(one.asked.steps, one.ended_s - _WARM_S, one.latency_s + around_s) for one in told], seconds)


def _figures(ended: Iterable[tuple[int, float, float]], seconds: float) -> dict[str, float]:
    """Of steps, time of the end, and latency of each request, those that ended between 0 and `seconds`."""
    by_steps: dict[int, list[float]] = defaultdict(list)
    for steps, at_s, latency_s in ended:
        if 0 <= at_s < seconds:
            by_steps[steps].append(latency_s)
    made = {"images_per_s": round(sum(map(len, by_steps.values())) / seconds, 1)}
    for steps, latencies in sorted(by_steps.items()):
        made |= {f"{name}_ms_{steps}": round(1000 * quantile(latencies, share), 1) for name, share in _SHARES.items()}
    return made


if __name__ == "__main__":
    main()
