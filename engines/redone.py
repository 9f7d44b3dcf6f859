"""A student's picture, and its teacher's second half of one where the teacher doubts it: a cascade for one row.

The student's picture is noised again to the middle of a schedule of the teacher, who is asked there for its clean
estimate: its mean square distance from the picture is the doubt. A picture that is doubted no more than the threshold
is the answer; of any other the teacher takes the steps that are left of its schedule, of which this was the first.

Source: after "Your Student is Better Than Expected: Adaptive Teacher-Student Collaboration for Text-Conditional
Diffusion Models", whose oracle is a reward model. Its text was not read: what is built is the above. Of the signals
that were compared, docs/decisions.md has the figures.
"""

from collections.abc import Sequence

from torch import Tensor

from engines.manifest import Step
from engines.solvers import Solver, State


class Redone(Solver):
    """`first` to the end of its plan, then `second` over the rest of `plan`, unless `settle` ends the row between.

    History: of the solver that is at work; at the fork the picture and its doubt [B] come before it.
    """

    def __init__(self, first: Solver, second: Solver, plan: Sequence[Step], threshold: float) -> None:
        super().__init__(first.process, first.kind, plan)
        self.first, self.second = first, second
        self._fork = len(first.plan)
        self._threshold = threshold

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        i, fork = state.i, self._fork
        if i < fork:
            x, history = self.first._step(state, x0, eps)
            return x, history if i + 1 < fork else (x,)
        kept = state.history if i == fork else ()
        x, history = self.second._step(State(state.x, i - fork, state.history[len(kept) :]), x0, eps)
        return x, (*(part for picture in kept for part in (picture, doubt(picture, x0))), *history)

    def judges(self, state: State) -> bool:
        """Whether the teacher has just been asked for the first time, so that `settle` decides."""
        return state.i == self._fork + 1

    def settle(self, state: State) -> State:
        """The picture as it was, at the end of its plan, where it is not doubted enough."""
        if not self.judges(state):
            return state
        picture, doubted, *history = state.history
        if doubted.item() <= self._threshold:
            return State(picture, len(self.plan))
        return State(state.x, state.i, tuple(history))


def doubt(picture: Tensor, estimate: Tensor) -> Tensor:
    """[B]: how far pictures [B, C, H, W] or videos [B, C, T, H, W] lie from clean estimates of them."""
    return (picture - estimate).square().flatten(1).mean(dim=1)
