"""The leaderboard of distillation methods: `python -m bench.distill`. A ledger, so it goes on where it was stopped.

Every method that trains gets the same number of network evaluations on the embedded teacher; then the best get more,
with several seeds. Entries are files of the working folder, one process each; what is there already is kept. All that
was measured is written to the ledger too, a file of the repository, so that another machine goes on from there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import distill_table, machine
from distill_jobs.methods import _schemas
from distill_jobs.tasks import base
from engines import plugins

_OUT = Path(__file__).parent / "distill.json"
_LEDGER = Path(__file__).parent / "distill_ledger.json"
_BEST = 6


@dataclass(frozen=True, slots=True)
class Wanted:
    """One entry: its file is named by all that decides it."""

    task: str
    preset: str
    seed: int
    evaluations: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.preset}-{self.evaluations}-{self.seed}-{self.n}"

    def file(self, work: Path) -> Path:
        return work / "entries" / f"{self.name}.json"


class Ledger:
    """The entries of one working folder, and those that the ledger's file has from elsewhere."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        path: Path = options.ledger
        self._kept: dict[str, dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else {}
        self.until = time.monotonic() + 60 * options.budget_minutes if options.budget_minutes else None
        (options.work / "entries").mkdir(parents=True, exist_ok=True)

    def made(self, wanted: Sequence[Wanted], title: str) -> list[dict[str, Any]]:
        """The entries, those missing made now as far as the time goes."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns) as progress, ThreadPoolExecutor(self.options.workers) as pool:
            bar = progress.add_task(title, total=len(wanted))
            for _ in pool.map(self._make, wanted):
                progress.advance(bar)
        return [found for one in wanted if (found := self._read(one)) is not None]

    def write(self) -> None:
        """All that was ever made, for the next machine."""
        files = sorted((self.options.work / "entries").glob("*.json"))
        kept = self._kept | {file.stem: json.loads(file.read_bytes()) for file in files}
        self.options.ledger.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")

    def _read(self, one: Wanted) -> dict[str, Any] | None:
        """An entry; one whose process ended without any is a failure now and is tried again by the next run."""
        file = one.file(self.options.work)
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_bytes())
            return found
        if one.name in self._kept:
            return self._kept[one.name]
        log = file.with_suffix(".log")
        return {"preset": one.preset, "seed": one.seed, "failed": f"see {log.name}"} if log.exists() else None

    def _make(self, one: Wanted) -> None:
        file = one.file(self.options.work)
        if file.exists() or one.name in self._kept or (self.until is not None and time.monotonic() > self.until):
            return
        command = [sys.executable, "-m", "bench.distill_entry", "--task", one.task, "--preset", one.preset]
        command += ["--seed", str(one.seed), "--evaluations", str(one.evaluations), "--n", str(one.n)]
        command += ["--work", str(self.options.work), "--out", str(file)]
        with file.with_suffix(".log").open("wb") as log:
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=False)


def trained() -> list[str]:
    """The methods that train a student: those with roles."""
    return [name for name, schema in sorted(_schemas.schemas().items()) if schema["roles"]]


def measured(task: str, ledger: Ledger) -> dict[str, Any] | None:
    """The teacher, the screening and the final of one task; None where its teacher could not be judged."""
    options = ledger.options
    judged = ledger.made([Wanted(task, distill_table.TEACHER, 0, 0, options.n)], f"{task}: teacher")
    if not judged or "failed" in judged[0]:
        why = judged[0]["failed"] if judged else "the time was over before"
        print(f"the teacher of {task} was not judged: {why}", file=sys.stderr)  # noqa: T201 - a program's own message
        return None
    teacher = judged[0]
    wanted = [Wanted(task, name, 0, options.evaluations, options.n) for name in options.presets]
    screened = ledger.made(wanted, f"{task}: screening")
    finals: list[dict[str, Any]] = []
    if options.final:
        best = [row["preset"] for row in distill_table.ranked(screened)][:_BEST]
        asked = [Wanted(task, name, seed, options.final, options.n) for name in best for seed in range(options.seeds)]
        finals = ledger.made(asked, f"{task}: final")
    return {"teacher": teacher, "screening": screened, "final": finals}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank the distillation methods on the embedded teachers.")
    known = plugins.names(base.PACKAGE)
    first = sorted(known, key=lambda name: (name != base.DEFAULT, name))
    parser.add_argument("--tasks", nargs="+", default=first, choices=known, help="all by default")
    parser.add_argument("--presets", nargs="+", default=trained(), help="those to screen; all by default")
    parser.add_argument("--evaluations", type=int, default=100_000, help="network rows of each in the screening")
    parser.add_argument("--final", type=int, default=0, help="network rows of the best in the final; 0 leaves it out")
    parser.add_argument("--seeds", type=int, default=3, help="of the final")
    parser.add_argument("--n", type=int, default=2000, help="pictures of each evaluation")
    parser.add_argument("--workers", type=int, default=1, help="entries at a time, one thread each")
    parser.add_argument("--budget-minutes", type=float, default=None, help="begin no entry after so long")
    parser.add_argument("--work", type=Path, default=Path(".fewstep/bench-distill"), help="continued from if there")
    parser.add_argument("--ledger", type=Path, default=_LEDGER, help="entries that are not made again; written to")
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--publish", action="store_true", help="write the ranks and the page beside the methods too")
    options = parser.parse_args()
    ledger = Ledger(options)
    tasks = {task: found for task in options.tasks if (found := measured(task, ledger)) is not None}
    ledger.write()
    if not tasks:
        sys.exit("no task was measured: see above")
    options.out.write_text(json.dumps(report(tasks), indent=1) + "\n")
    if options.publish:
        distill_table.write(tasks)
    for name, task in tasks.items():
        table = distill_table.table(task["screening"], task["teacher"])
        Console().print(f"{name}\n{table}", soft_wrap=True, markup=False)


def report(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Per task the teacher, one entry for each preset, round and step count, and what failed."""
    found = {
        name: {
            "teacher": task["teacher"],
            "entries": [
                {"round": title} | record
                for title in ("screening", "final")
                for record in distill_table.entries(task[title], task["teacher"])
            ],
            "failed": [one for title in ("screening", "final") for one in task[title] if "failed" in one],
        }
        for name, task in tasks.items()
    }
    return machine.described("bench.distill") | {"tasks": found}


if __name__ == "__main__":
    main()
