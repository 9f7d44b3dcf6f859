"""What a request costs as systems grow: `python -m bench.growth` writes bench/growth.json and bench/growth.md.

(a) claim and finish of a batch beside so many queued rows in a real Redis (`bench.queues`); (b) one decision of a
batcher with so many waiting rows; (c) one decision of the simulated scheduler with so many workers on one queue;
(d) pictures a second and processor time a picture with so many workers and gateways (`bench.processes`).

Stop it and start it again as you like: what was measured is kept in bench/tmp, until `--fresh`.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from bench import processes
from bench.costs import recorded
from bench.fleet import Asked
from bench.growth_table import markdown
from bench.machine import described, spread
from bench.peers.ledger import Ledger
from bench.queues import queues
from bench.simulation import Simulation
from engines.cost import CostKey
from server.batcher import Batcher, LaneKey, Row

out = Console(stderr=True)
_OUT = Path(__file__).parent / "growth.json"
_LEDGER = Path(__file__).parent / "tmp" / "growth.jsonl"


def main() -> None:
    given = _arguments()
    report = described("bench.growth")
    settings = {name: value for name, value in vars(given).items() if name not in ("parts", "fresh", "out")}
    if given.fresh:
        _LEDGER.unlink(missing_ok=True)
    ledger = Ledger(_LEDGER, settings | {"cpu": report["machine"]["cpu"]})
    report |= measured(given, ledger)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    given.out.with_suffix(".md").write_text(text)
    out.print(Markdown(text))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="the long queue of (a)")
    parser.add_argument("--fill-s", type=float, default=240.0, help="the long queue has what is published in this time")
    parser.add_argument(
        "--batches", type=int, default=200, help="claimed and finished in one run of (a), a multiple of 25"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of a window of (d)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="of (d)")
    parser.add_argument("--runs", type=int, default=5, help="of each part; of (d) three at most")
    parser.add_argument("--parts", default="abcd")
    parser.add_argument("--quick", action="store_true", help="20,000 rows, 3 runs of 50 batches, one window of (d)")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    if given.quick:
        given.rows, given.runs, given.batches, given.seconds = 20_000, 3, 50, 2.0
    return given


def measured(given: argparse.Namespace, ledger: Ledger) -> dict[str, Any]:
    """The chosen parts; what the ledger has is not measured again."""

    def kept(name: str, measure: Callable[[], Any]) -> Any:
        if name not in ledger:
            out.print(f"measuring {name}")
            ledger.put(name, measure())
        return ledger[name]

    report: dict[str, Any] = {}
    if "a" in given.parts:
        long = {"rows": given.rows, "runs": given.runs, "batches": given.batches, "fill_s": given.fill_s}
        report["redis"] = kept("redis", lambda: asyncio.run(queues(**long)))
    if "b" in given.parts:
        lengths = (10, 100, 1000, 10_000, 100_000)
        report["batcher"] = [kept(f"batcher/{n}", partial(decisions, n, given.runs)) for n in lengths]
    if "c" in given.parts:
        fleets = (1, 10, 100, 1000)
        report["simulation"] = [kept(f"simulation/{n}", partial(simulated, n, given.runs)) for n in fleets]
    if "d" in given.parts:
        report["processes"] = [one for workers in given.workers for one in _cells(workers, given, ledger)]
    return report


# --- (b) and (c) ---------------------------------------------------------------------------------


def decisions(waiting: int, runs: int) -> dict[str, Any]:
    """Expire, choose a batch, put its rows back: microseconds of processor time."""
    rng, fleet = random.Random(0), recorded()
    batcher: Batcher[Row] = Batcher(
        fleet.sizes, lambda lane, size: fleet.busy.seconds(CostKey(lane.stage, lane.stage, ()), size)
    )
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
    fleet = recorded(workers)
    pace_s = fleet.queued_s(Asked(at_s=0.0, steps=2)) / workers / 0.9
    asked = [Asked(at_s=i * pace_s, steps=2) for i in range(max(1000, 8 * workers))]

    def run() -> float:
        simulation, begun_s = Simulation(fleet), time.process_time()
        simulation.run(asked)
        return 1e6 * (time.process_time() - begun_s) / simulation.calls

    return {"workers": workers, "streams": fleet.streams, "us_per_call": spread([run() for _ in range(runs)], 1)}


# --- (d) -----------------------------------------------------------------------------------------


def _cells(workers: int, given: argparse.Namespace, ledger: Ledger) -> list[dict[str, Any]]:
    """With every number of gateways; the processes are started if a cell is missing."""
    names = {gateways: f"processes/{workers}/{gateways}" for gateways in processes.GATEWAYS}
    missing = [gateways for gateways, name in names.items() if name not in ledger]
    if missing:
        out.print(f"starting {workers} workers and {max(names)} gateways")
        runs = 1 if given.quick else min(3, given.runs)
        temporary = tempfile.TemporaryDirectory(prefix="fewstep-bench-")
        with temporary as folder, processes.paced(Path(folder), workers) as up:
            for gateways in missing:
                out.print(f"measuring {names[gateways]}")
                made = processes.cell(up, workers, gateways, runs=runs, seconds=given.seconds)
                ledger.put(names[gateways], made)
    return [ledger[name] for name in names.values()]


if __name__ == "__main__":
    main()
