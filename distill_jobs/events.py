"""What a trainer tells of itself, in the words of the API: one JSON line per event, and the latest progress.

The trainer speaks of stages and roles; people see one step count over the whole job, one loss per role, one
estimate of the time left.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill_jobs.plan import Plan
from distill_jobs.records import EVENTS, PROGRESS, utc_now
from engines import space

logger = logging.getLogger(__name__)


class EventLog:
    """Appends to a job's event file. `keep` are values that every progress event repeats, such as the last metrics."""

    def __init__(self, folder: Path, plan: Plan, *, now: Callable[[], str] = utc_now) -> None:
        self._folder = folder
        self._plan = plan
        self._now = now
        self._stage = 0
        self.keep: dict[str, Any] = {}

    def step(self, iteration: int) -> int:
        """Over the whole job, of an iteration in the stage that last spoke."""
        return self._plan.done_before(self._stage) + iteration

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one event of `distill_jobs.trainer`."""
        kind = str(event["type"])
        self._stage = event.get("stage", self._stage)
        step = self.step(event.get("iteration", 0))
        if kind == "progress":
            self._progress(step, event)
        elif kind == "evaluation":
            self.keep["metrics"] = dict(event["metrics"])
            self.write("metric", step=step, total_steps=self._plan.iterations, metrics=self.keep["metrics"])
        elif kind == "best":
            self.write("checkpoint", step=step, best=True, metrics=dict(event["metrics"]))
        elif kind == "checkpoint":
            self.write("checkpoint", step=step)
        elif kind == "preparing":
            self.write("preparing", **{key: event[key] for key in ("stage", "method", "done", "total")})
        else:
            self.write(kind, **{key: value for key, value in event.items() if key != "type"})

    def write(self, kind: str, **data: Any) -> None:
        line = json.dumps(_finite({"event": kind, "at": self._now(), **data}), separators=(",", ":"))
        space.append(self._folder / EVENTS, line.encode() + b"\n")

    def _progress(self, step: int, event: Mapping[str, Any]) -> None:
        data = {
            "stage": event["stage"],
            "method": event["method"],
            "step": step,
            "total_steps": self._plan.iterations,
            "losses": _by_role(event, "loss."),
            "grad_norm": _by_role(event, "grad_norm."),
            "it_s": event["it_s"],
            "eta_s": self._eta_s(event),
            "skipped": event.get("skipped", 0),
            **self.keep,
        }
        self.write("progress", **data)
        partial = self._folder / f".{PROGRESS}.{os.getpid()}"
        partial.write_text(json.dumps(_finite(data)))
        partial.replace(self._folder / PROGRESS)

    def _eta_s(self, event: Mapping[str, Any]) -> float | None:
        """Of this stage by its speed now, of the later ones by their plan."""
        own = event.get("eta_s")
        if own is None:
            return None
        later = self._plan.stages[event["stage"] + 1 :]
        return float(own) + sum(stage.seconds for stage in later)


def _by_role(event: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """`loss.student.kd` and `loss.student.x` are summed into `student`."""
    found: dict[str, float] = {}
    for key, value in event.items():
        if key.startswith(prefix):
            role = key.removeprefix(prefix).split(".")[0]
            found[role] = found.get(role, 0.0) + float(value)
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
