"""Solvers against diffusers, against closed forms and against each other."""

import math
from itertools import pairwise
from typing import Any, get_args

import diffusers
import pytest
import torch
from torch import Tensor

from engines import solvers
from engines.denoiser import BaseDenoiser, Denoiser
from engines.errors import InvalidManifest, UnknownPlugin
from engines.manifest import Betas, Kind, Schedule, Step
from engines.process import DDPM, EDM, RF, TRIG, VP, Process, Shifted

MEAN, VAR = 1.0, 0.25  # the data of the closed forms


def plan_of(times: list[float], eta: float = 0.0) -> list[Step]:
    return [Step(net="denoiser", t=t, s=s, w=None, eta=eta) for t, s in pairwise(times)]


def net(x: Tensor, t: Tensor, cond: object, s: object, w: object) -> Tensor:
    """Some smooth flow prediction."""
    return torch.tanh(1.3 * x) - 0.4 * x * t.reshape(-1, 1, 1, 1) + 0.2


def _over(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1, 1)


class Truth(BaseDenoiser):
    """The denoiser of Gaussian data; given s, its exact flow map."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Tensor, t: Tensor, cond: object = None, s: Tensor | None = None, w: object = None) -> Any:
        a, b = _over(self.process.alpha(t)), _over(self.process.sigma(t))
        x0 = MEAN + a * VAR / (a * a * VAR + b * b) * (x - a * MEAN)
        return x0, (x - a * x0) / b

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None, w: object = None) -> Tensor:
        (a, b), (c, d) = ((_over(self.process.alpha(u)), _over(self.process.sigma(u))) for u in (t, s))
        return c * MEAN + ((c * c * VAR + d * d) / (a * a * VAR + b * b)).sqrt() * (x - a * MEAN)


class FlowMap(Truth):
    jump = Truth.flow_map


def exact_end(process: Process, noise: Tensor, start: float) -> Tensor:
    """The probability-flow endpoint of that data."""
    t = torch.tensor([start], dtype=torch.float64)
    a, s = process.alpha(t).item(), process.sigma(t).item()
    return MEAN + (VAR / (a * a * VAR + s * s)) ** 0.5 * (s * noise - a * MEAN)


def noise_of(rows: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def run(name: str, times: list[float], x: Tensor, process: Process) -> Tensor:
    rule = solvers.make(name, process, "flow", plan_of(times))
    state = solvers.State(x=x, i=0)
    while not rule.done(state):
        state = rule.advance(state, net(state.x, torch.full((len(x),), rule.plan[state.i].t), None, None, None))
    return state.x


def run_diffusers(scheduler: diffusers.SchedulerMixin, x: Tensor) -> Tensor:
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].expand(len(x))
        x = scheduler.step(net(x, sigma, None, None, None), t, x, return_dict=False)[0]
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("name", "scheduler"), [("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
)
def test_multistep_solvers_equal_diffusers_on_flow_sigmas(name: str, scheduler: str, steps: int, shift: float) -> None:
    theirs = getattr(diffusers, scheduler)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    theirs.set_timesteps(steps)
    ours = run(name, theirs.sigmas.tolist(), noise_of(), RF())
    torch.testing.assert_close(ours, run_diffusers(theirs, noise_of()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flow_match_euler", "euler", "ddim"])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_first_order_solvers_equal_diffusers_flow_match_euler(name: str, steps: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    ours = run(name, theirs.sigmas.tolist(), noise_of(), RF())
    torch.testing.assert_close(ours, run_diffusers(theirs, noise_of()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize(("said", "kind"), [("epsilon", "edm"), ("v_prediction", "v")])
@pytest.mark.parametrize(
    ("name", "scheduler"), [("ddim", "EDMEulerScheduler"), ("dpmpp_2m", "EDMDPMSolverMultistepScheduler")]
)
def test_preconditioned_networks_are_asked_and_sampled_as_diffusers_does(
    name: str, scheduler: str, said: str, kind: Kind, steps: int
) -> None:
    theirs = getattr(diffusers, scheduler)(prediction_type=said, sigma_data=0.7, sigma_max=20.0)
    theirs.set_timesteps(steps)
    x, noise = noise_of() * theirs.init_noise_sigma, noise_of()
    for t in theirs.timesteps:
        x = theirs.step(net(theirs.scale_model_input(x, t), t / 1000, None, None, None), t, x, return_dict=False)[0]
    den = Denoiser(net, EDM(sigma_data=0.7, sigma_max=20.0), kind)
    ours = solvers.trajectory(den, noise, theirs.sigmas.tolist(), solver=name)[-1]
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=1e-5)


def test_ddim_equals_diffusers_lcm_with_the_same_noise_at_eta_one() -> None:
    times, noise = [0.9, 0.5, 0.2, 0.0], noise_of()
    rule = solvers.make("ddim", RF(), "flow", plan_of(times, eta=1.0))
    state = solvers.State(x=noise, i=0)
    fresh = [noise_of(4) + k for k in (1, 2)]
    for k, t in enumerate(times[:-1]):
        pred = net(state.x, torch.full((4,), t), None, None, None)
        x0 = state.x - t * pred
        expected = x0 if k == 2 else (1 - times[k + 1]) * x0 + times[k + 1] * fresh[k]
        state = rule.advance(state, pred, fresh[k] if rule.needs_noise(state) else None)
        torch.testing.assert_close(state.x, expected)


@pytest.mark.parametrize(
    "process", [RF(), VP(), VP(curve="linear"), EDM(), TRIG(), Shifted(RF(), 3.0)], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("ab2", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_the_error_falls_with_the_order_of_the_solver(name: str, order: int, process: Process) -> None:
    start = 0.9 * min(process.t_max, 3.0)
    noise = noise_of(dtype=torch.float64)

    def error(steps: int) -> float:
        times = torch.linspace(start, 0.05, steps + 1, dtype=torch.float64).tolist()
        end = solvers.trajectory(Truth(process), noise, times, solver=name)[-1]
        t = torch.tensor([start, 0.05], dtype=torch.float64)
        (a0, a1), (s0, s1) = process.alpha(t).tolist(), process.sigma(t).tolist()
        begun = process.prior(t[:1]) * noise
        growth = ((a1 * a1 * VAR + s1 * s1) / (a0 * a0 * VAR + s0 * s0)) ** 0.5
        return float((end - (a1 * MEAN + growth * (begun - a0 * MEAN))).abs().max())

    assert error(160) < 0.65**order * error(80)
    assert error(160) < 0.1


@pytest.mark.parametrize("process", [RF(), RF(ticks=1000), DDPM(Betas()), EDM()], ids=["rf", "ticks", "ddpm", "edm"])
def test_a_path_goes_on_from_any_of_its_states(process: Process) -> None:
    """Also where sampling starts with other noise than the process has at that time."""
    times = [f * process.t_max for f in (1.0, 0.6, 0.3, 0.1, 0.0)]
    path = solvers.trajectory(Truth(process), noise_of(), times)
    for again, before in zip(solvers.continued(Truth(process), path[2], times[2:]), path[2:], strict=True):
        torch.testing.assert_close(again, before)


@pytest.mark.parametrize("name", ["ddim", "euler", "flow_match_euler", "ab2", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_every_solver_starts_at_pure_noise_and_ends_at_clean_data(name: str, steps: int) -> None:
    times = torch.linspace(1, 0, steps + 1).tolist()
    end = solvers.trajectory(Truth(RF()), noise_of(), times, solver=name)[-1]
    assert end.isfinite().all()
    if steps == 16:
        torch.testing.assert_close(end, exact_end(RF(), noise_of(), 1.0), atol=0.3, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("process", [RF(), VP(), EDM(), TRIG()], ids=["rf", "vp", "edm", "trig"])
def test_the_training_sampler_equals_the_serving_solver(eta: float, process: Process) -> None:
    times = [f * min(1.0, process.t_max) for f in (0.95, 0.6, 0.3, 0.0)]
    noise, fresh = noise_of(), [noise_of() + k for k in range(3)]
    den = Denoiser(net, process, "v")
    rule = solvers.make("ddim", process, "v", plan_of(times, eta))
    state = rule.start(noise)
    while not rule.done(state):
        t = torch.full((4,), times[state.i])
        pred = net(_over(process.network_scale(t)) * state.x, process.network_time(t), None, None, None)
        state = rule.advance(state, pred, fresh[state.i] if rule.needs_noise(state) else None)
    trained = solvers.sample(den, noise, times, eta=eta, draw=lambda i: fresh[i])
    torch.testing.assert_close(trained, state.x)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("process", [RF(), VP(), EDM(), TRIG(0.7)], ids=["rf", "vp", "edm", "trig"])
def test_renoising_an_exact_flow_map_keeps_the_marginals(process: Process, eta: float) -> None:
    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    times = [f * process.t_max for f in (1.0, 0.5, 0.2, 0.0)]
    x = solvers.sample(FlowMap(process), noise, times, eta=eta, generator=torch.Generator().manual_seed(2))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(VAR**0.5, abs=0.01)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_gradients_flow_through_exactly_one_evaluation(k: int) -> None:
    calls: list[bool] = []
    scale = torch.tensor(0.7, requires_grad=True)

    def counted(x: Tensor, *_: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x * scale

    x = solvers.sample(Denoiser(counted, RF(), "flow"), noise_of(), [1.0, 0.6, 0.3, 0.0], eta=1.0, grad=k)
    x.sum().backward()
    assert calls == [False] * k + [True]
    assert scale.grad is not None


def test_a_batch_and_its_rows_agree_and_no_input_is_changed() -> None:
    noise = noise_of(3)
    kept = noise.clone()
    rule = solvers.make("unipc", RF(), "flow", plan_of([1.0, 0.7, 0.4, 0.2, 0.0]))

    def go(x: Tensor) -> Tensor:
        state = rule.start(x)
        while not rule.done(state):
            t = torch.full((1,), rule.plan[state.i].t)
            state = rule.advance(state, net(state.x.reshape(-1, 2, 4, 4), t, None, None, None).reshape(state.x.shape))
        return state.x

    assert torch.equal(go(noise)[1], go(noise[1]))
    assert torch.equal(noise, kept)


def test_a_half_precision_prediction_leaves_the_state_in_full_precision() -> None:
    rule = solvers.make("ddim", RF(), "flow", plan_of([1.0, 0.0]))
    state = rule.advance(rule.start(noise_of()), noise_of().bfloat16())
    assert state.x.dtype == torch.float32


def test_the_partial_picture_is_the_clean_prediction() -> None:
    rule = solvers.make("dpmpp_2m", RF(), "flow", plan_of([1.0, 0.5, 0.0]))
    state = rule.start(noise_of())
    torch.testing.assert_close(rule.x0(state, torch.ones(4, 2, 4, 4)), noise_of() - 1)


def test_missing_noise_is_said() -> None:
    rule = solvers.make("ddim", RF(), "flow", plan_of([1.0, 0.5, 0.0], eta=1.0))
    with pytest.raises(ValueError, match="fresh noise"):
        rule.advance(rule.start(noise_of()), noise_of())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_linear_solver_is_any_other_one_written_out(steps: int) -> None:
    """DDIM's rows, and those of DPM-Solver++(2M), which ask for the prediction before."""
    times, noise = torch.linspace(1, 0, steps + 1).tolist(), noise_of(dtype=torch.float64)
    ddim = [(s / t, (1 - s) - (1 - t) * s / t) for t, s in pairwise(times)]
    found = {
        "ddim": ddim,
        "dpmpp_2m": [row if i in (0, steps - 1) else _second_order(times, i, row) for i, row in enumerate(ddim)],
    }
    for name, rows in found.items():
        schedule = Schedule(times=tuple(times), solver="linear", coefficients=tuple(rows))
        ours = solvers.followed(Truth(RF()), noise, schedule)
        torch.testing.assert_close(ours, solvers.trajectory(Truth(RF()), noise, times, solver=name)[-1])


def test_a_linear_row_that_reaches_before_the_start_counts_the_first_prediction_for_what_was_before() -> None:
    """A picture that is changed begins in the middle of a plan; rows must still sum to what they were made for."""
    rows = ((0.5, 0.5), (0.4, 0.9, -0.3), (0.3, 0.9, -0.4, 0.2), (0.0, 1.0, 0.0))
    schedule = Schedule(times=(1.0, 0.75, 0.5, 0.25, 0.0), solver="linear", coefficients=rows)
    rule = solvers.make("linear", RF(), "x0", schedule.expand(None, None, "denoiser"))
    clean, other = noise_of(), torch.ones(4, 2, 4, 4)
    begun = rule.begin(clean, noise_of(), 2)
    after = rule.advance(begun, other)
    torch.testing.assert_close(after.x, 0.3 * begun.x + (0.9 - 0.4 + 0.2) * other)
    torch.testing.assert_close(rule.advance(after, clean).x, clean)


def test_a_picture_is_noised_to_the_time_of_its_step_and_is_itself_after_the_last() -> None:
    rule = solvers.make("ddim", VP(), "eps", plan_of([0.9, 0.5, 0.1]))
    clean, eps = torch.full((1, 2, 2), 3.0), torch.ones(1, 2, 2)
    t = torch.tensor([0.5])
    torch.testing.assert_close(rule.begin(clean, eps, 1).x, VP().alpha(t) * clean + VP().sigma(t) * eps)
    assert rule.begin(clean, eps, 1).i == 1
    assert torch.equal(rule.noised(clean, eps, 2), clean)


def _second_order(times: list[float], i: int, row: tuple[float, ...]) -> tuple[float, ...]:
    before, now, after = (math.log((1 - t) / t) if t < 1 else -math.inf for t in times[i - 1 : i + 2])
    ratio = (after - now) / (now - before) / 2
    return row[0], row[1] * (1 + ratio), -row[1] * ratio


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coefficients": None}, "go together"),
        ({"solver": "ddim"}, "go together"),
        ({"solver": None}, "go together"),
        ({"coefficients": ((0.5, 0.5),)}, "1 rows for 2 steps"),
        ({"coefficients": ((0.5, 0.5, 0.1), (0.0, 1.0))}, r"coefficients\[0\] has 3 entries: step 0 takes 2 to 2"),
        ({"coefficients": ((0.5, 0.5), (1.0,))}, r"coefficients\[1\] has 1 entries"),
        ({"coefficients": ((0.5, math.inf), (0.0, 1.0))}, "finite number"),
    ],
)
def test_a_schedule_whose_coefficients_do_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    right = {"times": (1.0, 0.5, 0.0), "solver": "linear", "coefficients": ((0.5, 0.5), (0.0, 1.0, 0.0))}
    assert Schedule.model_validate_json(Schedule(**right).model_dump_json()) == Schedule(**right)
    with pytest.raises(ValueError, match=words):
        Schedule(**{**right, **changes})


def test_a_schedule_without_coefficients_is_written_as_before_there_were_any() -> None:
    """So that manifests which were published keep their digests."""
    assert Schedule(times=(1.0, 0.0)).model_dump(mode="json").keys() == {"times", "eta", "solver", "nets"}


def test_refusals_name_the_solver() -> None:
    with pytest.raises(UnknownPlugin, match="'heun' is not built: choose from ab2, ddim"):
        solvers.make("heun", RF(), "flow", plan_of([1.0, 0.0]))
    with pytest.raises(InvalidManifest, match="eta must be 0"):
        solvers.make("ab2", RF(), "flow", plan_of([1.0, 0.0], eta=0.5))
    with pytest.raises(InvalidManifest, match="rectified flow"):
        solvers.make("flow_match_euler", VP(), "v", plan_of([0.9, 0.4]))


def test_a_plain_solver_is_one_that_needs_nothing_but_times() -> None:
    assert set(get_args(solvers.PlainSolver)) == set(solvers.names()) - {"dx", "linear"}
