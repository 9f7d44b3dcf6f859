"""A trainer's words as the API has them."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_jobs.events import EventLog
from distill_jobs.plan import Plan, StagePlan

PLAN = Plan((StagePlan("kd", 100, seconds=10.0), StagePlan("sid", 50, seconds=20.0)), eval_every=10, bf16=False)


def progress(**changes: Any) -> dict[str, Any]:
    event = {
        "type": "progress",
        "stage": 0,
        "method": "kd",
        "iteration": 40,
        "iterations": 100,
        "it_s": 10.0,
        "eta_s": 6.0,
        "loss.student.kd": 0.5,
        "grad_norm.student": 1.5,
    }
    return {**event, **changes}


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path, PLAN, now=lambda: "now")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_progress_counts_over_all_stages_and_sums_each_roles_losses(log: EventLog, tmp_path: Path) -> None:
    log(progress(stage=1, iteration=5, **{"loss.fake.dsm": 1.0, "loss.student.dm": 0.25}))
    event = lines(tmp_path)[0]
    assert (event["step"], event["total_steps"]) == (105, 150)
    assert event["losses"] == {"student": 0.75, "fake": 1.0}
    assert event["grad_norm"] == {"student": 1.5}


def test_the_time_left_is_of_all_stages_to_come(log: EventLog, tmp_path: Path) -> None:
    log(progress())
    log(progress(stage=1, iteration=0, eta_s=20.0))
    assert [event["eta_s"] for event in lines(tmp_path)] == [26.0, 20.0]


def test_the_last_metrics_stand_in_every_later_progress(log: EventLog, tmp_path: Path) -> None:
    log({"type": "evaluation", "stage": 0, "iteration": 40, "metrics": {"fd": 1.5}})
    log(progress())
    assert json.loads((tmp_path / "progress.json").read_text())["metrics"] == {"fd": 1.5}
    assert [event["event"] for event in lines(tmp_path)] == ["metric", "progress"]


def test_what_is_no_number_is_null_and_not_broken_json(log: EventLog, tmp_path: Path) -> None:
    log(progress(**{"loss.student.kd": float("nan"), "grad_norm.student": float("inf")}))
    event = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=pytest.fail)
    assert (event["losses"], event["grad_norm"]) == ({"student": None}, {"student": None})


def test_a_checkpoint_says_whether_it_is_the_best(log: EventLog, tmp_path: Path) -> None:
    log({"type": "checkpoint", "stage": 1, "iteration": 10})
    log({"type": "best", "stage": 1, "iteration": 10, "metrics": {"fd": 1.1}, "schedules": {}})
    assert [(e["event"], e["step"], e.get("best")) for e in lines(tmp_path)] == [
        ("checkpoint", 110, None),
        ("checkpoint", 110, True),
    ]


def test_an_alarm_is_passed_on(log: EventLog, tmp_path: Path) -> None:
    log({"type": "alarm", "what": "std_ratio", "value": 0.1, "low": 0.3, "iteration": 3})
    assert lines(tmp_path)[0] == {
        "event": "alarm", "at": "now", "what": "std_ratio", "value": 0.1, "low": 0.3, "iteration": 3,
    }  # fmt: skip
