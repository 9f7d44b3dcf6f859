"""Consistency in continuous time at the closed-form truth, its tangents in numbers, and mutants that must fail."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Batch, Rows, TensorSource
from distill_jobs.methods import continuous
from distill_jobs.methods.base import Method, Workspace, resolve
from distill_jobs.methods.continuous import SCM, TBCM, Consistency
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
from engines.manifest import Kind
from engines.process import RF, Process, over
from tests.unit.distill_jobs.closed_form import (
    MEAN,
    SHAPE,
    STD,
    GaussianNet,
    batch_of,
    data_of,
    exact_pairs,
    fake_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import (
    OFF,
    RUNGS,
    TRUTH,
    every_kind,
    every_process,
    other_guidance,
    top,
    trajectory_loss,
)

NAMES = ("scm", "tbcm", "rcm")
every_name = pytest.mark.parametrize("name", NAMES)


def settings_of(name: str, kind: Kind, **more: Any) -> dict[str, Any]:
    first = top(kind)
    own: dict[str, dict[str, Any]] = {
        "scm": {"top": first},
        "tbcm": {"rungs": tuple(first * u for u in RUNGS), "teacher_steps": 4},
        "rcm": {"top": first, "counts": (1,), "grids": {1: (first,)}},
    }
    return {"warmup": 0, **own[name], **more}


def loss_of(name: str, process: Process, kind: Kind, *, more: dict[str, Any] | None = None, **kwargs: Any) -> float:
    settings = settings_of(name, kind, **(more or {}))
    rungs = tuple(top(kind) * u for u in RUNGS)
    return trajectory_loss(name, process, kind, settings=settings, rungs=rungs, seeds=1, **kwargs)


# the truth -----------------------------------------------------------------------------------------------------------


@every_kind
@every_process
@pytest.mark.parametrize(("name", "reads_s"), [("scm", True), ("scm", False), ("tbcm", False), ("rcm", True)])
def test_consistency_is_zero_at_the_true_flow_map_only(name: str, reads_s: bool, process: Process, kind: Kind) -> None:
    """The critic of rcm is a copy of the student: one that reads s and is asked without it knows its own samples."""
    assert loss_of(name, process, kind, reads_s=reads_s) < 1e-9
    assert loss_of(name, process, kind, reads_s=reads_s, shift=TRUTH + OFF) > 0.1
    assert loss_of(name, process, kind, reads_s=reads_s, std=1.2 * STD) > 0.1


@every_kind
@every_process
def test_the_deviation_of_the_latents_moves_no_truth(process: Process, kind: Kind) -> None:
    assert loss_of("scm", process, kind, more={"sigma_data": 0.5}) < 1e-9


def pulls(name: str, process: Process, kind: Kind, *, shift: float = TRUTH, std: float = STD) -> tuple[float, float]:
    """d loss / d (mean, log std) of a student N(MEAN + shift, std^2) whose critic, if any, is exact."""
    cast = Cast(
        teacher_of(process, kind),
        student=student_of(process, kind, shift=shift, std=std, reads_s=False),
        fake=fake_of(process, kind, shift=shift, std=std),
    )
    preset = resolve(name)
    method = preset.method(cast, preset.config(settings_of(name, kind)))
    rungs = tuple(top(kind) * u for u in RUNGS)
    with cast.only("student") as student:
        for seed in range(1):
            batch = batch_of(seed=seed, x=data_of())
            levels = method._grid[:-1] if isinstance(method, TBCM) else rungs
            pair = exact_pairs(process, batch.noise, tuple(levels)) if name == "tbcm" else None
            rows = Rows(cond=batch.cond, x=None if name == "tbcm" else batch.rows.x, pair=pair)
            sum(method.loss("student", Batch(rows, batch.noise, batch.generator)).values()).backward()
    net: Any = student.net
    return float(net.shift.grad), float(net.log_std.grad)


@every_name
@every_process
def test_consistency_points_back_to_the_truth(name: str, process: Process) -> None:
    assert pulls(name, process, "flow") == pytest.approx((0, 0), abs=1e-9)
    for side in (-1, 1):
        assert side * pulls(name, process, "flow", shift=TRUTH + 0.5 * side)[0] > 1e-2
        assert side * pulls(name, process, "flow", std=STD * (1.5 if side > 0 else 0.6))[1] > 1e-3


@pytest.mark.parametrize("name", ["scm", "tbcm"])
def test_a_student_learns_the_teachers_distribution(name: str) -> None:
    """From N(1 + 0.8, 1) to N(1, STD^2), in single precision."""
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    student = Denoiser(GaussianNet(RF(), "flow", shift=0.8, std=1.0, endpoint=True).float(), RF(), "flow")
    more = {"scm": {"generate": 256}, "tbcm": {"pairs": 256}}
    settings = {"counts": (1,), "lr": 3e-2, "batch": 32, "warmup": 20, **more[name]}
    run = StageRun(0, Stage(name, 80, settings), teacher, student, ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE)
    run.method.prepare(source, Workspace())
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert final["net.shift"].item() == pytest.approx(0, abs=0.06)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.06)


# mutants -------------------------------------------------------------------------------------------------------------


@every_name
def test_the_other_guidance_convention_fails_the_oracle(name: str) -> None:
    assert loss_of(name, RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.1


@pytest.mark.parametrize("name", ["scm", "tbcm"])
def test_a_path_that_runs_backwards_fails_the_oracle(name: str) -> None:
    class Backwards(resolve(name).method):  # type: ignore[misc]
        def __init__(self, cast: Cast, config: Any) -> None:
            super().__init__(cast, config)
            forwards = self.tutor.velocity
            self.tutor.velocity = lambda *args: -forwards(*args)

    assert loss_of(name, RF(), "flow", method=Backwards) > 0.1


def test_a_derivative_without_its_time_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    along = continuous.along

    def frozen(function: Any, point: Any, direction: Any, step: float) -> Any:
        return along(function, point, (direction[0], torch.zeros_like(direction[1])), step)

    monkeypatch.setattr(continuous, "along", frozen)
    assert loss_of("scm", RF(), "flow") > 0.1


@every_name
def test_the_wrong_sign_fails_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toward = continuous.toward
    monkeypatch.setattr(continuous, "toward", lambda x, direction: toward(x, -direction))
    settings = {"score_weight": 0} if name == "rcm" else {}
    monkeypatch.setitem(globals(), "settings_of", lambda n, k: {**SETTINGS(n, k), **settings})
    assert pulls(name, RF(), "flow", shift=TRUTH + 0.5)[0] < -1e-2


SETTINGS = settings_of


# numbers -------------------------------------------------------------------------------------------------------------


class Constant(torch.nn.Module):
    """A network that predicts one picture whatever it sees."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        return self.value + 0 * x


def constants(student: float, teacher: float, **settings: Any) -> Consistency:
    players = [Denoiser(Constant(value), RF(), "x0") for value in (teacher, student)]
    method = SCM(Cast(players[0], student=players[1]), resolve("scm").config(settings))
    assert isinstance(method, Consistency)
    return method


def test_an_end_that_does_not_move_has_no_tangent_once_the_derivative_counts() -> None:
    """f = 3 along any path, whatever the teacher says; before the warm-up the velocities are matched."""
    method = constants(3.0, 1.0, warmup=4)
    x, t = batch_of(4).noise, torch.tensor([0.3, 0.7, 1.0, 1.4], dtype=torch.float64)
    first = method.tangent(x, t, None)  # -cos^2 (F - v), and F - v = (1 - 3) / sin
    torch.testing.assert_close(first, over(2 * t.cos() ** 2 / t.sin(), x).expand_as(x))
    for share, iteration in ((0.25, 0), (0.75, 2), (1.0, 3), (1.0, 50)):
        method.after(iteration)
        assert method.curriculum == {"tangent": share}
        torch.testing.assert_close(method.tangent(x, t, None), (1 - share) * first)


@pytest.mark.parametrize("soft", [0.1, 1.0])
def test_tangents_are_normalised_by_rows(soft: float) -> None:
    """Half the mean square of sqrt(d) g / (|g| + c), with |g| = sqrt(d) 2 cos^2 / sin."""
    method = constants(3.0, 1.0, warmup=1, soft=soft)
    batch = batch_of(1, x=data_of(1))
    _, t = method.point(batch_of(1, x=data_of(1)))
    norm = math.sqrt(math.prod(SHAPE)) * 2 * float(t.cos() ** 2 / t.sin())
    assert float(method.loss("student", batch)["scm"]) == pytest.approx(0.5 * (norm / (norm + soft)) ** 2)


@pytest.mark.parametrize("difference", [1e-3, 1e-4])
def test_differences_agree_with_the_exact_derivative(difference: float) -> None:
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow", shift=TRUTH + 0.5, std=0.8, reads_s=False))
    exact, near = (SCM(cast, resolve("scm").config({"warmup": 0, "difference": step})) for step in (0, difference))
    x, t = exact.point(batch_of(x=data_of()))
    cond = torch.full((64,), MEAN, dtype=torch.float64)
    right = exact.tangent(x, t, cond)
    gap = (near.tangent(x, t, cond) - right).norm() / right.norm()
    assert 0 < gap < 10 * difference


def test_levels_stay_within_what_is_trained() -> None:
    def levels(**settings: Any) -> Tensor:
        method = constants(0.0, 0.0, **settings)
        _, t = method.point(batch_of(4096, x=data_of(4096)))
        return t.sin() / (t.sin() + t.cos())

    assert float(levels(top=0.7).max()) == pytest.approx(0.7)
    drawn = levels(level_mean=-1.0, level_std=0.5)
    log = (drawn / (1 - drawn)).log()  # log(sigma / alpha)
    assert float(log.mean()) == pytest.approx(-1.0, abs=0.05)
    assert float(log.std()) == pytest.approx(0.5, abs=0.05)


class MixedRungs(TBCM):
    """The states of one row with the times of another."""

    def point(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, t = super().point(batch)
        return x, t.roll(1)


def points_of(
    cls: type[TBCM], levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(noise levels kept [R + 1], states there [B, R + 1, N], levels trained at [B], states [B, N]), rectified flow."""
    rows = 256
    config = resolve("tbcm").config({"rungs": levels, "teacher_steps": 4, "batch": rows, "pairs": rows})
    method = cls(Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow")), config)
    source = TensorSource(torch.ones(rows, dtype=torch.float64), SHAPE)
    method.prepare(source, Workspace())
    found = method.rows(source, 0)
    assert found.x is None
    assert found.pair is not None
    pair = found.pair.double()
    x, t = method.point(batch_of(rows, pair=pair))
    scale = t.sin() + t.cos()
    kept = torch.tensor([*levels, 0.0], dtype=torch.float64)
    return kept, pair.flatten(2), t.sin() / scale, (x / over(scale, x)).flatten(1)


@pytest.mark.parametrize(("cls", "on_path"), [(TBCM, True), (MixedRungs, False)])
def test_tbcm_needs_no_latents_and_stands_on_the_teachers_path(cls: type[TBCM], on_path: bool) -> None:
    """At each point the level's own state, on the line between the two kept beside it. A mutant does not."""
    assert "data" not in TBCM.needs
    kept, states, level, seen = points_of(cls)
    above = (kept[None, :-1] > level[:, None]).sum(1).clamp(1, 4) - 1
    rows = torch.arange(len(level))
    share = ((kept[above] - level) / (kept[above] - kept[above + 1]))[:, None]
    line = states[rows, above] + share * (states[rows, above + 1] - states[rows, above])
    assert bool(torch.isclose(line, seen, atol=1e-6).all()) == on_path


def test_tbcm_is_trained_at_every_time_and_not_at_the_rungs_alone() -> None:
    """Of a derivative by time that is asked at few times alone, the values in between are free."""
    _, _, level, _ = points_of(TBCM)
    assert len(level.unique()) == len(level)
    assert all(((level > low) & (level < low + 0.05)).any() for low in torch.arange(0.05, 0.95, 0.05))


def test_rungs_of_tbcm_that_fall_on_one_step_of_the_path_are_one() -> None:
    _, _, level, seen = points_of(TBCM, (1.0, 0.9, 0.75, 0.7, 0.5, 0.3, 0.25, 0.2))
    assert bool(seen.isfinite().all())
    assert len(level.unique()) == len(level)


def test_rcm_is_scm_and_weighted_distribution_matching() -> None:
    def terms(name: str, **settings: Any) -> dict[str, float]:
        preset = resolve(name)
        student = student_of(RF(), "flow", shift=TRUTH + 0.5, reads_s=False)
        cast = Cast(teacher_of(RF(), "flow"), student=student, fake=fake_of(RF(), "flow"))
        method: Method = preset.method(cast, preset.config({"counts": (1,), **settings}))
        return {term: float(value) for term, value in method.loss("student", batch_of(x=data_of())).items()}

    once, twice = terms("rcm"), terms("rcm", score_weight=2.0)
    assert once.keys() == {"scm", "dmd"}
    assert once["dmd"] == pytest.approx(terms("dmd")["dmd"])
    assert twice == pytest.approx({"scm": once["scm"], "dmd": 2 * once["dmd"]})
