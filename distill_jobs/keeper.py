"""Keeps a job's trainer alive until its work is done, and gives up with a reason when it gets no further.

Progress is what is on disk: a trainer that died after a new checkpoint has all its tries again. Where trainers run is
their launcher's; these rules are the same for all.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from distill_jobs.exit_codes import FAILURE, FINISHED, REFUSED
from distill_jobs.launchers.base import LOG, Hearing, Launcher, Life, Order, Phase
from distill_jobs.metrics import DistillMetrics
from distill_jobs.preparation import SCHEDULE
from distill_jobs.records import PLAN, PROGRESS, JobRecords
from distill_jobs.settings import DistillerSettings
from distill_jobs.watch import Interrupted
from engines import space
from engines.errors import FewstepError, JobFailed, LeaseLost, StorageFull, by_code

log = logging.getLogger(__name__)

_LOOK_S = 0.1
_GRACE_S = 30.0
_SEEN_WITHIN_S = 90.0  # a network file system may show for a minute what was there before
_TRIES = "tries.json"


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
        launcher: Launcher,
        processes: int = 1,
    ) -> None:
        self.job_id, self.folder, self.fence = job_id, folder, fence
        self.records, self.settings, self.metrics = records, settings, metrics
        self._check, self._launcher, self._processes = check, launcher, processes

    def run(self, phase: Phase, done: Callable[[], bool]) -> None:
        """Starts the trainer until `done`, again after each death.

        Raises:
            Interrupted, LeaseLost: from the watch; the trainer is gone, checkpointed unless the job is canceled, or
                goes on for the next distiller where it can.
            JobFailed: it died too often without getting further.
            StorageFull: it had no room.
            FewstepError: it said itself that it gives up, or its place refuses it.
        """
        while not done():
            try:
                self._try(phase, done)
            except StorageFull:
                self._forgive()
                raise

    def _try(self, phase: Phase, done: Callable[[], bool]) -> None:
        code = self._live(self._order(phase))
        if code == FINISHED:
            self._await(done)
            return
        if space.exhausted(self.folder):
            raise space.full(self.folder)  # it may have had no room to say so
        if code == REFUSED:
            raise self._refusal()
        self.metrics.deaths.inc()
        log.warning("the trainer died", extra={"job_id": self.job_id, "code": code})
        self._note(f"the trainer ended with code {code}; one more try")

    def _order(self, phase: Phase) -> Order:
        threads, nice = self.settings.threads, self.settings.nice
        processes = self._processes if phase == "train" else 1  # what is prepared is prepared by one
        return Order(self.job_id, self.folder, phase, self.fence, threads, nice, processes)

    def _live(self, order: Order) -> int:
        life = self._launcher.start(order, Hearing(partial(self._count, order.phase), self._note))
        self.metrics.watch(self.job_id, life.usage)
        try:
            while (code := life.wait(_LOOK_S)) is None:
                self._check()
                self.metrics.progress(self.job_id, self.records.read(self.job_id, PROGRESS) or {})
            return code
        except LeaseLost:
            life.leave(0)
            raise
        except Interrupted as interrupted:
            self._interrupted(life, interrupted)
            raise
        finally:
            life.kill()

    def _interrupted(self, life: Life, interrupted: Interrupted) -> None:
        if interrupted.why == "cancel":
            return
        if interrupted.why == "pause":
            life.checkpoint(_GRACE_S)
        else:
            life.leave(_GRACE_S)
        self._forgive()

    def _await(self, done: Callable[[], bool]) -> None:
        """What the trainer has left may be seen here later than its end."""
        until_s = time.monotonic() + _SEEN_WITHIN_S
        while not done() and time.monotonic() < until_s:
            self._check()
            time.sleep(_LOOK_S)

    def _note(self, message: str) -> None:
        self.records.event(self.job_id, "note", message=message)

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
        lines = (self.folder / LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "(none)"
