"""A job in front of your eyes: a bar on a terminal, lines where output is kept, a line for whatever happened."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from engines.manifest import shown
from server.client import Client
from server.commands.terminal import out

JOBS = "/v1/distillation/jobs"
ENDED = frozenset({"succeeded", "failed", "canceled"})
_EVERY_S = 15.0  # between lines of progress where there is no terminal
Json = dict[str, Any]


def follow(client: Client, job_id: str) -> Json:
    """Shows the job's events as they come and returns the job as it ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=out) as progress:
        view = View(progress, out)
        for event in client.events(f"{JOBS}/{job_id}/events"):
            view.show({**event, **(event.get("data") or {})})
            if event.get("status") in ENDED:
                break
    job = client.get(f"{JOBS}/{job_id}")
    out.print(summary(job), highlight=False)
    return job


class View:
    """Draws events. The bar has the step, the loss of every role, the latest metric and the time left."""

    def __init__(self, progress: Progress, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._console, self._clock = progress, console, clock
        self._bar: TaskID = progress.add_task("queued", total=None, note="")
        self._metric = ""
        self._said_s = float("-inf")
        self._drawn = {"preparing": self._preparing, "progress": self._step, "metric": self._judged}
        self._drawn |= {"status": self._status, "swap": self._swap, "note": self._word, "alarm": self._alarm}
        self._drawn |= {"plan": self._planned, "measured": self._measured}

    def show(self, event: Json) -> None:
        draw = self._drawn.get(event["event"])
        if draw:
            draw(event)

    def _status(self, event: Json) -> None:
        self._progress.update(self._bar, description=event["status"], note="", completed=0, total=None)
        self._print(event["status"])

    def _preparing(self, event: Json) -> None:
        note = f"{event['done']} of {event['total']} made for {event['method']}"
        self._progress.update(self._bar, completed=event["done"], total=event["total"], note=note)
        self._now_and_then(note)

    def _step(self, event: Json) -> None:
        losses = " ".join(f"{role} {value:.3f}" for role, value in event["losses"].items())
        left = f"{event['eta_s']:.0f} s left" if event.get("eta_s") is not None else ""
        note = " · ".join(part for part in (f"loss {losses}", self._metric, left) if part)
        self._progress.update(self._bar, completed=event["step"], total=event["total_steps"], note=note)
        self._now_and_then(f"step {event['step']} of {event['total_steps']} · {note}")

    def _judged(self, event: Json) -> None:
        found: Mapping[str, float] = event["metrics"]
        self._metric = f"fd ratio {found['fd']:.2f}" if "fd" in found else ""
        alone = " · ".join(f"{name} {value:.2f}" for name, value in found.items() if name.startswith("fd@"))
        self._print(f"step {event['step']}: {self._metric} ({alone})")

    def _swap(self, event: Json) -> None:
        tiers = ", ".join(f"{tier} at {steps} steps" for tier, steps in event["tiers"].items())
        self._print(f"{shown(event['student'])} is live: {tiers}")

    def _alarm(self, event: Json) -> None:
        self._print(f"alarm: {event['what']} is {event['value']:.2f}, not within {event['low']} to {event['high']}")

    def _planned(self, event: Json) -> None:
        self._print(f"training should need {_needs(event)}")

    def _measured(self, event: Json) -> None:
        self._print(f"training needed {_needs(event)}")

    def _word(self, event: Json) -> None:
        self._print(event["message"])

    def _now_and_then(self, line: str) -> None:
        if not self._console.is_terminal and self._clock() - self._said_s >= _EVERY_S:
            self._print(line)

    def _print(self, line: str) -> None:
        self._said_s = self._clock()
        self._console.print(line, highlight=False, markup=False)


def _needs(event: Json) -> str:
    return f"{event['train_seconds']:.0f} s and {event['memory_bytes'] / 2**20:.0f} MiB"


def summary(job: Json) -> str:
    """One or several sentences on how a job ended."""
    if job.get("error"):
        return f"{job['id']} {job['status']}: {json.dumps(job['error'])}"
    lines = [f"{job['id']} {job['status']}: {shown(job.get('student') or '')}"]
    for result in (job.get("gates") or {}).get("results", []):
        verdict = "passed" if result["passed"] else "MISSED"
        lines.append(
            f"  {result['steps']} steps  {result['rule']:<16} {result['value']:.3f} (limit {result['limit']}) {verdict}"
        )
    return "\n".join(lines)
