"""What a request costs as systems grow: `python -m bench.growth` writes bench/growth.json.

(a) claim and finish of a batch beside so many queued rows in a real Redis, through the broker; (b) one decision of a
batcher with so many waiting rows; (c) one decision of the simulated scheduler with so many workers on one queue.
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.costs import SIZES, read
from bench.fleet import Asked, Fleet
from bench.machine import described, spread
from bench.simulation import Simulation
from server.batcher import Batcher, LaneKey, Row
from server.brokers.base import Broker, Finished
from server.brokers.redis import RedisBroker
from server.embedded import redis_binary
from server.messages import GenerateRequest, GenerateResult

out = Console(stderr=True)
_OUT = Path(__file__).parent / "growth.json"
_MODEL, _VERSION = "shapes", f"shapes@{'0' * 64}"
_AT_ONCE = 2000  # publishes under way
_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="the long queue of (a)")
    parser.add_argument("--fill-s", type=float, default=900.0, help="the long queue has what is published in this time")
    parser.add_argument("--batches", type=int, default=200, help="claimed and finished in one run of (a)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--parts", default="abc")
    parser.add_argument("--quick", action="store_true", help="20,000 rows, 3 runs of 50 batches")
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    if given.quick:
        given.rows, given.runs, given.batches = 20_000, 3, 50
    report = described("bench.growth")
    if "a" in given.parts:
        report["redis"] = asyncio.run(queues(given))
    if "b" in given.parts:
        report["batcher"] = [decisions(waiting, given.runs) for waiting in (10, 100, 1000, 10_000, 100_000)]
    if "c" in given.parts:
        report["simulation"] = [simulated(workers, given.runs) for workers in (1, 10, 100, 1000)]
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    out.print_json(json.dumps(report))


# --- (a) -----------------------------------------------------------------------------------------


async def queues(given: argparse.Namespace) -> dict[str, Any]:
    """Short and long queue by turns, so that what else the machine does meets both."""
    lengths = (1000, given.rows)
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    with redis_server() as url:
        async with contextlib.AsyncExitStack() as stack:
            brokers = {each: await stack.enter_async_context(broker(url, f"rows{each}")) for each in lengths}
            published = {each: await fill(one, range(each), given.fill_s) for each, one in brokers.items()}
            queued = dict(published)
            out.print(f"rows queued: {queued}")
            for _ in range(given.runs):
                for length, one in brokers.items():
                    seconds[length].append(await served(one, given.batches))
                    again = range(published[length], published[length] + given.batches * _BATCH)
                    published[length] += await fill(one, again, given.fill_s)
    spreads = {length: spread([1e6 * each for each in found], 1) for length, found in seconds.items()}
    cells = [{"queued": queued[length], "us_per_request": found} for length, found in spreads.items()]
    short, long = (found["median"] for found in spreads.values())
    return {"claim_and_finish": cells, "ratio": round(long / short, 3), "runs": given.runs, "batch": _BATCH}


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        socket = Path(folder) / "redis.sock"
        command = [redis_binary(), "--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", ""]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                while not socket.exists():
                    time.sleep(0.05)
                yield f"unix://{socket}"
            finally:
                process.kill()


@contextlib.asynccontextmanager
async def broker(url: str, namespace: str) -> AsyncIterator[Broker]:
    made = RedisBroker(url, "bench", namespace=namespace, lease_s=3600.0)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def fill(broker: Broker, numbers: range, within_s: float) -> int:
    """Publishes requests for so long; how many."""
    until_s = time.perf_counter() + within_s
    for begin in range(0, len(numbers), _AT_ONCE):
        await asyncio.gather(*(broker.publish(request(number)) for number in numbers[begin : begin + _AT_ONCE]))
        if time.perf_counter() > until_s:
            return min(begin + _AT_ONCE, len(numbers))
    return len(numbers)


def request(number: int) -> GenerateRequest:
    """Sixteen keys, three kinds of request."""
    rng = random.Random(number)
    steps = rng.choice((1, 2, 4))
    return GenerateRequest(
        id=f"gen_{number:028x}",
        model=_MODEL,
        version=_VERSION,
        tier="low",
        steps=steps,
        prompt="a small red circle above a large blue square on a white background",
        width=64,
        height=64,
        seed=number,
        budget_ms=3_600_000,
        reply_to="nobody",
        owner=f"key{rng.randrange(16)}",
        cost_s=0.004 * steps,
        due_after_s=0.25 * steps,
    )


async def served(broker: Broker, batches: int) -> float:
    """Seconds per request of claiming and finishing a batch after the other."""
    begun_s = time.perf_counter()
    for _ in range(batches):
        claims = await broker.claim([_MODEL], _BATCH, 0.0)
        assert len(claims) == _BATCH, "the queue has run empty"
        answers = [Finished(claim, GenerateResult(id=claim.request.id, status="succeeded")) for claim in claims]
        assert all(await broker.finish_many(answers))
    return (time.perf_counter() - begun_s) / batches / _BATCH


# --- (b) and (c) ---------------------------------------------------------------------------------


def decisions(waiting: int, runs: int) -> dict[str, Any]:
    """Expire, choose a batch, put its rows back: microseconds of processor time."""
    rng, fleet = random.Random(0), Fleet(read(), sizes=SIZES)
    batcher: Batcher[Row] = Batcher(SIZES, fleet.call_s)
    lanes = [LaneKey("denoise", f"net{i}") for i in range(4)]
    for number in range(waiting):
        lane, due_s = rng.choice(lanes), 100 * rng.random()
        batcher.add(
            Row(request_id=str(number), lane=lane, due_s=due_s, deadline_s=1e6, network_rows=rng.choice((1, 2)))
        )

    def run() -> float:
        turns, begun_s = 500, time.process_time()
        for _ in range(turns):
            batcher.expire(0.0)
            for row in batcher.next_batch():
                row.due_s += 100 * rng.random()
                batcher.add(row)
        return 1e6 * (time.process_time() - begun_s) / turns

    return {"waiting": waiting, "us_per_decision": spread([run() for _ in range(runs)], 1)}


def simulated(workers: int, runs: int) -> dict[str, Any]:
    """Everything from arrival to end at 90 % of what full batches would take, per engine call."""
    fleet = Fleet(read(), workers, SIZES)
    pace_s = fleet.queued_s(Asked(at_s=0.0, steps=2)) / workers / 0.9
    asked = [Asked(at_s=i * pace_s, steps=2) for i in range(max(1000, 8 * workers))]

    def run() -> float:
        simulation, begun_s = Simulation(fleet), time.process_time()
        simulation.run(asked)
        return 1e6 * (time.process_time() - begun_s) / simulation.calls

    return {"workers": workers, "us_per_call": spread([run() for _ in range(runs)], 1)}


if __name__ == "__main__":
    main()
