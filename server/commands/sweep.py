"""`fewstep distill sweep`: many jobs, the hopeless ones stopped, and a leaderboard of the rest."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from engines.errors import AlreadyEnded, FewstepError, InvalidRequest, Unavailable
from server.client import Client
from server.commands.follow import ENDED, JOBS
from server.sweep import Curve, Trial, hopeless, leaderboard, markdown

_PATIENCE = 150  # looks without an answer: five minutes, longer than a gateway needs to start again
ESTIMATE = "/v1/distillation/estimate"
Json = dict[str, Any]


@dataclass(slots=True)
class Running:
    """A trial that was submitted, and what is known of its job."""

    trial: Trial
    job: Json
    curve: Curve = field(default_factory=Curve)
    last_event: int = 0
    stopped: bool = False

    @property
    def ended(self) -> bool:
        return self.job["status"] in ENDED

    @property
    def share(self) -> float:
        total = self.job.get("total_steps")
        return 1.0 if self.ended else (self.job.get("step") or 0) / total if total else 0.0


class Sweep:
    """The trials of one sweep over HTTP. Its jobs go on without it; begun again, it finds them by their keys."""

    def __init__(self, client: Client, trials: Sequence[Trial], *, tag: str = "", grace: float = 0.25) -> None:
        objectives = {str((trial.spec.get("eval") or {}).get("best_by", "fd")) for trial in trials}
        if len(objectives) > 1:
            raise InvalidRequest(f"the jobs are compared by one metric, not by {' and '.join(sorted(objectives))}")
        self._objective = objectives.pop()
        self._client, self._trials, self._tag, self._grace = client, trials, tag, grace
        self.running: list[Running] = []

    def submit(self) -> None:
        """Checks every trial, then submits every one.

        Raises:
            FewstepError: one cannot run, and none was submitted; or the gateway went away while they were, and the
                same command goes on from there.
        """
        for trial in self._trials:
            try:
                self._client.post(ESTIMATE, trial.spec)
            except FewstepError as error:
                raise type(error)(f"{trial.name}: {error.message}", param=error.param) from error
        for trial in self._trials:
            job = self._client.post(JOBS, trial.spec, headers={"idempotency-key": trial.key(self._tag)})
            self.running.append(Running(trial, job))

    def look(self) -> list[str]:
        """Reads what is new and stops what is hopeless; a line for each job that has ended since."""
        said = []
        for one in self.running:
            if one.ended and one.last_event:
                continue
            was_over = one.ended
            one.job = self._client.get(f"{JOBS}/{one.job['id']}")
            self._read(one)
            if not one.ended and not one.stopped and self._is_hopeless(one):
                self._stop(one)
                said.append(f"{one.trial.name}: stopped at {one.curve.shares[-1]:.0%} of its budget, behind the median")
            elif one.ended and not was_over:
                said.append(f"{one.trial.name}: {one.job['status']}")
        return said

    @property
    def done(self) -> bool:
        return all(one.ended for one in self.running)

    def entries(self) -> list[Json]:
        return leaderboard([(one.trial, one.job) for one in self.running])

    def _read(self, one: Running) -> None:
        events = self._client.get(f"{JOBS}/{one.job['id']}/events", after=one.last_event)["data"]
        for event in events:
            one.last_event = event["id"]
            value = event.get("metrics", {}).get(self._objective) if event["event"] == "metric" else None
            if value is not None and event.get("total_steps"):
                one.curve.add(event["step"] / event["total_steps"], value)

    def _stop(self, one: Running) -> None:
        with suppress(AlreadyEnded):  # since it was last looked at
            one.job = self._client.post(f"{JOBS}/{one.job['id']}/cancel")
        one.stopped = True

    def _is_hopeless(self, one: Running) -> bool:
        others = [other.curve for other in self.running if other is not one]
        return hopeless(one.curve, others, lower_is_better=self._objective == "fd", grace=self._grace)


def write(entries: Sequence[Json], folder: Path) -> None:
    """`leaderboard.json` and `leaderboard.md`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"leaderboard.json": json.dumps({"entries": list(entries)}, indent=1), "leaderboard.md": markdown(entries)}
    for name, text in texts.items():
        partial = folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def run(
    sweep: Sweep, folder: Path, console: Console, *, poll_s: float = 2.0, wait: Callable[[float], None] = time.sleep
) -> None:
    """Submits, watches to the end and writes the leaderboard whenever a job has ended.

    Raises:
        Unavailable: the gateway was not there for five minutes at the usual `poll_s`; the jobs go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep.submit()
    missed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("sweep", total=len(sweep.running), note="")
        while True:
            try:
                lines, missed = sweep.look(), 0
            except Unavailable:
                lines, missed = [], missed + 1
                if missed > _PATIENCE:
                    raise
            for line in lines:
                console.print(line, highlight=False, markup=False)
            ended = sum(one.ended for one in sweep.running)
            progress.update(bar, completed=sum(one.share for one in sweep.running), note=f"{ended} ended")
            if lines or sweep.done:
                write(sweep.entries(), folder)
            if sweep.done:
                return
            wait(poll_s)
