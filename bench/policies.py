"""What other rules would make of the same traffic: `python -m bench.policies` writes bench/policies.json and a table.

Every rule gets the same Poisson arrivals on the recorded costs, in simulation, one worker. Load is a share of what
full batches would take. A request is in time within three times its lone latency.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.costs import recorded
from bench.fleet import Asked, Fleet, Policy, SimRow, Told, production
from bench.machine import described, quantile
from bench.simulation import Simulation
from server.batcher import Batcher

out = Console()
_OUT = Path(__file__).parent / "policies.json"
_SLO = 3.0
TEACHER = Asked(at_s=0.0, steps=32, model="teacher", network_rows=2)
WORKLOADS: dict[str, list[tuple[float, Asked]]] = {
    "50/30/20 of 1/2/4 steps": [
        (share, Asked(at_s=0.0, steps=steps)) for share, steps in ((0.5, 1), (0.3, 2), (0.2, 4))
    ],
    "90/10 of 1 step and teacher": [(0.9, Asked(at_s=0.0, steps=1)), (0.1, TEACHER)],
}


class WholeRequests(Batcher[SimRow]):
    """First come, first served, a batch of requests at a time: nobody joins before the last of them is done."""

    chosen: frozenset[str] = frozenset()

    def next_batch(self) -> list[SimRow]:
        waiting = [row for lane in self._lanes.values() for row in lane]
        if not any(row.request_id in self.chosen for row in waiting):
            order = sorted({row.request_id: row.told.asked.at_s for row in waiting}.items(), key=lambda each: each[1])
            self.chosen = frozenset(name for name, _ in order[: self.sizes[-1]])
        others = self.remove({row.request_id for row in waiting} - self.chosen)
        batch = super().next_batch()
        for row in others:
            self.add(row)
        return batch


def stretched(stretch: float) -> Policy:
    return Policy(partial(production, stretch=stretch))


def remaining(told: Told, step: int) -> float:
    return 1e6 * told.queued_s * (1 - step / told.asked.steps) - 1e9


POLICIES: dict[str, Policy] = {
    "production (stretch 64)": Policy(),
    "no overtaking": Policy(overtaking=False),
    **{f"stretch {stretch}": stretched(stretch) for stretch in (8, 32, 256)},
    "earliest deadline": Policy(lambda told, _: told.asked.budget_s),
    "shortest remaining": Policy(remaining),
    "whole requests as they come": Policy(lambda *_: 0.0, batcher=WholeRequests, overtaking=False),
}


def arrivals(mix: Sequence[tuple[float, Asked]], rate: float, seconds: float, seed: int) -> Iterator[Asked]:
    rng, at_s = random.Random(seed), 0.0
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        [kind] = rng.choices([asked for _, asked in mix], [share for share, _ in mix])
        yield replace(kind, at_s=at_s)


def judged(fleet: Fleet, told: Sequence[Told]) -> dict[str, Any]:
    in_time = [one for one in told if one.ending == "succeeded" and one.latency_s <= _SLO * fleet.alone_s(one.asked)]
    made: dict[str, Any] = {"slo_attainment": round(len(in_time) / len(told), 4)}
    for steps in sorted({one.asked.steps for one in told}):
        latencies = [one.latency_s for one in told if one.asked.steps == steps and one.ending == "succeeded"]
        for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
            made[f"{name}_ms_{steps}"] = round(1000 * quantile(latencies, share), 1)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, on the simulation's clock")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.9, 1.2])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    report, fleet = described("bench.policies"), recorded()
    report["cells"] = []
    for workload, mix in WORKLOADS.items():
        capacity = 1 / sum(share * fleet.queued_s(asked) for share, asked in mix)
        for load in given.loads:
            asked = list(arrivals(mix, load * capacity, given.seconds, given.seed))
            for name, policy in POLICIES.items():
                figures = judged(fleet, Simulation(fleet, policy).run(asked))
                report["cells"].append({"workload": workload, "load": load, "policy": name, **figures})
                out.print(f"{workload} · {load:.0%} · {name}: {figures}")
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
