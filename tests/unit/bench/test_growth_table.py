"""The tables say what was measured, and of which parts."""

from typing import Any

import pytest

from bench.growth_table import markdown

HEAD = {"machine": {"cpu": "a CPU", "cores": 2, "load_1min_before": 0.1}, "command": "python -m …", "date": "today"}


def middle(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


@pytest.mark.parametrize(("ratio", "said"), [(1.19, ": flat within"), (1.21, ": NOT flat within")])
def test_a_long_queue_that_costs_a_fifth_more_is_not_flat(ratio: float, said: str) -> None:
    cost = {"us_per_request": middle(150.0), "server_us_per_request": middle(75.0)}
    cells = [{"queued": queued, "settled": cost, "fresh": cost} for queued in (1000, 1_000_000)]
    ratios = {"ratio": 1.0, "server_ratio": ratio, "fresh_ratio": 1.0, "fresh_server_ratio": 1.0}
    text = markdown({**HEAD, "redis": {"claim_and_finish": cells, **ratios}})
    assert said in text
    assert "| 1,000,000 | 150.0 | 75.0 | 150.0 | 75.0 |" in text


def test_processes_are_added_up_and_parts_that_were_not_measured_are_left_out() -> None:
    cell: dict[str, Any] = {"workers": 2, "gateways": 1, "engines_per_s": 400, "failed": 0, "load_cores": middle(0.3)}
    cell |= {"pictures_per_s": middle(390.0), "p95_ms": middle(200.0)}
    cell["cpu_ms_per_picture"] = {"gateway": middle(0.5), "redis": middle(0.1), "worker": middle(0.75)}
    text = markdown({**HEAD, "processes": [cell]})
    assert "| 2 | 1 | 400 | 390.0 | 200.0 | 0.50 | 0.10 | 0.75 | 1.35 | 0.3 | 0 |" in text
    assert "Redis, beside queued ones" not in text
