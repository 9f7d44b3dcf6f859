"""Experts: a student of several networks, each of which knows a share of the noise levels.

To whoever trains, samples or judges it, it is one denoiser: rows are asked of the network that their time belongs to,
so an update changes the networks that it asks, and no other. To the engine it is a list of (network, times): the
schedules of its manifest name the network of each step, and every network is a component of its own, with the graph
that all students of this teacher have.

Source: Wan 2.2's pair for high and low noise; Phased DMD arXiv 2510.27684.
Left out: experts of several architectures; LoRA experts beside one backbone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import take
from engines.denoiser import BaseDenoiser, Cond, Denoiser
from engines.manifest import Schedule

FIRST = "denoiser"


def name_of(place: int) -> str:
    """The component of the expert at `place`, counted from the noisiest: denoiser, denoiser_2, …"""
    return FIRST if place == 0 else f"{FIRST}_{place + 1}"


class Experts(BaseDenoiser):
    """Denoisers of one architecture, from the noisiest share on. At each of the falling `levels` (of rectified flow)
    the next one takes over, for that level and those below.

    A row is asked of the expert of its t; s and w are handed on.
    """

    def __init__(self, experts: Sequence[Denoiser], levels: Sequence[float]) -> None:
        super().__init__()
        if len(experts) != len(levels) + 1:
            raise ValueError(f"{len(experts)} experts need {len(experts) - 1} levels between them, not {tuple(levels)}")
        first = experts[0]
        self.process, self.inputs = first.process, first.inputs
        self.levels = tuple(levels)
        self.bounds = times.grid(self.process, self.levels)[:-1]
        self.experts = nn.ModuleDict({name_of(place): expert for place, expert in enumerate(experts)})

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        place = sum((t <= bound for bound in self.bounds), torch.zeros_like(t, dtype=torch.long))
        asked = sorted(set(place.tolist()))
        if len(asked) == 1:
            only: tuple[Tensor, Tensor] = self.experts[name_of(asked[0])](x, t, cond, s, w)
            return only
        x0, eps = torch.empty_like(x), torch.empty_like(x)
        for one in asked:
            rows = (place == one).nonzero().flatten()
            given = (None if value is None else value[rows] for value in (s, w))
            part = self.experts[name_of(one)](x[rows], t[rows], take(cond, rows), *given)
            x0, eps = x0.index_copy(0, rows, part[0]), eps.index_copy(0, rows, part[1])
        return x0, eps

    def nets(self, grid: Sequence[float]) -> tuple[str, ...]:
        """The network of each step of a schedule over these K + 1 times."""
        return tuple(name_of(sum(t <= bound for bound in self.bounds)) for t in grid[:-1])


def networks(student: BaseDenoiser) -> dict[str, Denoiser]:
    """The networks of a student by the names of their components."""
    parts = dict(student.experts.items()) if isinstance(student, Experts) else {FIRST: student}
    return {name: part for name, part in parts.items() if isinstance(part, Denoiser)}


def weights_of(student: BaseDenoiser, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`weights`, such as an average of the student's, by the component that they belong to."""
    if not isinstance(student, Experts):
        return {FIRST: dict(weights)}
    stems = {name: f"experts.{name}." for name in student.experts}
    return {
        name: {key.removeprefix(stem): value for key, value in weights.items() if key.startswith(stem)}
        for name, stem in stems.items()
    }


def routed(student: BaseDenoiser, schedules: Mapping[int, Schedule]) -> dict[int, Schedule]:
    """The schedules, with the network of each step where the student has several."""
    if not isinstance(student, Experts):
        return dict(schedules)
    return {k: one.model_copy(update={"nets": student.nets(one.times)}) for k, one in schedules.items()}
