"""A student that can make pictures: its manifest, its family of engines and its process.

`sample` runs whole plans, one batch of rows that share a plan; the worker runs the same steps row by row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engines import refine, solvers
from engines.backends.base import Precision
from engines.families.base import Family
from engines.manifest import StudentManifest
from engines.noise import noise
from engines.process import Process
from engines.solvers import Solver, State


@dataclass(frozen=True, slots=True)
class NetworkTimes:
    """What the network is told: t now, and s, where its prediction leads. It is given x times `scale`."""

    t: float
    s: float
    scale: float


@dataclass(frozen=True, slots=True)
class LoadedStudent:
    manifest: StudentManifest
    family: Family
    process: Process
    backend: str
    precision: Precision

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.manifest.latent_shape(*self.manifest.resolutions[0])

    def solver(self, steps: int, guidance: float | None = None, teacher: "LoadedStudent | None" = None) -> Solver:
        """One plan of this student, ready to start; with `teacher` the first step is that one's."""
        if teacher is None:
            plan = self.manifest.plan(steps, guidance)
        else:
            plan = refine.first_step(self.manifest, teacher.manifest, steps, guidance)
        return solvers.make(self.manifest.solver_for(steps), self.process, self.manifest.prediction, plan)

    def times(self, solver: Solver, state: State) -> NetworkTimes:
        """For the evaluation that `state` stands before; a shifted process tells its network its own time."""
        pair = torch.tensor([solver.plan[state.i].t, solver.target(state)], dtype=torch.float64)
        t, s = self.process.network_time(pair).tolist()
        return NetworkTimes(t, s, self.process.network_scale(pair[:1]).item())


def sample(
    student: LoadedStudent,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    *,
    guidance: float | None = None,
    negative: Sequence[str] | None = None,
    batch: int = 8,
    rounded: bool = True,
    teacher: LoadedStudent | None = None,
) -> Tensor:
    """Pictures, uint8 [N, 3, H, W]: what the server would answer for these seeds, one after the other.

    Not `rounded`, they are fp32 in levels 0..255. A `teacher` takes the first step.
    """
    calls = sampling(
        student,
        prompts,
        seeds,
        steps,
        guidance=guidance,
        negative=negative,
        batch=batch,
        rounded=rounded,
        teacher=teacher,
    )
    for call in calls.work:
        call()
    return torch.cat(calls.pictures)


@dataclass(frozen=True, slots=True)
class Sampling:
    """A sampling in small pieces: `pictures` is filled as the calls in `work` are made in order.

    No call evaluates a stage more than once, so that other work of the engine's thread fits in between.
    """

    work: list[Callable[[], None]]
    pictures: list[Tensor]


def sampling(
    student: LoadedStudent,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    *,
    guidance: float | None = None,
    negative: Sequence[str] | None = None,
    batch: int = 8,
    rounded: bool = True,
    teacher: LoadedStudent | None = None,
) -> Sampling:
    """As `sample`, for a caller that makes the calls itself."""
    made = Sampling([], [])
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        bad = None if negative is None else list(negative[part])
        solver = student.solver(steps, guidance, teacher)
        run = _Run(student, list(prompts[part]), list(seeds[part]), solver, bad, teacher)
        made.work.extend([run.encode, *[run.step] * steps, partial(run.decode, made.pictures, rounded)])
    return made


class _Run:
    """Some rows of one plan on their way from prompts to pictures."""

    def __init__(
        self,
        student: LoadedStudent,
        prompts: list[str],
        seeds: list[int],
        solver: Solver,
        negative: list[str] | None,
        teacher: LoadedStudent | None,
    ) -> None:
        self._student, self._solver, self._first = student, solver, teacher or student
        self._prompts, self._seeds, self._bad = prompts, seeds, negative
        self._state = solver.start(self._draw(0))

    def encode(self) -> None:
        family = self._student.family
        self._cond = family.encode(self._prompts)
        self._negative = None if self._bad is None else family.encode(self._bad)

    def step(self) -> None:
        state, rows = self._state, len(self._seeds)
        times, step = self._student.times(self._solver, state), self._solver.plan[state.i]
        family = (self._student if state.i else self._first).family
        pred = family.denoise(
            state.x * times.scale,
            torch.full((rows,), times.t),
            self._cond,
            torch.full((rows,), times.s),
            [step.w] * rows,
            negative=self._negative,
            net=step.net,
        )
        fresh = self._draw(state.i + 1) if self._solver.needs_noise(state) else None
        self._state = self._solver.advance(state, pred, fresh)

    def decode(self, pictures: list[Tensor], rounded: bool) -> None:
        family = self._student.family
        pictures.append((family.decode if rounded else family.levels)(self._state.x).cpu())

    def _draw(self, k: int) -> Tensor:
        return torch.stack([noise(seed, k, self._student.latent_shape) for seed in self._seeds])
