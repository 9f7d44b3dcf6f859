"""Several workers and gateways on one Redis: part (d) of `bench.growth`.

Workers run the paced engine, which takes a known time and no processor, so that what is measured is what the processes
around engines cost, and where the cores of the machine are spent: with more workers than these feed, requests a second
stop growing. Every gateway has a load generator of its own, which takes its share of the same cores. A gateway that is
not asked stays up beside the others.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import quantile, spread
from bench.system import MODEL, System, system
from distill_jobs.tasks import shapes
from engines.backends.base import BATCHES
from engines.backends.paced import MAX_ROWS, PACE_PER_S
from server import leases
from server.brokers.redis import RedisBroker

GATEWAYS = (1, 2)
_CLIENTS = 3 * MAX_ROWS  # for each worker: more than it holds at once
_SETTLE_S = 1.0
_START_S = 120.0


@contextlib.contextmanager
def paced(folder: Path, workers: int) -> Iterator[System]:
    """Everything up, and every worker serving."""
    env = {"WORKER_BACKEND": "paced", "WORKER_BATCH_SIZES": json.dumps(BATCHES)}
    gateways = max(GATEWAYS)
    with system(
        folder, shapes.TASK.pipeline, versions=1, steps=1, threads=1, env=env, workers=workers, gateways=gateways
    ) as (up, _):
        asyncio.run(_all_serving(up.stack.redis_url, workers))
        yield up


async def _all_serving(redis_url: str, workers: int) -> None:
    broker = RedisBroker(redis_url, "bench")
    await broker.start()
    try:
        async with asyncio.timeout(_START_S):
            while sum(MODEL in leases.read(one.info).revisions for one in await broker.workers()) < workers:
                await asyncio.sleep(0.1)
    finally:
        await broker.close()


def cell(up: System, workers: int, gateways: int, *, runs: int, seconds: float) -> dict[str, Any]:
    """Medians of some windows. `cpu_ms_per_picture`: of all processes of a kind together, load generators apart."""
    made = [_window(up, workers, gateways, seconds) for _ in range(runs)]
    kinds = made[0]["cpu_ms_per_picture"]
    return {
        "workers": workers,
        "gateways": gateways,
        "engines_per_s": round(workers * PACE_PER_S),
        **{name: spread([run[name] for run in made], 1) for name in ("pictures_per_s", "p50_ms", "p95_ms")},
        "failed": sum(run["failed"] for run in made),
        "cpu_ms_per_picture": {kind: spread([run["cpu_ms_per_picture"][kind] for run in made]) for kind in kinds},
        "load_cores": spread([run["load_cores"] for run in made], 2),
    }


def _window(up: System, workers: int, gateways: int, seconds: float) -> dict[str, Any]:
    ports = list(up.stack.ports.values())[:gateways]
    clients = workers * _CLIENTS // gateways
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(up.load(mode="closed", concurrency=clients, port=port, seconds=seconds + 3 * _SETTLE_S))
            for port in ports
        ]
        time.sleep(2 * _SETTLE_S)  # the generators' own start is in it
        before, load_before_s, begun_s = up.cpu(), sum(load.cpu_s for load in loads), time.time()
        time.sleep(seconds)
        spent, load_s, ended_s = up.cpu().since(before), sum(load.cpu_s for load in loads) - load_before_s, time.time()
        for load in loads:
            load.stop(wait=True)
    records = [one for load in loads for one in load.records]
    good = [one for one in records if one.status == 200 and begun_s <= one.sent_s + one.seconds < ended_s]
    pictures = max(1, len(good))
    kinds = sorted({_kind(name) for name in spent})
    return {
        "pictures_per_s": len(good) / (ended_s - begun_s),
        "p50_ms": 1000 * quantile([one.seconds for one in good], 0.5),
        "p95_ms": 1000 * quantile([one.seconds for one in good], 0.95),
        "failed": sum(one.status != 200 for one in records),
        "cpu_ms_per_picture": {kind: 1000 * _spent_s(spent, kind) / pictures for kind in kinds},
        "load_cores": load_s / (ended_s - begun_s),
    }


def _spent_s(spent: dict[str, float], kind: str) -> float:
    return sum(seconds for name, seconds in spent.items() if _kind(name) == kind)


def _kind(name: str) -> str:
    """`worker` of `worker-1`."""
    return name.partition("-")[0]
