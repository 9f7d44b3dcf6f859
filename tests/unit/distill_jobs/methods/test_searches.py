"""Searches for schedules on Gaussian data, whose best times and coefficients are known: what each must find."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.methods._search import Search, distance, endpoints, plain
from distill_jobs.methods._unrolled import grid, leaf, solver_rows, unrolled
from distill_jobs.methods.base import presets, resolve
from distill_jobs.methods.learned_solvers import AMED, GAS, LD3, Fitted
from distill_jobs.methods.optimal_steps import GITS, cheapest
from distill_jobs.roles import Cast
from engines.manifest import Kind
from engines.process import RF, Process
from engines.solvers import followed, trajectory
from tests.unit.distill_jobs.closed_form import (
    GUIDED_MEAN,
    PROCESSES,
    STD,
    batch_of,
    exact_pairs,
    student_of,
    teacher_of,
)

SEARCHES = sorted(name for name, preset in presets().items() if issubclass(preset.method, Search))
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)

# How much nearer than uniform DDIM each must come at 2 and 3 steps, in every process.
SHARES = {
    "optimal_steps": 0.9,
    "gits": 1.0,
    "optimal_step_size": 0.85,
    "d_ode": 0.15,
    "fitted_solver": 0.1,
    "ld3": 0.9,
    "amed": 0.1,
    "gas": 0.3,
}


def searched(
    name: str, process: Process, kind: Kind = "flow", method: type[Search] | None = None, **settings: Any
) -> Search:
    preset = resolve(name)
    cheap = {"counts": (2, 3), "fine": 8, "rounds": 2, "refine": 1, "reference_steps": 24, "iterations": 25}
    told = {key: value for key, value in {**cheap, **settings}.items() if key in preset.method.Config.model_fields}
    one = (method or preset.method)(Cast(teacher_of(process, kind)), preset.config(told))
    assert isinstance(one, Search)
    one.search(batch_of(8))
    return one


def test_gits_makes_every_step_that_it_is_asked_for_however_coarse_its_path() -> None:
    assert {k: s.steps for k, s in searched("gits", RF(), counts=(2, 5), fine=3).schedules.items()} == {2: 2, 5: 5}


@pytest.mark.parametrize("name", ["gas", "amed"])
def test_a_learning_that_leaves_the_numbers_keeps_where_it_began(name: str) -> None:
    found = searched(name, RF(), lr=20.0).schedules
    assert {k: schedule.steps for k, schedule in found.items()} == {2: 2, 3: 3}


def exact_end(process: Process, noise: Tensor) -> Tensor:
    """Where the teacher's path from this noise ends."""
    flow = student_of(process, "x0")
    t = noise.new_full((len(noise),), process.t_max)
    x = noise * process.sigma(t[:1])
    return flow.jump(x, t, torch.zeros_like(t), torch.full((len(noise),), 1.0, dtype=noise.dtype)).detach()


def test_every_search_has_its_margin_here() -> None:
    assert set(SEARCHES) == set(SHARES)


@every_process
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_comes_nearer_to_the_teacher_than_uniform_steps(name: str, process: Process) -> None:
    for k, found in searched(name, process).found.items():
        assert found.distance < SHARES[name] * found.uniform_distance
        assert found.schedule.steps == k
        assert found.schedule.times[0] == process.t_max
        assert found.schedule.times[-1] == 0


@every_process
@pytest.mark.parametrize("solver", ["ddim", "ab2", "dpmpp_2m"])
def test_the_sampling_that_is_learnt_through_is_the_solver_that_serves(solver: Any, process: Process) -> None:
    levels, batch, teacher = (1.0, 0.8, 0.45, 0.2), batch_of(8), teacher_of(process, "flow")
    t = torch.tensor(times.grid(process, levels), dtype=torch.float64)
    ours = unrolled(teacher, batch.noise, t, solver_rows(process, t, solver), batch.cond)
    theirs = trajectory(teacher, batch.noise, t.tolist(), batch.cond, solver=solver)[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_gradient_to_the_times_is_the_slope_of_the_endpoint() -> None:
    """Of AB2, whose rows use all times: by central differences."""
    teacher, batch = teacher_of(RF(), "flow"), batch_of(4)

    def end(gaps: Tensor) -> Tensor:
        t = grid(RF(), gaps)
        return unrolled(teacher, batch.noise, t, solver_rows(RF(), t, "ab2"), batch.cond).square().sum()

    gaps = leaf([0.2, -0.1, 0.3])
    (slope,) = torch.autograd.grad(end(gaps), gaps)
    for i in range(3):
        step = 1e-5 * torch.eye(3, dtype=torch.float64)[i]
        with torch.no_grad():
            assert float(slope[i]) == pytest.approx(float(end(gaps + step) - end(gaps - step)) / 2e-5, rel=1e-5)


# what is exact on Gaussian data --------------------------------------------------------------------------------------


class OnTheTruePath(Fitted):
    """Fits to the flow map itself instead of to many steps."""

    def _path(self, batch: Any, grid: tuple[float, ...]) -> list[Tensor]:
        return list(exact_pairs(self.process, batch.noise, grid[:-1]).unbind(dim=1))


@every_process
@pytest.mark.parametrize("kind", ["x0", "v", "flow", "edm"])
def test_fitted_coefficients_are_the_exact_map_of_a_gaussian(process: Process, kind: Kind) -> None:
    """Its flow map is linear in x and x0, so of any count of steps the end is the true one for other noise too."""
    method = searched("fitted_solver", process, kind, method=OnTheTruePath, counts=(1, 2, 4))
    other = batch_of(16, seed=3)
    for found in method.found.values():
        end = followed(method.cast.teacher, other.noise, found.schedule, other.cond)
        torch.testing.assert_close(end, exact_end(process, other.noise), atol=1e-3, rtol=0)


def test_the_row_of_one_fitted_step_is_the_deviation_and_the_mean() -> None:
    """From pure noise of rectified flow x0 is the mean and the end is mean + std noise: the row is (std, 1)."""
    (row,) = searched("fitted_solver", RF(), counts=(1,), path_steps=200).found[1].schedule.coefficients or ()
    assert row == pytest.approx((STD, 1.0), abs=1e-3)


def test_gas_learns_the_row_of_one_exact_step() -> None:
    (row,) = searched("gas", RF(), counts=(1,), iterations=300).found[1].schedule.coefficients or ()
    assert row == pytest.approx((STD, 1.0), abs=1e-2)


def test_the_scale_of_one_step_is_its_closed_form() -> None:
    """Jump J = mean - noise and way W = mean + (std - 1) noise: the scale is <J, W> / <J, J>."""
    method = searched("optimal_step_size", RF(), counts=(1,), path_steps=200)
    z = batch_of(8).noise
    jump, way = GUIDED_MEAN - z, GUIDED_MEAN + (STD - 1) * z
    scale = float((jump * way).sum() / (jump * jump).sum())
    (row,) = method.found[1].schedule.coefficients or ()
    assert row == pytest.approx((1 - scale, scale), abs=1e-3)


def test_learnt_times_are_the_best_of_a_fine_grid() -> None:
    """Two steps of DDIM have one time to find: no level of 200 is better by more than a thousandth."""
    method, batch = searched("ld3", RF(), counts=(2,), solvers=("ddim",), tolerance=0.0, iterations=120), batch_of(8)
    truth = endpoints(method.cast.teacher, batch, method.config)
    tried = [plain(RF(), (1.0, i / 200), "ddim") for i in range(1, 200)]
    least = min(distance(method.cast.teacher, batch, truth, one) for one in tried)
    assert method.found[2].distance < 1.001 * least


def test_a_tolerance_moves_no_row_farther_than_it_says() -> None:
    preset = resolve("ld3")
    method, batch = preset.method(Cast(teacher_of(RF(), "flow")), preset.config({"tolerance": 0.1})), batch_of(4)
    assert isinstance(method, LD3)
    for scale in (0.0, 1e-3, 10.0):
        moved = (
            (method.starting_noise(batch, scale * torch.ones_like(batch.noise)) - batch.noise).flatten(1).norm(dim=1)
        )
        assert (moved <= 0.1 * batch.noise.flatten(1).norm(dim=1) + 1e-9).all()
        assert (moved > 0).all() == (scale > 0)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_programme_over_costs_finds_what_trying_all_finds(k: int) -> None:
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    cost[torch.ones(8, 8).tril().bool()] = float("inf")
    paths = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), k - 1)]
    weighed = {p: sum(1.15**n * float(cost[i, j]) for n, (i, j) in enumerate(itertools.pairwise(p))) for p in paths}
    assert (*cheapest(cost, k, 1.15), 7) == min(weighed, key=lambda p: weighed[p])


def test_an_amed_step_goes_back_to_where_its_first_evaluation_began() -> None:
    """Its two rows, done on one row's numbers by hand: x + c (s - t) (eps - x0), with the slope of the time between."""
    t, between, s, c = 0.8, 0.5, 0.2, 1.1
    method = AMED(Cast(teacher_of(RF(), "flow")), resolve("amed").config({}))
    scale = torch.tensor([c], dtype=torch.float64)
    first, second = method.step_rows(torch.tensor([t, between, s], dtype=torch.float64), "ddim", [scale])
    x, x0, later = 1.3, 0.4, 0.7
    x_m = float(first @ torch.tensor([x, x0], dtype=torch.float64))
    assert x_m == pytest.approx(x + (between - t) * ((x - (1 - t) * x0) / t - x0))
    slope = (x_m - (1 - between) * later) / between - later
    end = float(second @ torch.tensor([x_m, later, x0], dtype=torch.float64))
    assert end == pytest.approx(x + c * (s - t) * slope)


def test_what_is_farther_than_uniform_steps_is_not_taken() -> None:
    found = searched("gits", PROCESSES["vp"], solvers=("ab2",)).found[2]
    assert (found.schedule.solver, found.distance) == ("ddim", found.uniform_distance)


# mutants -------------------------------------------------------------------------------------------------------------


class Away(GAS):
    """The wrong sign: learns away from the endpoints."""

    def _learn(self, batch: Any, truth: Tensor, *rest: Any) -> None:
        super()._learn(batch, 2 * trajectory(self.cast.teacher, batch.noise, (1.0, 0.0), batch.cond)[-1] - truth, *rest)


class NoHistory(Fitted):
    """Forgets the predictions before the present one."""

    def _moved(self, parts: Tensor, known: Tensor, there: Tensor, ends: Any) -> Tensor:
        moved = super()._moved(parts, known, there, ends)
        moved[2:] = 0
        return moved


class Backwards(GITS):
    """The path's costs with time the wrong way."""

    def costs(self, batch: Any) -> Tensor:
        return super().costs(batch).flip(0, 1).T


def test_a_search_that_learns_the_wrong_way_keeps_where_it_began() -> None:
    right, wrong = (searched("gas", RF(), method=one, counts=(2,)).found[2] for one in (None, Away))
    assert right.distance < 0.1 * right.uniform_distance < wrong.distance
    assert wrong.distance <= wrong.uniform_distance


def test_a_fit_without_history_misses_what_the_weight_of_a_change_needs() -> None:
    right, wrong = (searched("d_ode", RF(), method=one, counts=(2,)).found[2] for one in (None, NoHistory))
    assert right.distance < 1e-3 < wrong.distance


def test_costs_with_time_reversed_put_the_steps_where_the_path_is_straight() -> None:
    """Straight steps then end farther than uniform ones, which are given instead."""
    right, wrong = (
        searched("gits", RF(), method=one, solvers=("ddim",), counts=(2,), fine=24).found[2]
        for one in (None, Backwards)
    )
    assert right.distance < 0.9 * right.uniform_distance
    assert wrong.distance == wrong.uniform_distance
