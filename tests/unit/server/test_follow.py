"""What somebody reads who watches a job without a terminal: every event that matters, progress now and then."""

import io
from typing import Any

from rich.console import Console
from rich.progress import Progress

from server.commands.follow import View

STUDENT = "small@" + "a" * 64


def said(*events: dict[str, Any], seconds: float = 1.0) -> list[str]:
    """The lines, with `seconds` between two events."""
    now = iter(range(1000))
    console = Console(file=io.StringIO(), width=200)
    view = View(Progress(console=console, disable=True), console, clock=lambda: seconds * next(now))
    for event in events:
        view.show(event)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def step(number: int) -> dict[str, Any]:
    return {"event": "progress", "step": number, "total_steps": 9, "losses": {"fake": 0.5, "student": 0.25}, "eta_s": 7}


def test_a_step_shows_the_loss_of_every_role_and_the_time_left() -> None:
    assert said(step(3)) == ["step 3 of 9 · loss fake 0.500 student 0.250 · 7 s left"]


def test_steps_are_told_now_and_then_only() -> None:
    assert len(said(*[step(n) for n in range(9)], seconds=0.1)) == 1
    assert len(said(*[step(n) for n in range(9)], seconds=100.0)) == 9


def test_the_latest_metric_stands_in_the_steps_after_it() -> None:
    metric = {"event": "metric", "step": 4, "metrics": {"fd": 1.1, "fd@1": 1.3, "grain": 0.6}}
    lines = said(metric, step(5), seconds=100.0)
    assert lines == [
        "step 4: fd ratio 1.10 (fd@1 1.30)",
        "step 5 of 9 · loss fake 0.500 student 0.250 · fd ratio 1.10 · 7 s left",
    ]


def test_a_student_that_goes_live_is_named_with_its_tiers() -> None:
    lines = said({"event": "swap", "student": STUDENT, "tiers": {"low": 1, "medium": 4}})
    assert lines == ["small@aaaaaaaaaaaa is live: low at 1 steps, medium at 4 steps"]


def test_what_training_should_need_is_said_before_it_and_what_it_needed_after_it() -> None:
    lines = said(
        {"event": "plan", "total_steps": 9, "train_seconds": 90.2, "memory_bytes": 600 << 20},
        {"event": "measured", "train_seconds": 99.0, "memory_bytes": 640 << 20},
    )
    assert lines == ["training should need 90 s and 600 MiB", "training needed 99 s and 640 MiB"]


def test_events_for_machines_are_not_shown() -> None:
    assert said({"event": "panel", "name": "panels/1.png"}, {"event": "checkpoint", "step": 1}) == []
