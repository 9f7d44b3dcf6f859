"""What a distillation method is: the losses of its roles and the schedules of its student; never an optimiser.

One file per mechanism; its `PRESETS` name the methods people know. `resolve(name)` finds one. What may be said in
a job stands, torch-free, in `schemas.json` (`python -m distill_jobs.methods` writes it).
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch, Rows, Source
from distill_jobs.group import Group
from distill_jobs.methods._schemas import grids_fault
from distill_jobs.roles import Cast, Role
from engines import plugins
from engines.denoiser import BaseDenoiser
from engines.errors import InvalidRequest, UnknownPlugin
from engines.manifest import Schedule
from engines.solvers import sample

Needs = Literal["prompts", "data", "pairs"]


Count = Annotated[int, Field(ge=1)]


class MethodConfig(BaseModel):
    """What a job may say about a method. Times are noise levels of rectified flow, 1 = noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FewStepConfig(MethodConfig):
    """The settings of every method that trains a student for fixed step counts."""

    counts: tuple[Count, ...] = Field((1, 2, 4), min_length=1, description="step counts the student is made for")
    grids: dict[int, tuple[float, ...]] = Field(
        default_factory=dict, description="noise levels per count, from 1; counts without one get the method's own"
    )
    eta: float = Field(1.0, ge=0, le=1, description="1 predicts x0 and re-noises, 0 follows the flow map")
    batch: int = Field(32, ge=1, description="rows of one update")
    lr: float = Field(3e-4, gt=0, description="the student's learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    train: Literal["full", "lora"] = "full"

    @model_validator(mode="after")
    def _grids_fit(self) -> Self:
        if fault := grids_fault(self.grids, self.counts):
            raise ValueError(fault)
        return self

    def levels(self, count: int, own: Mapping[int, tuple[float, ...]]) -> tuple[float, ...]:
        return self.grids.get(count) or own.get(count) or times.uniform(count)

    def student_role(self, start: int = 0) -> Role:
        betas = (self.beta1, self.beta2)
        return Role(init="student", train=self.train, lr=self.lr, betas=betas, clip=self.clip, start=start)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where and under whose eyes `prepare` works.

    `folder` None keeps nothing; `proceed` is asked between pieces of work, by every process of `group` equally often,
    and False means stop now and return (what is on disk is found again); `report` takes (done, total).
    """

    folder: Path | None = None
    seed: int = 0
    device: str = "cpu"
    group: Group = field(default_factory=Group)
    proceed: Callable[[], bool] = field(default=lambda: True)
    report: Callable[[int, int], None] = field(default=lambda done, total: None)


class Method(ABC):
    """The mathematics of one distillation over a `Cast`. Life: `prepare`, then per update `rows`, `loss`, `after`."""

    Config: ClassVar[type[MethodConfig]]
    needs: ClassVar[frozenset[Needs]] = frozenset({"prompts"})
    inputs: ClassVar[frozenset[str]] = frozenset()  # of s and w: what its student's network must read
    asks_teacher: ClassVar[bool] = True  # otherwise it learns from latents alone, and of no guidance
    several_counts_read_s: ClassVar[bool] = False  # whether a student of several counts must read s
    for_several_steps: ClassVar[frozenset[str]] = frozenset()  # settings that, if not 0, need a count above 1

    def __init__(self, cast: Cast, config: Any) -> None:
        self.cast = cast
        self.config = config
        self.process = cast.teacher.process
        self.curriculum: dict[str, float] = {}

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        """Who is trained, in the order of their updates. The fake comes before the student."""
        return {}

    @classmethod
    def make(cls, name: str, denoiser: BaseDenoiser, config: Any) -> nn.Module:
        """The network of a role whose init is `new`; `denoiser` is the teacher without its guidance."""
        raise NotImplementedError(f"{cls.__name__} makes no network for {name}")

    @property
    @abstractmethod
    def schedules(self) -> dict[int, Schedule]:
        """How the student is to be sampled, per step count: what goes into its manifest."""

    def prepare(self, source: Source, space: Workspace) -> bool:
        """Work before the first update, resumable. False: it was told to stop before it was done."""
        return True

    def rows(self, source: Source, position: int) -> Rows:
        return source.rows(position, self.config.batch)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms; their sum is differentiated. Called within `cast.only(role)`."""
        raise NotImplementedError(f"{type(self).__name__} trains no weights")

    def rung(self, batch: Batch) -> tuple[Schedule, int]:
        """One of the student's counts, and a rung of its schedule. All rows take the same."""
        schedules = [schedule for _, schedule in sorted(self.schedules.items())]
        schedule = schedules[batch.pick(len(schedules))]
        return schedule, batch.pick(schedule.steps)

    def generate(self, batch: Batch) -> Tensor:
        """Backward simulation [B, ...]: the student's sampling down to a `rung`, and the clean prediction made there,
        the only evaluation that is differentiated."""
        schedule, rung = self.rung(batch)
        path, eta = schedule.times, schedule.eta
        return sample(self.cast.student, batch.noise, path, batch.cond, eta, grad=rung, draw=lambda _: batch.randn())

    def after(self, iteration: int) -> None:  # noqa: B027 (most methods have no phases)
        """Called after each iteration: phase changes, which stand in `curriculum` so that checkpoints hold them."""

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        """Latents [B, C, H, W] to look at: `gen` and, where there is a critic, what `real` and `fake` make of it."""
        return {}


class FewStepMethod(Method):
    """A method that trains a student for the counts of its `FewStepConfig`, on the grids it is sampled on later.

    As it stands the student is the only role.
    """

    own_grids: ClassVar[Mapping[int, tuple[float, ...]]] = {}  # of counts for which the job gives none

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {"student": config.student_role()}

    @property
    def schedules(self) -> dict[int, Schedule]:
        return self.scheduled(self.own_grids)

    def scheduled(self, own: Mapping[int, tuple[float, ...]]) -> dict[int, Schedule]:
        """The schedules of the job's counts, on its grids before those of `own`."""
        c = self.config
        grids = {k: times.grid(self.process, c.levels(k, own)) for k in sorted(c.counts)}
        return {k: Schedule(times=grid, eta=c.eta, solver="ddim") for k, grid in grids.items()}

    @torch.no_grad()
    def panel(self, batch: Batch) -> dict[str, Tensor]:
        """What the student makes in its least count of steps."""
        schedule = self.schedules[min(self.schedules)]
        path, eta = schedule.times, schedule.eta
        y = sample(self.cast.student, batch.noise, path, batch.cond, eta, draw=lambda _: batch.randn())
        return {"gen": y}


@dataclass(frozen=True, slots=True)
class Preset:
    """A method people know by name: a class and the settings that make it this one."""

    method: type[Method]
    description: str
    paper: str = ""  # arXiv number, or where else it is written
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def config(self, settings: Mapping[str, Any]) -> MethodConfig:
        """The preset's configuration with a job's settings on top.

        Raises:
            InvalidRequest: a setting is unknown or out of range; the message names it.
        """
        try:
            return self.method.Config(**{**self.defaults, **settings})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "config"
            raise InvalidRequest(f"method setting {where}: {first['msg']}", param=f"method.{where}") from error


_PACKAGE = "distill_jobs.methods"


def apart(names: Sequence[str]) -> list[str]:
    """The names, each further one of the same with its number: a, b, a.2."""
    return [name if (n := names[: i + 1].count(name)) == 1 else f"{name}.{n}" for i, name in enumerate(names)]


def presets() -> dict[str, Preset]:
    """Every named method of every file. Imports them all."""
    files = (importlib.import_module(f"{_PACKAGE}.{name}") for name in plugins.names(_PACKAGE))
    return {name: preset for file in files for name, preset in file.PRESETS.items()}


def resolve(name: str) -> Preset:
    """The named method.

    Raises:
        UnknownPlugin: no file has such a preset; the message lists those there are.
    """
    known = presets()
    if name not in known:
        raise UnknownPlugin(f"method {name!r} does not exist: choose from {', '.join(sorted(known))}", param="method")
    return known[name]
