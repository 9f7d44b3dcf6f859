"""Straight lines at a truth that is known: the coupling of Gaussian data is linear, so its lines can be inverted."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch, Rows
from distill_jobs.methods import reflow
from distill_jobs.methods._line import END
from distill_jobs.methods.base import Method, resolve
from distill_jobs.methods.reflow import PeRFlow, Reflow, UShaped
from distill_jobs.roles import Cast
from engines.denoiser import BaseDenoiser, Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from engines.solvers import sample
from tests.unit.distill_jobs.closed_form import (
    PROCESSES,
    STD,
    batch_of,
    data_of,
    exact_pairs,
    fake_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, other_guidance, top

STARTS = {"reflow": 1, "rfpp": 1, "perflow": 4}  # windows
every_reflow = pytest.mark.parametrize("name", ["reflow", "rfpp"])


class StraightNet(nn.Module):
    """The straight flow of N(cond + shift, std^2) in windows: from x_t back to the window's upper edge x_a, of which
    the line through x_a and its end is a linear function, and forth to that line. It does not depend on s."""

    def __init__(self, process: Process, kind: Kind, levels: tuple[float, ...], shift: float, std: float) -> None:
        super().__init__()
        self.flow, self.kind = student_of(process, "x0", shift=shift, std=std), kind
        self.edges = times.grid(process, levels)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor:
        process = self.flow.process
        x, t = self.flow.net._state(x, t)
        window = sum((t <= edge * (1 + 1e-9)).long() for edge in self.edges[1:-1]) + torch.zeros_like(t).long()
        edges = t.new_tensor(self.edges)
        a, b = edges[window], edges[window + 1]

        def line(x_a: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow(x_a, a, cond, b)

        at_0, at_1 = (process.mix(*line(torch.full_like(x, value)), t) for value in (0.0, 1.0))
        x0, eps = line((x - at_0) / (at_1 - at_0))
        return process.join(x0, eps, self.kind, t)


def grid(kind: Kind, count: int) -> tuple[float, ...]:
    return tuple(top(kind) * u for u in times.uniform(count))


def straight(
    name: str, process: Process, kind: Kind, *, shift: float = TRUTH, std: float = STD, reads_s: bool = False
) -> Denoiser:
    net = StraightNet(process, kind, grid(kind, STARTS[name]), shift, std)
    return Denoiser(net, process, kind, inputs={"s"} if reads_s else ())


def loss_of(
    name: str,
    process: Process,
    kind: Kind,
    *,
    method: type[Method] | None = None,
    teacher: BaseDenoiser | None = None,
    settings: dict[str, Any] | None = None,
    rows: Any = lambda rows: rows,
    **student: Any,
) -> float:
    preset, count = resolve(name), STARTS[name]
    fine = {"window_steps": 32} if name == "perflow" else {}
    config = preset.config({"counts": (count,), "grids": {count: grid(kind, count)}, **fine, **(settings or {})})
    one = (method or preset.method)(
        Cast(teacher or teacher_of(process, kind), student=straight(name, process, kind, **student)), config
    )
    pairs = exact_pairs(process, batch_of(32).noise, times.grid(process, (top(kind),))[:-1])

    def batch(seed: int) -> Batch:
        given = batch_of(32, seed, x=data_of(32), pair=pairs)
        return Batch(rows(given.rows), given.noise, given.generator)

    return max(float(sum(one.loss("student", batch(seed)).values())) for seed in range(2))


# reflow and rfpp -----------------------------------------------------------------------------------------------------


@every_kind
@every_process
@every_reflow
def test_reflow_is_zero_at_the_straight_flow_of_the_coupling_only(name: str, process: Process, kind: Kind) -> None:
    assert loss_of(name, process, kind) < 1e-12
    assert loss_of(name, process, kind, reads_s=True) < 1e-12
    assert loss_of(name, process, kind, shift=TRUTH + OFF) > 0.01
    assert loss_of(name, process, kind, std=1.2 * STD) > 0.01


@every_reflow
def test_the_teachers_own_curved_flow_is_not_the_straight_one(name: str) -> None:
    preset, batch = resolve(name), batch_of(pair=exact_pairs(RF(), batch_of().noise, (1.0,)))
    cast = Cast(teacher_of(RF(), "flow"), student=copy.deepcopy(teacher_of(RF(), "flow")))
    assert float(preset.method(cast, preset.config({})).loss("student", batch)["reflow"]) > 0.1


@every_reflow
def test_reflow_with_time_reversed_fails_the_oracle(name: str) -> None:
    assert loss_of(name, RF(), "flow", rows=lambda rows: Rows(rows.cond, pair=rows.pair.flip(1))) > 0.1


@every_reflow
def test_reflow_with_pictures_of_other_noise_fails_the_oracle(name: str) -> None:
    def mixed(rows: Rows) -> Rows:
        assert rows.pair is not None
        return Rows(rows.cond, pair=torch.stack([rows.pair[:, 0].roll(1, 0), rows.pair[:, 1]], dim=1))

    assert loss_of(name, RF(), "flow", rows=mixed) > 0.1


@every_reflow
def test_reflow_with_the_wrong_sign_fails_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflow, "flow_error", lambda guess, line: (guess[1] - guess[0]) + (line[1] - line[0]))
    assert loss_of(name, RF(), "flow") > 0.1


def test_a_student_of_straight_lines_makes_the_same_picture_in_any_number_of_steps() -> None:
    student, batch = straight("reflow", RF(), "flow", reads_s=True), batch_of(8)
    one, two, seven = (sample(student, batch.noise, times.grid(RF(), grid("flow", k)), batch.cond) for k in (1, 2, 7))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, seven)
    truth = exact_pairs(RF(), batch.noise, (1.0,))[:, -1]
    torch.testing.assert_close(one, truth)


def test_rfpp_counts_a_large_error_once_where_reflow_squares_it() -> None:
    far = {name: [loss_of(name, RF(), "x0", shift=TRUTH + by) for by in (50.0, 100.0)] for name in ("reflow", "rfpp")}
    assert far["reflow"][1] == pytest.approx(4 * far["reflow"][0], rel=0.02)
    assert far["rfpp"][1] == pytest.approx(2 * far["rfpp"][0], rel=0.02)


def test_rfpp_draws_its_noise_levels_from_a_u() -> None:
    """Between 0 and v lies (exp(a v) - 1 + exp(a) - exp(a (1 - v))) / (2 (exp(a) - 1))."""
    a, drawn = resolve("rfpp").config({}).ends, UShaped(4.0).draw(40_000, torch.Generator().manual_seed(0))
    assert a == 4.0
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1
    for v in (0.05, 0.25, 0.5, 0.9):
        share = (math.expm1(a * v) + math.exp(a) - math.exp(a * (1 - v))) / (2 * math.expm1(a))
        assert float((drawn < v).double().mean()) == pytest.approx(share, abs=0.01)


def test_the_levels_of_rfpp_are_those_of_the_u(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within .1 of an end are .2 of reflow's levels, and .33 of those of the U with a = 4."""
    seen: list[Tensor] = []
    monkeypatch.setattr(reflow, "_error", lambda method, line, u, low, batch: seen.append(u) or line[0])
    pairs = exact_pairs(RF(), batch_of().noise, (1.0,))
    for name, share in (("reflow", 0.2), ("rfpp", math.expm1(0.4) + math.exp(4) - math.exp(3.6))):
        seen.clear()
        cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"))
        method = resolve(name).method(cast, resolve(name).config({}))
        for seed in range(60):
            method.loss("student", batch_of(seed=seed, pair=pairs))
        near = float((((torch.cat(seen) - END) / (1 - END) - 0.5).abs() > 0.4).double().mean())
        assert near == pytest.approx(share if name == "reflow" else share / math.expm1(4), abs=0.03)


# slimflow ------------------------------------------------------------------------------------------------------------


def annealed(student: BaseDenoiser, fresh: float, process: Process = PROCESSES["rf"], kind: Kind = "flow") -> Reflow:
    grids = {"counts": (1,), "grids": {1: (top(kind),)}}
    method = Reflow(Cast(teacher_of(process, kind), student=student), resolve("slimflow").config(grids))
    method.curriculum = {"fresh": fresh}
    return method


def annealed_loss(method: Reflow, kind: Kind = "flow") -> float:
    noise = [batch_of(seed=seed).noise for seed in range(4)]
    pairs = [exact_pairs(method.process, one, times.grid(method.process, (top(kind),))[:-1]) for one in noise]
    return sum(float(method.loss("student", batch_of(seed=9, pair=pair))["reflow"]) for pair in pairs)


@every_kind
@every_process
def test_slimflow_ends_at_the_straight_flow_and_starts_at_the_teachers(process: Process, kind: Kind) -> None:
    """With the trajectories' own noise it is reflow; with fresh noise the guided denoiser has the least loss."""
    assert annealed_loss(annealed(straight("reflow", process, kind), 0.0, process, kind), kind) < 1e-12
    assert annealed_loss(annealed(straight("reflow", process, kind), 1.0, process, kind), kind) > 0.1
    at, more, less = (
        annealed_loss(annealed(fake_of(process, kind, shift=TRUTH + by), 1.0, process, kind), kind)
        for by in (0.0, 0.3, -0.3)
    )
    assert at < min(more, less)


@pytest.mark.parametrize("fresh", [0.3, 0.8])
def test_annealed_noise_stays_unit_and_keeps_its_share_of_the_trajectorys(
    fresh: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(reflow, "_error", lambda method, line, u, low, batch: seen.append(line[1]) or line[0])
    noise = batch_of(1024).noise
    annealed(straight("reflow", RF(), "flow"), fresh).loss(
        "student", batch_of(1024, seed=3, pair=exact_pairs(RF(), noise, (1.0,)))
    )
    assert float(seen[0].std()) == pytest.approx(1, abs=0.03)
    assert float((seen[0] * noise).mean()) == pytest.approx(math.sqrt(1 - fresh**2), abs=0.03)


def test_fresh_noise_gives_way_over_the_iterations_of_the_anneal() -> None:
    config = resolve("slimflow").config({"anneal": 4})
    method, seen = Reflow(Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow")), config), []
    for iteration in range(6):
        seen.append(method.curriculum["fresh"])
        method.after(iteration)
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert resolve("reflow").config({}).anneal == 0


# grids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reflow", "rfpp", "std"])
def test_all_grids_start_where_the_trajectories_do(name: str) -> None:
    with pytest.raises(InvalidRequest, match="start where the trajectories do"):
        resolve(name).config({"counts": (1, 2), "grids": {1: (0.9,)}})
    assert resolve(name).config({"counts": (1, 2), "grids": {1: (0.9,), 2: (0.9, 0.5)}}).top == 0.9


# perflow -------------------------------------------------------------------------------------------------------------


@every_kind
@every_process
def test_perflow_is_small_at_the_straight_flow_of_each_window_only(process: Process, kind: Kind) -> None:
    assert loss_of("perflow", process, kind) < 1e-4  # the teacher's path has steps
    assert loss_of("perflow", process, kind, reads_s=True) < 1e-4
    assert loss_of("perflow", process, kind, shift=TRUTH + OFF) > 0.004
    assert loss_of("perflow", process, kind, std=1.2 * STD) > 0.004


def test_perflow_tends_to_zero_with_the_teachers_steps() -> None:
    coarse, fine = (loss_of("perflow", RF(), "flow", settings={"window_steps": n}) for n in (4, 16))
    assert fine < 0.1 * coarse


def test_perflow_with_the_other_guidance_convention_fails_the_oracle() -> None:
    assert loss_of("perflow", RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.01


class Backwards(PeRFlow):
    """Noise and picture of the line are exchanged."""

    def line(self, high: float, low: float, batch: Batch) -> Any:
        x0, eps = super().line(high, low, batch)
        return eps, x0


class OneWindow(PeRFlow):
    """Every window is taken for the whole path."""

    def line(self, high: float, low: float, batch: Batch) -> Any:
        return super().line(1.0, 0.0, batch)


@pytest.mark.parametrize("mutant", [Backwards, OneWindow])
def test_perflow_of_a_wrong_window_fails_the_oracle(mutant: type[PeRFlow]) -> None:
    assert loss_of("perflow", RF(), "flow", method=mutant) > 0.01


def test_the_windows_of_perflow_are_the_steps_of_its_schedule() -> None:
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"))
    method = PeRFlow(cast, resolve("perflow").config({"counts": (4, 8)}))
    assert method.windows == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert method.schedules[4].times == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert set(method.schedules[4].times) < set(method.schedules[8].times)
    with pytest.raises(InvalidRequest, match="every edge of the 4 windows"):
        resolve("perflow").config({"counts": (4, 6)})


def test_a_network_that_reads_s_is_asked_within_its_window_only() -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    student = straight("perflow", RF(), "flow", reads_s=True)
    student.net.register_forward_pre_hook(lambda net, given: asked.append((given[1], given[3])))
    method = PeRFlow(Cast(teacher_of(RF(), "flow"), student=student), resolve("perflow").config({}))
    for seed in range(6):
        method.loss("student", batch_of(seed=seed, x=data_of()))
        t, s = asked[-1]
        assert (s < t).all()
        assert ((4 * s).floor() == (4 * t).floor()).all()
    assert len({int(4 * t[0]) for t, _ in asked}) > 1


def test_a_step_for_each_window_follows_the_teacher() -> None:
    student, batch = straight("perflow", RF(), "flow", reads_s=True), batch_of(8)
    made = sample(student, batch.noise, times.grid(RF(), grid("flow", 4)), batch.cond)
    torch.testing.assert_close(made, exact_pairs(RF(), batch.noise, (1.0,))[:, -1])
