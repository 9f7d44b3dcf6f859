"""A student's sampling with its teacher's word on the early estimates: Distillation++ at inference.

Between two steps of the student, the teacher is asked for its own clean estimate of the state that the student has
made, and the student goes on from a point between the two estimates, under the same noise.

Source: "Inference-Time Diffusion Model Distillation", arXiv 2412.08871, which reads it as one step of a proximal
problem with a score distillation loss. Its abstract was read, not its algorithm: what is built is the above,
x_s + alpha_s SHARE (x0 of the teacher at x_s, guided as it is by itself - x0 of the student), after each of the first
half of the steps. Left out: a schedule of shares, and any renoising but what the student's own step does.
"""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from engines.manifest import Step
from engines.solvers import Solver, State

SHARE = 1.0  # of the teacher's estimate in what the student goes on from; docs/decisions.md has what was compared


class Corrected(Solver):
    """`rule` over its own plan, with corrections between: steps of `plan` by the teacher, which move x and not time.

    `rule` must follow from the present estimate alone. History: the student's estimate, where a correction comes next.
    """

    def __init__(self, rule: Solver, plan: Sequence[Step]) -> None:
        super().__init__(rule.process, rule.kind, plan)
        self._rule = rule
        self._own = tuple(accumulate((not step.by_teacher for step in plan), initial=0))

    def target(self, state: State) -> float:
        return 0.0 if self.plan[state.i].by_teacher else super().target(state)

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        i = state.i
        if self.plan[i].by_teacher:
            return state.x + self.alpha[i] * SHARE * (x0 - state.history[0]), ()
        x, _ = self._rule._step(State(state.x, self._own[i]), x0, eps)
        corrected = i + 1 < len(self.plan) and self.plan[i + 1].by_teacher
        return x, (x0,) if corrected else ()
