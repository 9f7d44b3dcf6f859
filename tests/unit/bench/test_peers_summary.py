from typing import Any

import pytest

from bench.peers import summary, table
from bench.peers.servers import FEWSTEP, TOLD
from bench.peers.summary import FIGURES
from bench.peers.workloads import CELLS, Cell

LONE, MIXED = Cell("1-step", "closed", 1), Cell("50/30/20", "closed", 64)
AT_90, AT_120 = Cell("50/30/20", "poisson", 90), Cell("50/30/20", "poisson", 120)
URGENT = Cell("90/10", "poisson", 60)


def run(**figures: float) -> dict[str, Any]:
    zero = dict.fromkeys(FIGURES, 0.0)
    return {**zero, "requests": 10, "failed": 0, "wrong": 0, "load_is_limit": False, **figures}


def cell(where: Cell, server: str, **figures: float) -> dict[str, Any]:
    return summary.cell(where, server, [run(**figures)], [100.0])


def test_a_cell_has_the_median_of_its_runs_with_least_and_most_beside_it() -> None:
    runs = [run(images_per_s=rate, failed=1) for rate in (30.0, 10.0, 20.0)]
    made = summary.cell(MIXED, "ray naive", runs, [50.0, 70.0, 60.0])
    assert made["images_per_s"] == 20
    assert made["spread"]["images_per_s"] == {"median": 20, "min": 10, "max": 30}
    assert made["ceiling_images_per_s"] == 60
    assert (made["requests"], made["failed"], len(made["runs"])) == (30, 3, 3)


def test_overhead_is_what_a_lone_request_takes_beyond_the_engine() -> None:
    assert summary.cell(LONE, FEWSTEP, [run(p50_ms=13.0)], [100.0])["overhead_ms"] == 3
    assert summary.cell(MIXED, FEWSTEP, [run(p50_ms=13.0)], [100.0])["overhead_ms"] is None


def test_the_ceiling_gives_every_kind_its_best_batch_that_the_load_can_fill() -> None:
    seconds = {"1": {1: 0.02, 8: 0.01}, "4": {1: 0.08, 8: 0.05}}
    assert summary.ceiling({"1": 1.0}, seconds, 1) == pytest.approx(50)
    assert summary.ceiling({"1": 1.0}, seconds, 64) == pytest.approx(100)
    assert summary.ceiling({"1": 0.5, "4": 0.5}, seconds, 8) == pytest.approx(1 / 0.03)


def test_capacity_is_the_best_peers_and_never_our_own() -> None:
    runs = {FEWSTEP: [run(images_per_s=99.0)], "a": [run(images_per_s=10.0), run(images_per_s=20.0)]}
    assert summary.capacity(AT_90, runs | {"b": [run(images_per_s=12.0)]}) == 15
    with pytest.raises(SystemExit, match="50/30/20, closed, 64 clients"):
        summary.capacity(AT_90, {FEWSTEP: runs[FEWSTEP]})
    with pytest.raises(SystemExit, match="no peer answered"):
        summary.capacity(AT_90, {"a": [run(images_per_s=0.0)]})


def test_every_ratio_is_against_the_best_peer_of_its_cell_and_the_worst_cell_counts() -> None:
    cells = [
        cell(LONE, FEWSTEP, images_per_s=90.0, p50_ms=13.0),
        cell(LONE, "fastapi naive", images_per_s=100.0, p50_ms=11.0),
        cell(LONE, "ray naive", images_per_s=50.0, p50_ms=5.0),
        cell(MIXED, FEWSTEP, images_per_s=120.0),
        cell(MIXED, "fastapi naive", images_per_s=60.0),
        cell(MIXED, "fastapi grouped", images_per_s=100.0),
        cell(AT_90, FEWSTEP, images_per_s=90.0, goodput_per_s=80.0, slo_attainment=0.97),
        cell(AT_90, "fastapi grouped", images_per_s=90.0, goodput_per_s=40.0, slo_attainment=0.4),
        cell(AT_120, FEWSTEP, images_per_s=110.0, goodput_per_s=30.0),
        cell(AT_120, TOLD, images_per_s=70.0, goodput_per_s=60.0),
        cell(AT_120, "fastapi grouped", images_per_s=100.0, goodput_per_s=25.0),
        cell(URGENT, FEWSTEP, images_per_s=10.0, p95_1step_ms=20.0),
        cell(URGENT, "fastapi grouped", images_per_s=10.0, p95_1step_ms=100.0),
        cell(URGENT, "diffusers grouped", images_per_s=9.0, p95_1step_ms=50.0),
    ]
    made = summary.summary(cells, CELLS)
    assert made["throughput_ratio_min"] == 0.9
    assert made["throughput_ratios"]["50/30/20, closed, 64 clients"] == 1.2
    assert made["goodput_ratio_overload"] == 1.2
    assert made["goodput_ratio_overload_told"] == 2.4
    assert made["p95_1step_ratio_90_10"] == 0.4
    assert made["slo_attainment_90"] == 0.97
    assert made["lone_latency_extra_ms"] == 2.0  # plain FastAPI is the measure, not the fastest
    assert made["failing"] == [
        "throughput 1-step, closed, 1 clients: 0.9",
        "goodput 50/30/20, Poisson, 120 %: 1.2",
        "SLO 50/30/20, Poisson, 90 %: 0.97",
    ]


def test_a_figure_whose_cells_a_filter_left_out_is_none() -> None:
    made = summary.summary([cell(MIXED, FEWSTEP, images_per_s=120.0)], CELLS)
    names = ("throughput_ratio_min", "goodput_ratio_overload", "p95_1step_ratio_90_10", "slo_attainment_90")
    assert [made[name] for name in (*names, "lone_latency_extra_ms")] == [None] * 5
    assert made["failing"] == []


def test_the_table_shows_every_cell_the_fastest_first() -> None:
    cells = [cell(MIXED, "ray naive", images_per_s=40.0), cell(MIXED, FEWSTEP, images_per_s=80.0)]
    report = {
        "machine": {"cpu": "a", "cores": 2, "load_1min_before": 0.1},
        **{"command": "c", "date": "d", "engine": "e", "runs": 1, "slo": "s"},
        "summary": summary.summary(cells, CELLS),
        "cells": cells,
        "given": {"ray": "all cores"},
    }
    lines = table.markdown(report).splitlines()
    rows = [line for line in lines if line.startswith(("| fewstep", "| ray"))]
    assert [row.split(" | ")[:3] for row in rows] == [["| fewstep", "80.0", "80 %"], ["| ray naive", "40.0", "40 %"]]
    assert "- **ray**: all cores" in lines
