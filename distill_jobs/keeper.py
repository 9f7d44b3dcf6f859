"""Keeps a job's trainer alive until its work is done, and gives up with a reason when it gets no further.

Progress is what is on disk: a trainer that died after a new checkpoint has all its tries again.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from distill_jobs.exit_codes import FAILURE, FINISHED, REFUSED
from distill_jobs.metrics import DistillMetrics
from distill_jobs.preparation import SCHEDULE
from distill_jobs.records import PLAN, PROGRESS, JobRecords
from distill_jobs.settings import DistillerSettings
from distill_jobs.trainer_process import Phase, TrainerProcess, command
from distill_jobs.watch import Interrupted
from engines import space
from engines.errors import FewstepError, JobFailed, StorageFull, by_code

log = logging.getLogger(__name__)

_LOOK_S = 0.1
_GRACE_S = 30.0
_TRIES, _LOG = "tries.json", "log.txt"


class Program(Protocol):
    """The command line of a trainer."""

    def __call__(self, folder: Path, phase: Phase, *, fence: int, threads: int, nice: int) -> list[str]: ...


class TrainerKeeper:
    """Of one job under one claim. `check` is called while the trainer runs and may raise to end it."""

    def __init__(
        self,
        job_id: str,
        folder: Path,
        fence: int,
        *,
        records: JobRecords,
        settings: DistillerSettings,
        metrics: DistillMetrics,
        check: Callable[[], None],
        program: Program = command,
    ) -> None:
        self.job_id, self.folder, self.fence = job_id, folder, fence
        self.records, self.settings, self.metrics = records, settings, metrics
        self._check, self._program = check, program

    def run(self, phase: Phase, done: Callable[[], bool]) -> None:
        """Starts the trainer until `done`, again after each death.

        Raises:
            Interrupted, LeaseLost: from the watch; the trainer is gone, checkpointed unless the job is canceled.
            JobFailed: it died too often without getting further.
            StorageFull: it had no room.
            FewstepError: it said itself that it gives up.
        """
        while not done():
            self._count(phase)
            try:
                self._try(phase)
            except StorageFull:
                self._forgive()
                raise

    def _try(self, phase: Phase) -> None:
        code = self._live(phase)
        if code != FINISHED and space.exhausted(self.folder):
            raise space.full(self.folder)  # it may have had no room to say so
        if code == REFUSED:
            raise self._refusal()
        if code != FINISHED:
            self.metrics.deaths.inc()
            log.warning("the trainer died", extra={"job_id": self.job_id, "code": code})
            self.records.event(self.job_id, "note", message=f"the trainer ended with code {code}; one more try")

    def _live(self, phase: Phase) -> int:
        told = self._program(
            self.folder, phase, fence=self.fence, threads=self.settings.threads, nice=self.settings.nice
        )
        process = TrainerProcess(told, self.folder / _LOG)
        self.metrics.watch(self.job_id, process.usage)
        try:
            while (code := process.wait(_LOOK_S)) is None:
                self._check()
                self.metrics.progress(self.job_id, self.records.read(self.job_id, PROGRESS) or {})
            return code
        except Interrupted as interrupted:
            if interrupted.why != "cancel":
                process.checkpoint(_GRACE_S)
                self._forgive()
            raise
        finally:
            process.kill()

    def _count(self, phase: Phase) -> None:
        tries = self.records.read(self.job_id, _TRIES) or {}
        marker = [phase, *sorted(self._milestones())]
        lives = tries.get("lives", 0) + 1 if tries.get("marker") == marker else 1
        if lives > self.settings.max_tries:
            raise JobFailed(
                f"the trainer died {lives - 1} times without getting further (phase {phase}); "
                f"its last words: {self._last_words()}"
            )
        self.records.write(self.job_id, _TRIES, {"marker": marker, "lives": lives})

    def _forgive(self) -> None:
        """An end that was asked for, or that a full disk has brought, is no try."""
        (self.folder / _TRIES).unlink(missing_ok=True)

    def _milestones(self) -> list[str]:
        """What a trainer leaves when it gets further: checkpoints, pairs, schedule and plan."""
        made = [path.relative_to(self.folder) for path in (self.folder / "checkpoints").glob("*/*")]
        whole = [str(name) for name in made if not name.name.startswith(".") and "FENCE" not in name.name]
        return whole + [name for name in (SCHEDULE, PLAN) if (self.folder / name).exists()]

    def _refusal(self) -> FewstepError:
        said = self.records.read(self.job_id, FAILURE) or {"code": "job_failed", "message": self._last_words()}
        return by_code(said["code"])(said["message"])

    def _last_words(self) -> str:
        lines = (self.folder / _LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "(none)"
