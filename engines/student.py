"""A student that can make pictures: its manifest, its family of engines and its process.

`sample` runs whole plans, one batch of rows that share a plan; the worker runs the same steps row by row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from engines import refine, solvers
from engines.backends.base import Precision
from engines.corrected import Corrected
from engines.editing import Edit, Looked
from engines.families.base import Family
from engines.manifest import Step, StudentManifest
from engines.noise import noise
from engines.process import Process
from engines.redone import Redone
from engines.refine import Refinement
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
    def latent_shape(self) -> tuple[int, ...]:
        return self.manifest.latent_shape(*self.manifest.resolutions[0])

    def solver(self, steps: int, guidance: float | None = None, aid: "Aid | None" = None) -> Solver:
        """One plan of this student, ready to start, with what a teacher adds to it."""
        own = self.manifest.plan(steps, guidance)
        if aid is None:
            return self._rule(steps, own)
        plan = refine.plan(self.manifest, aid.teacher.manifest, steps, guidance, aid.refinement)
        if aid.refinement.how == "first_step":
            return self._rule(steps, plan)
        if aid.refinement.how == "correction":
            return Corrected(self._rule(steps, own), plan)
        judge = self.manifest.judge
        assert judge is not None, "refine.plan refuses to redo unjudged pictures"
        second = aid.teacher._rule(judge.steps, plan[len(own) :])
        return Redone(self._rule(steps, own), second, plan, judge.threshold(steps, aid.refinement.share))

    def _rule(self, steps: int, plan: Sequence[Step]) -> Solver:
        return solvers.make(self.manifest.solver_for(steps), self.process, self.manifest.prediction, plan)

    def times(self, solver: Solver, state: State) -> NetworkTimes:
        """For the evaluation that `state` stands before; a shifted process tells its network its own time."""
        return _told(self.process, solver.plan[state.i].t, solver.target(state))


@lru_cache(maxsize=4096)
def _told(process: Process, t: float, s: float) -> NetworkTimes:
    pair = torch.tensor([t, s], dtype=torch.float64)
    t_net, s_net = process.network_time(pair).tolist()
    return NetworkTimes(t_net, s_net, process.network_scale(pair[:1]).item())


@dataclass(frozen=True, slots=True)
class Aid:
    """What a teacher adds to the sampling of its student."""

    teacher: LoadedStudent
    refinement: Refinement


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
    aid: Aid | None = None,
    looked: Sequence[Looked] | None = None,
    first: int = 0,
) -> Tensor:
    """Pictures, uint8 [N, 3, H, W], or videos [N, T, 3, H, W]: what the server would answer for these seeds.

    Not `rounded`, they are fp32 in levels 0..255. `aid` is what a teacher adds. Pictures that were `looked` at are
    changed from step `first` on; what is to stay of them is put back in latents only.
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
        aid=aid,
        looked=looked,
        first=first,
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
    aid: Aid | None = None,
    looked: Sequence[Looked] | None = None,
    first: int = 0,
) -> Sampling:
    """As `sample`, for a caller that makes the calls itself."""
    made = Sampling([], [])
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        bad = None if negative is None else list(negative[part])
        solver = student.solver(steps, guidance, aid)
        edits = None
        if looked is not None:
            edits = [Edit.of(*each, first) for each in zip(looked[part], seeds[part], strict=True)]
        run = Run(student, list(prompts[part]), list(seeds[part]), solver, bad, aid, edits)
        num_calls = len(solver.plan) - first
        made.work.extend([run.encode, *[run.step] * num_calls, partial(run.decode, made.pictures, rounded)])
    return made


class Run:
    """Some rows of one plan on their way from prompts to pictures. A row that `settle` ends waits for the others."""

    def __init__(
        self,
        student: LoadedStudent,
        prompts: list[str],
        seeds: list[int],
        solver: Solver,
        negative: list[str] | None = None,
        aid: Aid | None = None,
        edits: list[Edit] | None = None,
    ) -> None:
        self._student, self._solver, self._teacher = student, solver, aid.teacher if aid else student
        self._prompts, self._seeds, self._bad, self._edits = prompts, seeds, negative, edits
        self._left = list(range(len(seeds)))  # rows that are on their way
        self._ended: dict[int, Tensor] = {}
        if edits is None:
            self._state = solver.start(self._draw(0))
        else:
            self._state = State(torch.stack([edit.begin(solver).x for edit in edits]), edits[0].first)

    def encode(self) -> None:
        family = self._student.family
        self._cond = family.encode(self._prompts)
        self._negative = None if self._bad is None else family.encode(self._bad)

    def step(self) -> None:
        if not self._left:
            return
        state, rows = self._state, len(self._left)
        times, step = self._student.times(self._solver, state), self._solver.plan[state.i]
        family = (self._teacher if step.by_teacher else self._student).family
        pred = family.denoise(
            state.x * times.scale,
            torch.full((rows,), times.t),
            self._cond[self._left],
            torch.full((rows,), times.s),
            [step.w] * rows,
            negative=None if self._negative is None else self._negative[self._left],
            net=step.net,
            seen=None if self._edits is None else [self._edits[row].seen for row in self._left],
        )
        fresh = self._fresh(state.i) if self._solver.needs_noise(state) else None
        after = self._solver.advance(state, pred, fresh)
        if self._edits is not None:
            rest = zip(self._left, after.x, strict=True)
            after = replace(after, x=torch.stack([self._edits[k].held(self._solver, x, after.i) for k, x in rest]))
        self._settle(after)

    def latents(self) -> Tensor:
        """[N, C, H, W], of videos [N, C, T, H, W], when all steps are made."""
        return torch.stack([self._ended[row] for row in range(len(self._seeds))])

    def decode(self, pictures: list[Tensor], rounded: bool) -> None:
        family = self._student.family
        pictures.append((family.decode if rounded else family.levels)(self.latents()).cpu())

    def _settle(self, state: State) -> None:
        rows = [
            self._solver.settle(State(state.x[k], state.i, tuple(part[k] for part in state.history)))
            for k in range(len(self._left))
        ]
        self._ended |= {row: one.x for row, one in zip(self._left, rows, strict=True) if self._solver.done(one)}
        going = [one for one in rows if not self._solver.done(one)]
        self._left = [row for row in self._left if row not in self._ended]
        if going:
            parts = zip(*(one.history for one in going), strict=True)
            x = torch.stack([one.x for one in going])
            self._state = State(x, going[0].i, tuple(torch.stack(part) for part in parts))

    def _fresh(self, i: int) -> Tensor:
        if self._edits is None:
            return self._draw(i + 1)
        return torch.stack([self._edits[row].draw(self._seeds[row], i) for row in self._left])

    def _draw(self, k: int) -> Tensor:
        return torch.stack([noise(self._seeds[row], k, self._student.latent_shape) for row in self._left])
