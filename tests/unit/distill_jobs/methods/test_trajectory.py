"""Consistency trajectories at the exact flow map: any jump is the teacher's step and the rest of the jump."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows, make_batch
from distill_jobs.methods import trajectory
from distill_jobs.methods.base import Method, Workspace, resolve
from distill_jobs.methods.trajectory import CTM
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines import solvers
from engines.denoiser import Cond, Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import EDM, RF, Process
from tests.unit.distill_jobs.closed_form import (
    MEAN,
    STD,
    batch_of,
    data_of,
    exact_pairs,
    fake_of,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import (
    OFF,
    TRUTH,
    every_kind,
    every_process,
    other_guidance,
    top,
    trajectory_loss,
)
from tests.unit.distill_jobs.tiny import STAGES, TinyNet, tiny_source, tiny_student, tiny_teacher

SUBSTEPS = {"ctm": 16, "tcd": 8}
BESIDE = {"ctm": 8e-3, "tcd": 5e-4}  # ctm's teacher may go all the way from t to s, tcd's a fiftieth of it
every_name = pytest.mark.parametrize("name", SUBSTEPS)


def loss(name: str, process: Process, kind: Kind, substeps: int | None = None, **how: Any) -> float:
    """Without denoising, which is least at the truth but not zero."""
    settings = {"top": top(kind), "substeps": substeps or SUBSTEPS[name]} | ({"dsm": 0} if name == "ctm" else {})
    return trajectory_loss(name, process, kind, settings=settings, seeds=1, **how)


@every_kind
@every_process
@every_name
def test_jumps_compose_at_the_true_flow_map_only(name: str, process: Process, kind: Kind) -> None:
    assert loss(name, process, kind) < 0.1 * BESIDE[name]
    assert loss(name, process, kind, shift=TRUTH + OFF) > BESIDE[name]
    assert loss(name, process, kind, std=1.2 * STD) > BESIDE[name]


@every_kind
@every_process
@every_name
def test_what_is_left_at_the_truth_is_the_error_of_the_teachers_step(name: str, process: Process, kind: Kind) -> None:
    """Of second order in Heun's step, and quadratic in the error of a small DDIM step."""
    coarse, fine = (loss(name, process, kind, substeps=n) for n in (4, 8))
    assert fine < coarse / 2.2


@every_name
def test_the_other_guidance_convention_fails_the_oracle(name: str) -> None:
    assert loss(name, RF(), "flow", teacher=other_guidance(RF(), "flow")) > 1000 * loss(name, RF(), "flow")


def backwards(method: type[Method]) -> type[Method]:
    """The teacher's step leads to more noise."""

    class Backwards(method):  # type: ignore[misc, valid-type]
        def neighbour(self, batch: Batch, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
            return super().neighbour(batch, x, t, (2 * t - near).clamp(max=0.999))

    return Backwards


@every_name
def test_a_teacher_that_steps_backwards_fails_the_oracle(name: str) -> None:
    assert loss(name, RF(), "flow", method=backwards(resolve(name).method)) > 1000 * loss(name, RF(), "flow")


def ctm(process: Process, kind: Kind, *, settings: Mapping[str, Any] | None = None, **student: float) -> Any:
    cast = Cast(
        teacher_of(process, kind), student=student_of(process, kind, **student), target=student_of(process, kind)
    )
    return CTM(cast, resolve("ctm").config({"top": top(kind), **(settings or {})}))


@every_kind
@every_process
def test_denoising_is_least_at_the_data(process: Process, kind: Kind) -> None:
    def denoising(**student: float) -> float:
        one = ctm(process, kind, **student)
        total = 0.0
        for seed in range(2):
            batch = batch_of(128, seed, x=data_of(128))
            u, _ = one.levels(batch)
            t = times.on(process, u)
            x = process.mix(batch.rows.x, batch.noise, t)
            total += float(one.denoising(x, t, u, batch))
        return total

    at = denoising()
    assert at < denoising(shift=TRUTH + 0.3)
    assert at < denoising(shift=TRUTH - 0.3)
    assert at < denoising(std=1.5 * STD)
    assert at < denoising(std=STD / 1.5)


def test_denoising_asks_for_a_jump_of_no_length() -> None:
    """The error of x0 at s = t, over t^2 in rectified flow."""
    one, batch = ctm(RF(), "flow"), batch_of(x=data_of())
    t = torch.full((64,), 0.5, dtype=torch.float64)
    x = RF().mix(data_of(), batch.noise, t)
    with torch.no_grad():
        exact, _ = fake_of(RF(), "flow")(x, t, batch.cond)
    assert float(one.denoising(x, t, t, batch)) == pytest.approx(4 * float((exact - data_of()).square().mean()))


def test_ctm_is_its_two_terms() -> None:
    without, once, twice = (
        ctm(RF(), "flow", settings={"dsm": weight}).loss("student", batch_of(x=data_of())) for weight in (0, 1, 2)
    )
    assert set(without) == {"consistency"}
    assert float(twice["dsm"]) == pytest.approx(2 * float(once["dsm"]))
    assert float(twice["consistency"]) == pytest.approx(float(without["consistency"]))


def test_ctm_compares_pictures_and_its_gradient_passes_the_frozen_average() -> None:
    """The picture of x_s moves by std / sqrt(alpha^2 std^2 + sigma^2) of what x_s does."""
    one = ctm(RF(), "flow")
    x = batch_of().noise.requires_grad_()
    s = torch.full((64,), 0.6, dtype=torch.float64)
    one.picture(x, s, torch.full((64,), MEAN, dtype=torch.float64)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, STD / (0.16 * STD**2 + 0.36) ** 0.5))


class Untied(CTM):
    """Both sides are compared where they stand, at s."""

    def picture(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        return x


def test_ctm_that_does_not_go_on_to_zero_is_another_loss() -> None:
    """In a process whose states grow with the noise an error at s would weigh what it weighs there."""
    right, wrong = (loss("ctm", EDM(), "flow", shift=TRUTH + OFF, method=method) for method in (CTM, Untied))
    assert wrong > 1.2 * right


def test_ctm_stands_between_its_end_and_its_start() -> None:
    one = ctm(RF(), "flow", settings={"top": 0.8})
    u, low = one.levels(batch_of(4096))
    assert bool((low < u).all())
    assert float(u.max()) == pytest.approx(0.8)
    assert float((u == 0.8).double().mean()) == pytest.approx(0.1, abs=0.02)
    assert float((low / u).mean()) == pytest.approx(0.5, abs=0.03)


def test_tcd_aims_anywhere_below_its_neighbour() -> None:
    cast = Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"), target=student_of(RF(), "flow"))
    one: Any = resolve("tcd").method(cast, resolve("tcd").config({}))
    u = torch.full((4096,), 0.5, dtype=torch.float64)
    share = one.ends(batch_of(4096), u, 0.8 * u) / (0.8 * u)
    assert 0 <= float(share.min()) < 0.01
    assert 0.99 < float(share.max()) <= 1


def test_the_presets_are_the_papers() -> None:
    ctm, tcd = (resolve(name) for name in ("ctm", "tcd"))
    assert (ctm.config({}).eta, ctm.config({}).solver, ctm.config({}).keep) == (0.0, "heun", 0.999)
    assert (tcd.config({}).eta, tcd.config({}).solver, tcd.config({}).keep) == (0.3, "ddim", 0.95)
    assert ctm.method.inputs == tcd.method.inputs == {"s"}


@every_process
@every_name
def test_half_precision_gives_finite_gradients_to_the_ends_of_time(name: str, process: Process) -> None:
    preset = resolve(name)
    teacher, student, target = (Denoiser(TinyNet(seed), process, "flow", {"s"}) for seed in range(3))
    one = preset.method(Cast(teacher, student=student, target=target), preset.config({"first_share": 0.3}))
    batch = make_batch(Rows(cond=torch.ones(256), x=torch.randn(256, 2, 2, 2)), (2, 2, 2), seed=0)
    with one.cast.only("student"), torch.autocast("cpu", dtype=torch.bfloat16):
        one.loss("student", batch)["consistency"].backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in student.parameters())


# along stored trajectories -------------------------------------------------------------------------------------------


def std_loss(process: Process, kind: Kind, **other: Any) -> float:
    settings = {"counts": (1,), "grids": {1: (top(kind),)}, "states": 8}
    rungs = tuple(top(kind) * u for u in times.uniform(8))
    return trajectory_loss("std", process, kind, settings=settings, rungs=rungs, **other)


@every_kind
@every_process
def test_std_is_zero_at_the_true_flow_map_only(process: Process, kind: Kind) -> None:
    assert std_loss(process, kind) < 1e-6
    assert std_loss(process, kind, shift=TRUTH + OFF) > 0.004
    assert std_loss(process, kind, std=1.2 * STD) > 0.004


class Changed(trajectory.STD):
    """States of the trajectory in another order."""

    order = (8, 7, 6, 5, 4, 3, 2, 1, 0)

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        rows = Rows(batch.cond, pair=batch.rows.pair[:, list(self.order)])
        return super().loss(role, Batch(rows, batch.noise, batch.generator))


class OneLate(Changed):
    """Every state is taken for the one before it."""

    order = (1, 2, 3, 4, 5, 6, 7, 8, 8)


class Jumbled(trajectory.STD):
    """Neighbours are of two trajectories."""

    def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows.pair is not None
        pair = batch.rows.pair.clone()
        pair[:, 1::2] = pair[:, 1::2].roll(1, 0)
        return super().loss(role, Batch(Rows(batch.cond, pair=pair), batch.noise, batch.generator))


@pytest.mark.parametrize("mutant", [Changed, OneLate, Jumbled])
def test_std_along_another_path_fails_the_oracle(mutant: type[trajectory.STD]) -> None:
    assert std_loss(RF(), "flow", method=mutant) > 0.01


def test_a_jump_to_the_next_state_is_regressed_on_the_banks_own() -> None:
    """With one state there is only its end, so a target that knows nothing does not matter."""
    truth, lost = student_of(RF(), "flow"), student_of(RF(), "flow", shift=-5.0)
    batch = batch_of(pair=exact_pairs(RF(), batch_of().noise, (1.0,)))

    def loss(states: int, pair: Tensor) -> float:
        method = trajectory.STD(
            Cast(teacher_of(RF(), "flow"), student=truth, target=lost), resolve("std").config({"states": states})
        )
        return float(method.loss("student", batch_of(pair=pair))["std"])

    assert batch.rows.pair is not None
    assert loss(1, batch.rows.pair) < 1e-6
    assert loss(4, exact_pairs(RF(), batch.noise, (1.0, 0.75, 0.5, 0.25))) > 0.1


def test_every_later_state_is_jumped_to_from_every_state() -> None:
    method = trajectory.STD(
        Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow"), target=student_of(RF(), "flow")),
        resolve("std").config({"states": 4}),
    )
    seen = {
        tuple(pair) for seed in range(8) for pair in torch.stack(method._rungs(batch_of(seed=seed)), dim=1).tolist()
    }
    assert seen == {(n, k) for n in range(4) for k in range(n + 1, 5)}


def test_the_bank_holds_the_teachers_trajectory_from_noise_to_its_end() -> None:
    run = StageRun(0, Stage("std", 2, {**STAGES["std"], "states": 4, "between": 3}), tiny_teacher(), tiny_student())
    assert isinstance(run.method, trajectory.STD)
    assert run.method.prepare(tiny_source(), Workspace())
    assert run.method.bank is not None
    states = run.method.bank.states
    assert states.shape[1] == 5
    assert run.method.path.levels == pytest.approx((1.0, 0.75, 0.5, 0.25))
    grid = tuple(1 - i / 12 for i in range(13))
    path = solvers.trajectory(tiny_teacher(), states[:8, 0], grid, run.method.bank.conds[0][:8], solver="ab2")
    torch.testing.assert_close(states[:8], torch.stack(path[::3], dim=1), rtol=1e-4, atol=1e-5)


def test_the_target_is_the_students_average() -> None:
    run = StageRun(0, Stage("std", 9, {**STAGES["std"], "keep": 0.75}), tiny_teacher(), tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    before = {name: value.clone() for name, value in run.cast.weights("target").items()}
    run.iterate(tiny_source())
    student = run.cast.weights("student")
    for name, value in run.cast.weights("target").items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * student[name])


def test_std_refuses_a_network_that_does_not_read_s() -> None:
    with pytest.raises(InvalidRequest, match="must read s"):
        trajectory.STD(
            Cast(teacher_of(RF(), "flow"), student=student_of(RF(), "flow", reads_s=False)), resolve("std").config({})
        )
