"""Solvers: how a plan of K evaluations becomes a picture; state in, state out, so that any plans share a batch.

A solver belongs to one plan; its coefficients are computed once in double precision. `advance` is pure: it changes no
tensor it is given, and what a multistep solver remembers is in the `State`. `sample` is the same rule for training.

Source: DDIM arXiv 2010.02502; DPM-Solver++ 2211.01095; UniPC 2302.04867; CTM gamma 2310.02279 and TCD 2402.19159 (eta);
pi-Flow 2510.14974 (dx).
Checked against: diffusers 0.42 FlowMatchEuler-, DPMSolverMultistep- and UniPCMultistepScheduler (tests).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from engines.denoiser import BaseDenoiser, Cond
from engines.errors import InvalidManifest, UnknownPlugin
from engines.manifest import LINEAR, Kind, Schedule, Step
from engines.policy import Policy
from engines.process import Process


@dataclass(frozen=True, slots=True)
class State:
    """Where one row (or a batch of rows that share the plan) stands before evaluation `i`.

    x is [C, H, W] or [B, C, H, W], fp32; `history` is what the solver keeps of earlier steps, newest first.
    """

    x: Tensor
    i: int
    history: tuple[Tensor, ...] = ()


class Solver(ABC):
    """One plan in one process. The network of step i is asked at `plan[i].t`, with `target(state)` as its s."""

    multistep = False

    def __init__(self, process: Process, kind: Kind, plan: Sequence[Step]) -> None:
        if not plan:
            raise InvalidManifest("a plan needs at least one step")
        if self.multistep and any(step.eta > 0 for step in plan):
            raise InvalidManifest(f"solver {type(self).__name__} follows the ODE: eta must be 0, use ddim to re-noise")
        self.process = process
        self.kind: Kind = kind
        self.plan = tuple(plan)
        self.times = (*(step.t for step in plan), plan[-1].s)
        t = torch.tensor(self.times, dtype=torch.float64)
        self.alpha: list[float] = process.alpha(t).tolist()
        self.sigma: list[float] = process.sigma(t).tolist()
        self.lam = [_log_snr(a, b) for a, b in zip(self.alpha, self.sigma, strict=True)]
        self._prior = _prior(process, self.times[0])

    def start(self, noise: Tensor) -> State:
        """The state of pure noise: unit noise scaled to the process' deviation at the first time."""
        return State(x=noise * self._prior, i=0)

    def begin(self, x0: Tensor, noise: Tensor, i: int) -> State:
        """The state before evaluation `i` of what is noised from clean latents: a picture to be changed."""
        return State(x=self.noised(x0, noise, i), i=i)

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Clean latents as they stand before evaluation `i`; after the last one they are clean."""
        if i >= len(self.plan):
            return x0
        return self.alpha[i] * x0 + self.sigma[i] * noise

    def done(self, state: State) -> bool:
        return state.i >= len(self.plan)

    def target(self, state: State) -> float:
        """The time the network jumps to; below `plan[i].s` when the step re-noises."""
        step = self.plan[state.i]
        return (1 - step.eta) * step.s

    def needs_noise(self, state: State) -> bool:
        """Whether `advance` wants fresh noise now: eta > 0 and the step does not end at clean data."""
        return self.plan[state.i].eta > 0 and self.sigma[state.i + 1] > 0

    def x0(self, state: State, pred: Tensor) -> Tensor:
        """The clean picture that this prediction stands for."""
        return self._split(state, pred)[0]

    def advance(self, state: State, pred: Tensor, noise: Tensor | None = None) -> State:
        """The state after one evaluation.

        Raises:
            ValueError: noise is missing where `needs_noise` says it is wanted.
        """
        return self.move(state, *self._split(state, pred), noise)

    def move(self, state: State, x0: Tensor, eps: Tensor, noise: Tensor | None = None) -> State:
        """`advance` for a prediction that is split already."""
        x, history = self._step(state, x0, eps)
        if self.needs_noise(state):
            if noise is None:
                raise ValueError(f"step {state.i} has eta {self.plan[state.i].eta}: it needs fresh noise")
            x = renoise(self.process, x, noise, self.target(state), self.plan[state.i].s)
        return State(x=x, i=state.i + 1, history=history)

    def settle(self, state: State) -> State:
        """What is left to do of one row after a step: all of the plan, unless a solver lets its state decide."""
        return state

    @abstractmethod
    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(x at `target(state)`, new history)."""

    def _split(self, state: State, pred: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.full((1,), self.plan[state.i].t, dtype=state.x.dtype, device=state.x.device)
        return self.process.split(pred.to(state.x.dtype), self.kind, state.x, t)


class DDIM(Solver):
    """The straight line of (x0, eps): alpha_s x0 + sigma_s eps; with eta, to (1 - eta) s and re-noised to s."""

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        s = torch.full((1,), self.target(state), dtype=x0.dtype, device=x0.device)
        return self.process.mix(x0, eps, s), ()


class DX(DDIM):
    """The way of a policy, in closed form between two evaluations of a network that gives x0 at several points."""

    def _split(self, state: State, pred: Tensor) -> tuple[Tensor, Tensor]:
        ends = (self.plan[state.i].t, self.target(state))
        t, s = (torch.full((1,), time, dtype=state.x.dtype, device=state.x.device) for time in ends)
        return Policy.read(self.process, self.kind, pred, state.x, t, s).line(state.x)


class Euler(Solver):
    """x + (s - t) dx/dt in the process' own time. In RF this is DDIM."""

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        t = self.plan[state.i].t
        return state.x + (self.target(state) - t) * self._velocity(x0, eps, t), ()

    def _velocity(self, x0: Tensor, eps: Tensor, t: float) -> Tensor:
        return self.process.velocity(x0, eps, torch.full((1,), t, dtype=x0.dtype, device=x0.device))


class FlowMatchEuler(Solver):
    """x + (sigma_s - sigma_t)(eps - x0): Euler in the noise level, for (shifted) rectified flows."""

    def __init__(self, process: Process, kind: Kind, plan: Sequence[Step]) -> None:
        super().__init__(process, kind, plan)
        if any(abs(a + b - 1) > 1e-6 for a, b in zip(self.alpha, self.sigma, strict=True)):
            raise InvalidManifest("solver flow_match_euler needs a rectified flow: use euler or ddim")

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        s = torch.tensor([self.target(state)], dtype=torch.float64)
        return state.x + (self.process.sigma(s).item() - self.sigma[state.i]) * (eps - x0), ()


class AdamsBashforth2(Euler):
    """The velocity extrapolated to the middle of the step through the one before it; the first step is Euler."""

    multistep = True

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        step = self.plan[state.i]
        velocity = self._velocity(x0, eps, step.t)
        h, slope = step.s - step.t, velocity
        if state.history:
            ratio = h / (step.t - self.plan[state.i - 1].t) / 2
            slope = (1 + ratio) * velocity - ratio * state.history[0]
        return state.x + h * slope, (velocity,)


class DPMpp2M(Solver):
    """DPM-Solver++(2M), midpoint: second order in log(alpha / sigma); the last step to clean data is first order."""

    multistep = True

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        i, drive = state.i, x0
        if state.history and not math.isinf(self.lam[i + 1]):
            # D0 + D1/2 with D1 = (D0 - D_before) / r0; from pure noise (lambda = -inf) the ratio is 0: first order
            ratio = (self.lam[i + 1] - self.lam[i]) / (self.lam[i] - self.lam[i - 1]) / 2
            drive = (1 + ratio) * x0 - ratio * state.history[0]
        return self._line(state.x, drive, i), (x0,)

    def _line(self, x: Tensor, drive: Tensor, i: int) -> Tensor:
        """(sigma_s / sigma_t) x - alpha_s (e^-h - 1) drive, from time i to i + 1."""
        shrink = self.sigma[i + 1] / self.sigma[i]
        return shrink * x + (self.alpha[i + 1] - self.alpha[i] * shrink) * drive


class UniPC(DPMpp2M):
    """UniPC of order 2, B2(h): each evaluation first corrects the step that led to it. History: x0s, the last x."""

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        i = state.i
        x = self._corrected(state, x0) if state.history else state.x
        drive = x0
        if state.history and not math.isinf(self.lam[i + 1]):
            ratio = (self.lam[i + 1] - self.lam[i]) / (self.lam[i] - self.lam[i - 1]) / 2
            drive = (1 + ratio) * x0 - ratio * state.history[0]
        older = state.history[:1]
        return self._line(x, drive, i), (x0, *older, x)

    def _corrected(self, state: State, x0: Tensor) -> Tensor:
        """The step from i - 1 to i again, now that the prediction at its end is known."""
        i, before, last_x = state.i, state.history[0], state.history[-1]
        drive = before + 0.5 * (x0 - before)
        if len(state.history) > 2:
            h = self.lam[i] - self.lam[i - 1]
            r = (self.lam[i - 2] - self.lam[i - 1]) / h
            b1 = (math.expm1(-h) / -h - 1) / math.expm1(-h)
            b2 = 2 * ((math.expm1(-h) / -h - 1) / -h - 0.5) / math.expm1(-h)
            rho = (b1 - b2) / (1 - r)
            drive = before + (rho / r) * (state.history[1] - before) + (b1 - rho) * (x0 - before)
        return self._line(last_x, drive, i - 1)


class Linear(Solver):
    """The plan's own coefficients: a x + b_0 x0 + b_1 (the x0 before) + …; what a search or a job has learnt.

    Every solver above is one such row per step for fixed times. History: the x0s, as many as a later row asks for.
    """

    multistep = True

    def __init__(self, process: Process, kind: Kind, plan: Sequence[Step]) -> None:
        super().__init__(process, kind, plan)
        if any(step.coefficients is None for step in plan):
            raise InvalidManifest(f"solver {LINEAR} needs a row of coefficients for every step of the plan")

    def _step(self, state: State, x0: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        keep, *shares = self.plan[state.i].coefficients or ()
        seen = (x0, *state.history)
        x = keep * state.x
        # A row may reach less far back than is remembered; or further, where a picture began in the middle of the plan:
        # what came before counts as the first prediction then, so that the shares still sum to the row's own.
        for back, share in enumerate(shares):
            x = x + share * seen[min(back, len(seen) - 1)]
        return x, seen[: max((len(step.coefficients or ()) for step in self.plan[state.i + 1 :]), default=2) - 2]


_SOLVERS: dict[str, type[Solver]] = {
    "ddim": DDIM,
    "dx": DX,
    "euler": Euler,
    "flow_match_euler": FlowMatchEuler,
    "ab2": AdamsBashforth2,
    "dpmpp_2m": DPMpp2M,
    "unipc": UniPC,
    LINEAR: Linear,
}


PlainSolver = Literal["ab2", "ddim", "dpmpp_2m", "euler", "flow_match_euler", "unipc"]
"""Solvers that need nothing but times: no coefficients and no network of several points."""


def names() -> list[str]:
    return sorted(_SOLVERS)


def make(name: str, process: Process, kind: Kind, plan: Sequence[Step]) -> Solver:
    """The solver that a manifest names.

    Raises:
        UnknownPlugin: no such solver.
        InvalidManifest: the solver cannot run this plan or process.
    """
    if name not in _SOLVERS:
        raise UnknownPlugin(f"solver {name!r} is not built: choose from {', '.join(names())}")
    return _SOLVERS[name](process, kind, plan)


def trajectory(
    den: BaseDenoiser, noise: Tensor, times: Sequence[float], cond: Cond = None, *, solver: str = "ddim"
) -> list[Tensor]:
    """x at each of `times` along the solver's deterministic path, without gradients; the last one is its end."""
    return continued(den, _begun(den.process, noise, times[0]), times, cond, solver=solver)


def continued(
    den: BaseDenoiser, x: Tensor, times: Sequence[float], cond: Cond = None, *, solver: str = "ddim"
) -> list[Tensor]:
    """The same from any state x at the first of `times`, whatever noise sampling would start with there."""
    plan = [Step(net="denoiser", t=t, s=s, w=None, eta=0.0) for t, s in pairwise(times)]
    return _walked(den, x, plan, cond, solver)


def followed(den: BaseDenoiser, noise: Tensor, schedule: Schedule, cond: Cond = None) -> Tensor:
    """The end of a deterministic schedule's path, by the solver and the coefficients that it names."""
    plan = schedule.expand(None, None, "denoiser")
    return _walked(den, _begun(den.process, noise, plan[0].t), plan, cond, schedule.solver or "ddim")[-1]


def _begun(process: Process, noise: Tensor, t: float) -> Tensor:
    """Unit noise as large as sampling from time t starts with."""
    return noise * _prior(process, t)


def _prior(process: Process, t: float) -> float:
    return process.prior(torch.tensor([t], dtype=torch.float64)).item()


def _walked(den: BaseDenoiser, x: Tensor, plan: Sequence[Step], cond: Cond, solver: str) -> list[Tensor]:
    rule = make(solver, den.process, "x0", plan)
    state = State(x=x, i=0)
    path = [state.x]
    with torch.no_grad():
        while not rule.done(state):
            state = rule.move(state, *den(state.x, x.new_full((len(x),), plan[state.i].t), cond))
            path.append(state.x)
    return path


Draw = Callable[[int], Tensor]


def sample(
    den: BaseDenoiser,
    noise: Tensor,
    times: Sequence[float],
    cond: Cond = None,
    eta: float | Sequence[float] = 0.0,
    w: Tensor | None = None,
    grad: int | None = None,
    generator: torch.Generator | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """A sample [B, ...] by jumps over `times` (K + 1, falling), equal to solver `ddim` with the same noise. `eta` is of
    all steps, or of each.

    Without `grad` nothing is differentiated and all steps are taken. With `grad` = k, steps 0..k-1 run without
    gradients and the clean prediction of step k is returned with them (backward simulation): the graph holds exactly
    one evaluation. Fresh noise of step i is `draw(i)`, or comes from `generator`.
    """
    draw = draw or (lambda i: torch.randn(noise.shape, dtype=noise.dtype, device=noise.device, generator=generator))
    steps = list(pairwise(times))
    etas = [eta] * len(steps) if isinstance(eta, float | int) else eta
    x = _begun(den.process, noise, times[0])
    with torch.no_grad():
        for i, (t, s) in enumerate(steps[:grad]):
            target = (1 - etas[i]) * s
            x = den.jump(x, noise.new_full((len(x),), t), noise.new_full((len(x),), target), cond, w)
            if etas[i] > 0 and s > 0:
                x = renoise(den.process, x, draw(i), target, s)
    if grad is None:
        return x
    t, end = steps[grad][0], times[-1]
    y: Tensor = den.jump(x, noise.new_full((len(x),), t), noise.new_full((len(x),), end), cond, w)
    return y


def renoise(process: Process, x: Tensor, noise: Tensor, low: float, high: float) -> Tensor:
    """x at time `low` with as much fresh noise as takes it to time `high` > low."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    (alpha_low, alpha_high), (sigma_low, sigma_high) = process.alpha(ends).tolist(), process.sigma(ends).tolist()
    keep: float = alpha_high / alpha_low
    fresh = math.sqrt(max(0.0, sigma_high**2 - (keep * sigma_low) ** 2))
    return keep * x + fresh * noise


def _log_snr(alpha: float, sigma: float) -> float:
    if sigma <= 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > 0 else -math.inf
