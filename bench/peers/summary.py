"""From runs to cells, and from cells to the five figures by which Fewstep is judged beside its peers. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.machine import spread
from bench.peers.servers import FEWSTEP, OURS, TOLD
from bench.peers.workloads import LONE, Cell, capacity_cell

FIGURES = (
    "images_per_s", "p50_ms", "p95_ms", "p99_ms", "p95_1step_ms", "slo_attainment", "goodput_per_s", "cpu_s", "rss_mb",
)  # fmt: skip
_PLAIN = "fastapi naive"
_LEAST = 0.2  # a second: one picture in a window under Poisson arrivals, which is to be beaten where nobody made one


def cell(where: Cell, server: str, runs: Sequence[Mapping[str, Any]], ceilings: Sequence[float]) -> dict[str, Any]:
    """Medians of the runs, with their spread beside them.

    `overhead_ms` is what a lone request takes beyond the engine's own time; None in other cells.
    """
    over = {name: spread([run[name] for run in runs], 4) for name in FIGURES}
    lone, ceiling_per_s = where == LONE, statistics.median(ceilings)
    return {
        "workload": where.mix,
        "load": where.load,
        "peer": server,
        **{name: over[name]["median"] for name in FIGURES},
        "overhead_ms": round(over["p50_ms"]["median"] - 1000 / ceiling_per_s, 2) if lone else None,
        "ceiling_images_per_s": round(ceiling_per_s, 2),
        "requests": sum(run["requests"] for run in runs),
        "failed": sum(run["failed"] for run in runs),
        "wrong": sum(run["wrong"] for run in runs),
        "load_is_limit": any(run["load_is_limit"] for run in runs),
        "spread": over,
        "runs": list(runs),
    }


def capacity(where: Cell, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """Images a second that the best peer made at the closed loop of this cell's mix: `runs` by server."""
    rates = [statistics.median(run["images_per_s"] for run in mine) for name, mine in runs.items() if name not in OURS]
    if not any(rates):
        raise SystemExit(f"no peer answered at {capacity_cell(where).name}: nothing says how fast requests should come")
    return float(max(rates))


def ceiling(mix: Mapping[str, float], seconds: Mapping[str, Mapping[int, float]], most_rows: int) -> float:
    """Images a second of the bare engine loop: `seconds` a picture by kind and batch size, each kind at its best."""
    of = {kind: min(s for rows, s in seconds[kind].items() if rows <= most_rows) for kind in mix}
    return 1 / sum(share * of[kind] for kind, share in mix.items())


def summary(cells: Sequence[Mapping[str, Any]], wanted: Sequence[Cell]) -> dict[str, Any]:
    """None where a filter left out what a figure needs; `failing` names the cells that miss their goal."""
    found = {(one["workload"], one["load"], one["peer"]): one for one in cells}

    def ours(where: Cell, server: str = FEWSTEP) -> Mapping[str, Any] | None:
        return found.get((where.mix, where.load, server))

    def theirs(where: Cell, figure: str) -> list[float]:
        return [
            one[figure]
            for (mix, load, peer), one in found.items()
            if (mix, load) == (where.mix, where.load) and peer not in OURS
        ]

    def ratios(where: Sequence[Cell], figure: str, best: Any, server: str = FEWSTEP) -> dict[str, float]:
        made = {}
        for one in where:
            mine, others = ours(one, server), theirs(one, figure)
            if mine is not None and others:
                made[one.name] = round(mine[figure] / max(_LEAST, best(others)), 4)
        return made

    overload = [one for one in wanted if one.mode == "poisson" and one.mixed and one.amount >= 90]
    throughput = ratios(wanted, "images_per_s", max)
    goodput = ratios(overload, "goodput_per_s", max)
    told = ratios(overload, "goodput_per_s", max, TOLD)
    urgent = ratios([one for one in wanted if one.mix == "90/10" and one.mode == "poisson"], "p95_1step_ms", min)
    slo = {
        one.name: mine["slo_attainment"]
        for one in wanted
        if one.mode == "poisson" and one.amount == 90 and (mine := ours(one)) is not None
    }
    extra = _lone_extra_ms(found)
    failing = [
        *(f"throughput {name}: {value}" for name, value in throughput.items() if value < 0.95),
        *(f"goodput {name}: {value}" for name, value in goodput.items() if value < 1.5),
        *(f"p95 of 1-step {name}: {value}" for name, value in urgent.items() if value > 0.5),
        *(f"SLO {name}: {value}" for name, value in slo.items() if value < 0.99),
        *([f"lone latency: {extra} ms more than plain FastAPI"] if extra is not None and extra > 3 else []),
    ]
    return {
        "throughput_ratio_min": min(throughput.values(), default=None),
        "goodput_ratio_overload": min(goodput.values(), default=None),
        "goodput_ratio_overload_told": min(told.values(), default=None),
        "p95_1step_ratio_90_10": max(urgent.values(), default=None),
        "slo_attainment_90": min(slo.values(), default=None),
        "lone_latency_extra_ms": extra,
        "throughput_ratios": throughput,
        "goodput_ratios": goodput,
        "goodput_ratios_told": told,
        "p95_1step_ratios": urgent,
        "slo_attainments_90": slo,
        "failing": failing,
    }


def _lone_extra_ms(found: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> float | None:
    mine, plain = (found.get((LONE.mix, LONE.load, server)) for server in (FEWSTEP, _PLAIN))
    return None if mine is None or plain is None else round(float(mine["p50_ms"] - plain["p50_ms"]), 3)
