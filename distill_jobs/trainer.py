"""The trainer: takes a student through a chain of stages, and can be killed at any moment.

It decides when to evaluate, save and stop; the mathematics is the methods', an update is `StageRun`'s. A run resumed
from its checkpoint ends with the weights of an uninterrupted one, bit by bit on the CPU: batches follow from the
iteration, and every schedule reads iterations, never the clock (which decides only when to report and to save).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distill_jobs import checkpoint, times
from distill_jobs.batches import Batch, Source, make_batch
from distill_jobs.checkpoint import Checkpoint
from distill_jobs.group import Group
from distill_jobs.losses import pairwise_distance
from distill_jobs.methods.base import Workspace
from distill_jobs.needs import Needs, forget_peak, peak_bytes
from distill_jobs.progress import WISHES, Hooks, Report, Wish
from distill_jobs.roles import Decode
from distill_jobs.stage import Execution, Precision, Stage, StageRun
from engines.denoiser import BaseDenoiser
from engines.manifest import Schedule
from engines.solvers import trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a run is run; what is learnt is the stages' affair."""

    seed: int = 0
    ema: tuple[float, ...] = (0.98,)
    bf16: bool = False
    device: str = "cpu"
    checkpoint_every_s: float = 30.0
    checkpoint_every: int | None = None
    eval_every: int | None = None  # iterations; None: only at the end of each stage
    best_by: str = "fd"
    best_is_highest: bool = False
    # How much worse the end of a stage may look than an earlier best. On 256 pictures an early student that was 11 %
    # worse on ten thousand looked 3 % better; one that collapsed looks worse by far more than this.
    end_slack: float = 0.1
    report_every_s: float = 1.0
    micro_batch: int | None = None
    checkpointing: bool = False
    panel_rows: int = 16
    max_skips: int = 10
    std_limits: tuple[float, float] = (0.3, 3.0)  # of the student's spread over the teacher's, else an alarm
    diversity_limit: float = 0.2  # least pairwise distance over the teacher's


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, and what it needed in all of its lives. finished: `weights` is the best student, or the last
    average where nothing was evaluated; `iteration` is theirs."""

    state: Literal["finished", "paused", "canceled"]
    stopped_early: bool
    stage: int
    iteration: int
    needs: Needs
    weights: dict[str, Tensor] = field(default_factory=dict)
    schedules: dict[int, Schedule] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run over `stages`. `student` is trained in place; each stage starts from the first average of the one before.

    `folder` None keeps nothing on disk. `fence` is the lease's number: checkpoints of a lower one are refused. Every
    process of a `group` fits the same run; the leader's hooks and clock count, and its result.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        teacher: BaseDenoiser,
        student: BaseDenoiser,
        source: Source,
        config: TrainConfig,
        *,
        folder: Path | None = None,
        fence: int = 0,
        hooks: Hooks | None = None,
        group: Group | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.stages, self.teacher, self.student, self.source = tuple(stages), teacher, student, source
        self.config, self.folder, self.fence, self.hooks = config, folder, fence, hooks or Hooks()
        self.group, self.decode = group or Group(), decode
        self._best: Checkpoint | None = None
        self._stopped_early = False
        self._spent_s = 0.0  # in this stage, over all lives
        self._earlier = Needs(0, 0.0)  # lives
        self._began_s = 0.0
        self._reference: tuple[float, float] | None = None

    def fit(self) -> Result:
        """Trains, from the latest checkpoint if there is one, until done or told otherwise.

        Raises:
            Diverged: gradients stopped being finite.
            LeaseLost: another trainer owns the folder.
        """
        forget_peak()
        self._began_s = self.hooks.clock()
        run = self._resume()
        while True:
            wish = self._run_stage(run)
            if wish in ("pause", "cancel"):
                return self._left(run, "paused" if wish == "pause" else "canceled")
            self._settle(run)
            if wish == "finish" or run.index + 1 == len(self.stages):
                return self._finished(run)
            run = self._begin(run.index + 1)
            self._save(run)

    # the loop --------------------------------------------------------------------------------------------------------

    def _run_stage(self, run: StageRun) -> Wish | None:
        wish = self._prepare(run)
        clock, report = self.hooks.clock, Report(self.hooks, run, self.hooks.clock())
        saved_at = started = clock()
        already = self._spent_s
        while wish is None and not run.done:
            wish = self._wish()
            if wish is not None:
                break
            report.add(run.iterate(self.source))
            self._spent_s = already + clock() - started
            report.maybe(self.config.report_every_s)
            if self.config.eval_every and run.iteration % self.config.eval_every == 0 and not run.done:
                self._judge(run)
            if self.group.agree(self._is_due(run, clock() - saved_at)):
                self._save(run)
                saved_at = clock()
            if not run.done and self.group.agree(self._spent_s > (run.stage.hard_stop_s or math.inf)):
                self._stopped_early = True
                break
        report.maybe(0.0)
        return wish

    def _prepare(self, run: StageRun) -> Wish | None:
        report = self.hooks.event
        space = Workspace(
            folder=prepared_folder(self.folder, run.index) if self.folder else None,
            seed=self.config.seed,
            device=self.config.device,
            group=self.group,
            proceed=lambda: self._wish() is None,
            report=lambda done, total: report(
                {"type": "preparing", "stage": run.index, "done": done, "total": total, "method": run.stage.method}
            ),
        )
        with run.precision.context():
            prepared = run.method.prepare(self.source, space)
        return None if prepared else self._wish()

    def _wish(self) -> Wish | None:
        """What is wished of the leader."""
        return WISHES[self.group.agree(WISHES.index(self.hooks.poll()))]

    def _is_due(self, run: StageRun, since_s: float) -> bool:
        every = self.config.checkpoint_every
        return since_s >= self.config.checkpoint_every_s or bool(every and run.iteration % every == 0)

    # beginnings and ends ---------------------------------------------------------------------------------------------

    def _begin(self, index: int) -> StageRun:
        self._spent_s = 0.0
        self.hooks.event({"type": "stage", "stage": index, "method": self.stages[index].method})
        return StageRun(
            index,
            self.stages[index],
            self.teacher,
            self.student,
            seed=self.config.seed,
            ema=self.config.ema,
            precision=Precision(self.config.bf16, self.config.device),
            max_skips=self.config.max_skips,
            execution=Execution(self.group, self.config.micro_batch, self.config.checkpointing),
            decode=self.decode,
        )

    def _resume(self) -> StageRun:
        if self.folder is None:
            return self._begin(0)
        if self.group.leads:
            checkpoint.claim(self.folder / "latest", self.fence)
        self._best = checkpoint.load_latest(self.folder / "best")
        found = checkpoint.load_latest(self.folder / "latest")
        self._refuse_another(found)
        run = self._begin(found.meta["stage"] if found else 0)
        if found:
            run.restore(found.tensors, found.meta)
            torch.set_rng_state(found.tensors["rng"])
            torch.set_num_threads(found.meta["threads"])
            self._spent_s, self._stopped_early = found.meta["spent_s"], found.meta["stopped_early"]
            if "needs" in found.meta:  # not in checkpoints of the releases before they were counted
                self._earlier = Needs(**found.meta["needs"])
            logger.info("resumed", extra={"stage": run.index, "iteration": run.iteration})
        return run

    def _refuse_another(self, found: checkpoint.Checkpoint | None) -> None:
        """Processes that go on from different points would learn without an error. A network file system may show one
        of them an older folder for some seconds: it ends, and is started again with the others."""
        at = 0 if found is None else 1 + found.meta["iteration"] + (found.meta["stage"] << 40)
        if self.group.agree(at) != at:
            raise RuntimeError("the process of rank 0 goes on from another checkpoint than this one sees")

    def _settle(self, run: StageRun) -> None:
        """The end of a stage: judged, and the student is its first average.

        The end has the learning rate's whole fall behind it. An earlier best on a few hundred pictures is rather luck,
        unless it is better by more than their noise.
        """
        self._judge(run, slack=self.config.end_slack)
        self.student.load_state_dict(self._mean_student(run))

    def _left(self, run: StageRun, state: Literal["paused", "canceled"]) -> Result:
        if state == "paused":
            self._save(run)
        return Result(state, self._stopped_early, run.index, run.iteration, self._needs())

    def _finished(self, run: StageRun) -> Result:
        weights = {name: value.clone() for name, value in self.student.state_dict().items()}
        schedules, metrics, iteration = run.schedules, dict[str, float](), run.iteration
        if self._best:
            weights = {name.removeprefix("student/"): value for name, value in self._best.tensors.items()}
            schedules = {int(k): Schedule(**value) for k, value in self._best.meta["schedules"].items()}
            metrics, iteration = dict(self._best.meta["metrics"]), self._best.meta["iteration"]
        self._save(run)
        return Result(
            "finished",
            self._stopped_early,
            run.index,
            iteration,
            self._needs(),
            weights,
            schedules,
            self.student.inputs,
            metrics,
        )

    # judging ---------------------------------------------------------------------------------------------------------

    def _judge(self, run: StageRun, slack: float = 0.0) -> None:
        """Panels, alarms and, where it is evaluated, the best so far. Leaves the run's randomness alone."""
        with torch.random.fork_rng(devices=[]):
            self._look(run)
            weights = self._mean_student(run)
            if self.hooks.evaluate is None:
                return
            student = run.student_with(weights)
            metrics = dict(self.hooks.evaluate(run.iteration, student, run.schedules))
        self.hooks.event({"type": "evaluation", "stage": run.index, "iteration": run.iteration, "metrics": metrics})
        value = metrics.get(self.config.best_by)
        if value is not None and self._is_better(value, run.index, slack):
            self._keep(run, weights, metrics)

    def _mean_student(self, run: StageRun) -> dict[str, Tensor]:
        """The first average of the student, or itself without one; all of it."""
        weights = run.averages[0].weights if run.averages else run.cast.weights("student")
        return {name: self.group.whole(value) for name, value in weights.items()}

    def _is_better(self, value: float, stage: int, slack: float) -> bool:
        """`slack` is given to a best of the same stage only: a stage has to improve on the one before it."""
        if self._best is None:
            return value == value
        best = self._best.meta["metrics"][self.config.best_by]
        given = slack if self._best.meta["stage"] == stage else 0.0
        return bool(value > best * (1 - given) if self.config.best_is_highest else value < best * (1 + given))

    def _keep(self, run: StageRun, weights: Mapping[str, Tensor], metrics: Mapping[str, float]) -> None:
        schedules = {str(k): schedule.model_dump(mode="json") for k, schedule in run.schedules.items()}
        meta = {"stage": run.index, "iteration": run.iteration, "metrics": dict(metrics), "schedules": schedules}
        self._best = Checkpoint({f"student/{k}": v.clone() for k, v in weights.items()}, meta)
        if self.folder:
            checkpoint.write(self.folder / "best", self._best, fence=self.fence, keep=1)
        self.hooks.event({"type": "best", **meta})

    def _look(self, run: StageRun) -> None:
        batch = self._panel_batch()
        latents = run.method.panel(batch)
        if not latents:
            return
        self.hooks.panel(run.iteration, latents)
        if self._reference is None:
            grid = times.grid(self.teacher.process, times.uniform(8))
            self._reference = _spread(trajectory(self.teacher, batch.noise, grid, batch.cond, solver="ab2")[-1])
        (std, apart), (std_ref, apart_ref) = _spread(latents["gen"]), self._reference
        low, high = self.config.std_limits
        self._alarm(run, "std_ratio", std / std_ref, low, high)
        self._alarm(run, "diversity_ratio", apart / apart_ref, self.config.diversity_limit, float("inf"))

    def _panel_batch(self) -> Batch:
        rows = self.source.rows(0, self.config.panel_rows)
        return make_batch(rows, self.source.shape, self.config.seed, self.config.device)

    def _alarm(self, run: StageRun, what: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            self.hooks.event({"type": "alarm", "what": what, "value": value, "low": low, "iteration": run.iteration})

    def _save(self, run: StageRun) -> None:
        if self.folder is None:
            return
        meta = {
            **run.counters(),
            "method": run.stage.method,
            "threads": torch.get_num_threads(),
            "spent_s": self._spent_s,
            "stopped_early": self._stopped_early,
            "needs": asdict(self._needs()),
        }
        tensors = {**run.tensors(), "rng": torch.get_rng_state()}
        if not self.group.leads:
            return
        checkpoint.write(self.folder / "latest", Checkpoint(tensors, meta), fence=self.fence)
        self.hooks.event({"type": "checkpoint", "stage": run.index, "iteration": run.iteration})

    def _needs(self) -> Needs:
        """Of all lives until now. Every process asks."""
        own = Needs(self.group.total(peak_bytes()), self.hooks.clock() - self._began_s)
        return self._earlier.then(own)


def prepared_folder(folder: Path, stage: int) -> Path:
    """Where a run in `folder` keeps what a stage prepares."""
    return folder / f"prepared-{stage:02d}"


def _spread(latents: Tensor) -> tuple[float, float]:
    """(standard deviation, mean pairwise distance) of samples."""
    return float(latents.float().std()), float(pairwise_distance(latents))
