"""What a search for a schedule is: a method without roles, whose student has the teacher's own weights.

A search is step 0 of a job: it is given one batch and says, per step count, how the teacher is best sampled. All are
measured alike: how far the few-step endpoints are from those of the teacher's many steps from the same noise.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.losses import over_rows
from distill_jobs.methods.base import Count, Method, MethodConfig
from distill_jobs.roles import Cast
from engines.denoiser import BaseDenoiser
from engines.manifest import LINEAR, Schedule
from engines.process import Process
from engines.solvers import PlainSolver, followed, trajectory

Levels = tuple[float, ...]
BENDS = (0.5, 0.7, 1.5, 2.5)


class SearchConfig(MethodConfig):
    counts: tuple[Count, ...] = Field((1, 2, 4), min_length=1, description="step counts to find schedules for")
    reference_steps: int = Field(48, ge=2, description="teacher steps that count as the truth")
    reference_solver: PlainSolver = "ab2"
    batch: int = Field(32, ge=1, description="prompts searched on")


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule and how far its endpoints are from the teacher's (root mean square), beside uniform DDIM's."""

    schedule: Schedule
    distance: float
    uniform_distance: float


class Search(Method):
    """The parent of all searches: `best` is what a subclass writes."""

    def __init__(self, cast: Cast, config: Any) -> None:
        super().__init__(cast, config)
        self.found: dict[int, Found] = {}

    @property
    def schedules(self) -> dict[int, Schedule]:
        return {k: found.schedule for k, found in self.found.items()}

    def search(self, batch: Batch, proceed: Callable[[], bool] = lambda: True) -> Mapping[int, Found]:
        """The best schedule for each count, on the conditions and the noise of `batch`; uniform DDIM if none is nearer.

        Deterministic. When `proceed` says no, what was found so far stands.
        """
        truth = endpoints(self.cast.teacher, batch, self.config)
        for k in sorted(self.config.counts):
            if not proceed():
                break
            found = _beside_uniform(self.cast.teacher, batch, truth, self.best(batch, truth, k))
            if found.distance > found.uniform_distance:
                flat = plain(self.process, times.uniform(k), "ddim")
                found = Found(flat, found.uniform_distance, found.uniform_distance)
            self.found[k] = found
        return self.found

    @abstractmethod
    def best(self, batch: Batch, truth: Tensor, k: int) -> Schedule:
        """The schedule of k steps whose endpoints come nearest to `truth` [B, ...]."""


def endpoints(teacher: BaseDenoiser, batch: Batch, config: SearchConfig) -> Tensor:
    """[B, ...]: where the teacher's many steps end."""
    grid = times.grid(teacher.process, times.uniform(config.reference_steps))
    return trajectory(teacher, batch.noise, grid, batch.cond, solver=config.reference_solver)[-1]


def measured(teacher: BaseDenoiser, batch: Batch, found: Mapping[int, Found]) -> dict[int, Found]:
    """The same schedules with their distances on another batch."""
    truth = endpoints(teacher, batch, SearchConfig())
    return {k: _beside_uniform(teacher, batch, truth, one.schedule) for k, one in found.items()}


def _beside_uniform(teacher: BaseDenoiser, batch: Batch, truth: Tensor, schedule: Schedule) -> Found:
    flat = plain(teacher.process, times.uniform(schedule.steps), "ddim")
    return Found(schedule, *(distance(teacher, batch, truth, one) for one in (schedule, flat)))


def distance(teacher: BaseDenoiser, batch: Batch, truth: Tensor, schedule: Schedule) -> float:
    """The mean over rows of the root mean square of endpoint - truth; infinite where an endpoint is not finite."""
    end = followed(teacher, batch.noise, schedule, batch.cond)
    found = float(over_rows((end - truth).square()).sqrt().mean())
    return found if found == found else float("inf")


def plain(process: Process, levels: Levels, solver: str) -> Schedule:
    """A solver of `engines.solvers` at these noise levels."""
    return Schedule(times=times.grid(process, levels), solver=solver)


def written_out(grid: tuple[float, ...], rows: list[list[float]]) -> Schedule:
    """A schedule whose steps are these coefficients."""
    return Schedule(times=grid, solver=LINEAR, coefficients=tuple(tuple(row) for row in rows))


def starts(k: int) -> list[Levels]:
    """The uniform grid and its bends."""
    flat = times.uniform(k)
    return [flat] + ([tuple(mu * u / (1 + (mu - 1) * u) for u in flat) for mu in BENDS] if k > 1 else [])
