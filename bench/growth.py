"""What a request costs as systems grow: `python -m bench.growth` writes bench/growth.json.

(a) claim and finish of a batch beside so many queued rows in a real Redis (`bench.queues`); (b) one decision of a
batcher with so many waiting rows; (c) one decision of the simulated scheduler with so many workers on one queue.
"""

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.costs import SIZES, read
from bench.fleet import Asked, Fleet
from bench.machine import described, spread
from bench.queues import queues
from bench.simulation import Simulation
from server.batcher import Batcher, LaneKey, Row

out = Console(stderr=True)
_OUT = Path(__file__).parent / "growth.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="the long queue of (a)")
    parser.add_argument("--fill-s", type=float, default=900.0, help="the long queue has what is published in this time")
    parser.add_argument(
        "--batches", type=int, default=200, help="claimed and finished in one run of (a), a multiple of 25"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--parts", default="abc")
    parser.add_argument("--quick", action="store_true", help="20,000 rows, 3 runs of 50 batches")
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    if given.quick:
        given.rows, given.runs, given.batches = 20_000, 3, 50
    report = described("bench.growth")
    if "a" in given.parts:
        report["redis"] = asyncio.run(
            queues(rows=given.rows, runs=given.runs, batches=given.batches, fill_s=given.fill_s)
        )
    if "b" in given.parts:
        report["batcher"] = [decisions(waiting, given.runs) for waiting in (10, 100, 1000, 10_000, 100_000)]
    if "c" in given.parts:
        report["simulation"] = [simulated(workers, given.runs) for workers in (1, 10, 100, 1000)]
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    out.print_json(json.dumps(report))


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
