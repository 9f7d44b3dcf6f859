"""Mean velocities at the closed-form truth, their identities in numbers, and mutants that must fail."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Batch, TensorSource
from distill_jobs.methods import mean_flow
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.methods.mean_flow import MeanVelocity, Shortcut, TraFlow, TwinFlow, weighted
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import (
    MEAN,
    PROCESSES,
    SHAPE,
    STD,
    GaussianNet,
    batch_of,
    data_of,
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

DERIVED = ("mean_flow", "imean_flow", "ayf", "esd")
NAMES = (*DERIVED, "psd", "shortcut")
every_name = pytest.mark.parametrize("name", NAMES)


def loss_of(name: str, process: Process, kind: Kind, *, more: dict[str, Any] | None = None, **kwargs: Any) -> float:
    settings = {"top": top(kind), **({"warmup": 0} if name in DERIVED else {}), **(more or {})}
    return trajectory_loss(name, process, kind, settings=settings, seeds=1, **kwargs)


def method_of(name: str, student: Denoiser, teacher: Any = None, **settings: Any) -> Any:
    preset = resolve(name)
    own = {"warmup": 0} if name in DERIVED else {}
    cast = Cast(teacher or teacher_of(student.process, student.kind), student=student, target=student)
    return preset.method(cast, preset.config({**own, **settings}))


# the truth -----------------------------------------------------------------------------------------------------------


@every_kind
@every_process
@every_name
def test_mean_velocities_are_zero_at_the_true_flow_map_only(name: str, process: Process, kind: Kind) -> None:
    assert loss_of(name, process, kind) < 1e-9
    assert loss_of(name, process, kind, shift=TRUTH + OFF) > 2e-3
    assert loss_of(name, process, kind, std=1.2 * STD) > 2e-3


class Straight(GaussianNet):
    """Knows every velocity, and no jump: it takes the straight line of its velocity."""

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        return super().forward(x, t, cond, None, w)


@every_process
@every_name
def test_true_velocities_without_true_jumps_are_not_enough(name: str, process: Process) -> None:
    student = Denoiser(Straight(process, "flow", TRUTH), process, "flow", inputs={"s"})
    for diagonal in (0.0, 0.5):
        assert (
            float(method_of(name, student, diagonal=diagonal).loss("s", batch_of(x=data_of()))["mean_velocity"]) > 1e-3
        )


@pytest.mark.parametrize("name", ["psd", "shortcut"])
def test_the_teacher_speaks_on_the_diagonal_alone_where_a_jump_is_two(name: str) -> None:
    """Every flow map is consistent with itself, the teacher's or not."""
    assert loss_of(name, RF(), "flow", shift=TRUTH + 0.5, more={"diagonal": 0.0}) < 1e-9
    assert loss_of(name, RF(), "flow", shift=TRUTH + 0.5, more={"diagonal": 0.25}) > 0.05


@every_name
def test_a_student_learns_the_teachers_flow_map(name: str) -> None:
    """From N(1 + 0.8, 1) to N(1, STD^2), in single precision."""
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    student = Denoiser(GaussianNet(RF(), "flow", shift=0.8, std=1.0).float(), RF(), "flow", inputs={"s"})
    quick = {"warmup": 20} if name in DERIVED else {"keep": 0.9} if name == "shortcut" else {}
    settings = {"lr": 3e-2, "batch": 32, "generate": 256, **quick}
    run = StageRun(0, Stage(name, 100, settings), teacher, student, ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE)
    run.method.prepare(source, Workspace())
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert final["net.shift"].item() == pytest.approx(0, abs=0.05)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.05)


# mutants -------------------------------------------------------------------------------------------------------------


@every_name
def test_the_other_guidance_convention_fails_the_oracle(name: str) -> None:
    assert loss_of(name, RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.05


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("wrong", ["sign", "time"])
def test_a_derivative_of_the_wrong_sign_or_without_time_fails_the_oracle(
    name: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    along = mean_flow.along

    def other(function: Any, point: Any, direction: Any, step: float) -> Any:
        if wrong == "time":
            return along(function, point, (direction[0], torch.zeros_like(direction[1])), step)
        value, slope = along(function, point, direction, step)
        return value, -slope

    monkeypatch.setattr(mean_flow, "along", other)
    assert loss_of(name, RF(), "flow") > 1e-2


@pytest.mark.parametrize("name", ["psd", "shortcut"])
@pytest.mark.parametrize("wrong", ["backwards", "start", "denominator"])
def test_jumps_that_are_joined_wrongly_fail_the_oracle(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = mean_flow.joined

    def other(den: Any, x: Tensor, t: Tensor, s: Tensor, share: Tensor, cond: Any) -> Tensor:
        if wrong == "backwards":
            return joined(den, x, t, 2 * t - s, share, cond)
        if wrong == "start":  # the second jump from where the first began
            return joined(den, x + 0.1, t, s, share, cond)
        return joined(den, x, t, s, share, cond) * ((t - s) / (t - s + 1e-3)).reshape(-1, 1, 1, 1)

    monkeypatch.setattr(mean_flow, "joined", other)
    assert loss_of(name, RF(), "flow") > 1e-6


# a network that is its own critic ------------------------------------------------------------------------------------

TOLD = {name: process for name, process in PROCESSES.items() if name != "edm"}
every_told = pytest.mark.parametrize("process", TOLD.values(), ids=TOLD)


class Twin(torch.nn.Module):
    """Its jumps, its field at t and its field at -t, each the closed form of a distribution of its own."""

    def __init__(self, process: Process, kind: Kind, **data: tuple[float, float]) -> None:
        super().__init__()
        for part in ("jumps", "field", "fake"):
            self.add_module(part, GaussianNet(process, kind, *data.get(part, (TRUTH, STD))))

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Tensor, w: Any) -> Tensor:
        negative, same = bool((t < 0).all()), bool((s == t).all())
        assert negative or bool((t >= 0).all())
        assert same or not negative
        part = self.get_submodule("fake" if negative else "field" if same else "jumps")
        pred: Tensor = part(x, t.abs(), cond, s.abs(), w)
        return pred


def twin_of(process: Process, kind: Kind, **told: Any) -> Any:
    data = {name: told.pop(name) for name in ("jumps", "field", "fake") if name in told}
    teacher, method = (told.pop(name, None) for name in ("teacher", "method"))
    student = Denoiser(Twin(process, kind, **data), process, kind, inputs={"s"})
    grids = {1: (top(kind),)}
    config = resolve("twin_flow").config({"counts": (1,), "top": top(kind), "grids": grids, **told})
    return (method or TwinFlow)(Cast(teacher or teacher_of(process, kind), student=student), config)


def twin_gradients(one: Any, term: str, seeds: int = 4) -> dict[str, tuple[float, float]]:
    """d term / d (mean, log std) of each part that has any."""
    with one.cast.only("student"):
        for seed in range(seeds):
            one.loss("student", batch_of(256, seed, x=data_of(256)))[term].backward()
    found = {}
    for name, part in one.cast.student.net.named_children():
        if part.shift.grad is not None:
            found[name] = (float(part.shift.grad) / seeds, float(part.log_std.grad) / seeds)
    return found


def twin_loss(process: Process, kind: Kind, **told: Any) -> float:
    return float(twin_of(process, kind, **told).loss("student", batch_of(x=data_of()))["mean_velocity"])


@every_kind
@every_told
def test_the_jumps_of_twin_flow_are_the_true_flow_maps_alone(process: Process, kind: Kind) -> None:
    assert twin_loss(process, kind, delta=1e-3) < 1e-4
    for wrong in ((TRUTH + OFF, STD), (TRUTH, 1.2 * STD)):
        assert twin_loss(process, kind, delta=1e-3, jumps=wrong, diagonal=0.0) > 2e-3
        assert twin_loss(process, kind, delta=1e-3, field=wrong) > 2e-3


def test_what_is_left_of_its_jumps_is_the_error_of_the_velocitys_step() -> None:
    coarse, fine = (twin_loss(RF(), "flow", delta=delta, power=0.0) for delta in (0.01, 0.005))
    assert fine < coarse / 3.5


def test_the_other_guidance_convention_fails_twin_flow() -> None:
    assert twin_loss(RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.05


@every_kind
@every_told
def test_its_samples_are_at_rest_where_both_fields_are_one(process: Process, kind: Kind) -> None:
    found = twin_gradients(twin_of(process, kind), "twin")
    assert found == {"jumps": pytest.approx((0, 0), abs=1e-9)}


@every_kind
@every_told
@pytest.mark.parametrize("side", [-1, 1])
def test_its_samples_are_moved_to_the_field_of_the_teacher(process: Process, kind: Kind, side: int) -> None:
    mean, std = (TRUTH + side * 0.5, STD), (TRUTH, STD * (1.5 if side > 0 else 0.6))
    by_mean, _ = twin_gradients(twin_of(process, kind, jumps=mean, fake=mean), "twin")["jumps"]
    _, by_std = twin_gradients(twin_of(process, kind, jumps=std, fake=std), "twin")["jumps"]
    assert side * by_mean > 0.05
    assert side * by_std > 0.005


class Exchanged(TwinFlow):
    """The two fields change places."""

    def matching(self, y: Tensor, batch: Batch) -> Tensor:
        self.student, self.twin = self.twin, self.student
        found = super().matching(y, batch)
        self.student, self.twin = self.twin, self.student
        return found


def test_fields_that_are_exchanged_fail_the_oracle() -> None:
    off = (TRUTH + 0.5, STD)
    assert twin_gradients(twin_of(RF(), "flow", jumps=off, fake=off, method=Exchanged), "twin")["jumps"][0] < -0.05


@every_kind
@every_told
def test_the_field_at_negative_times_is_that_of_its_samples(process: Process, kind: Kind) -> None:
    """Its loss moves nothing else, and points it to what the jumps make now, not to the teacher's."""
    made = (TRUTH - 0.6, STD)
    at, above, below = (
        twin_gradients(twin_of(process, kind, jumps=made, fake=(made[0] + off, STD), power=0.0), "fake", 8)
        for off in (0.0, 0.3, -0.3)
    )
    assert at.keys() == {"fake"}
    assert below["fake"][0] < -0.1
    assert above["fake"][0] > 0.1
    assert abs(at["fake"][0]) < 0.5 * min(above["fake"][0], -below["fake"][0])


def test_the_twin_gradient_in_numbers() -> None:
    """Fields of one answer each: v(t) - v(-t) is (x - 1) / t - (x - 3) / t = 2 / t, cut at the limit."""

    class Answers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, cond: Any, s: Tensor, w: Any) -> Tensor:
            same = bool((s == t).all())
            return (3.0 if bool((t < 0).all()) else 1.0) + 0 * x if same else self.made + 0 * x

    for limit in (0.5, 1.5):
        student = Denoiser(Answers(), RF(), "x0", inputs={"s"})
        config = resolve("twin_flow").config({"counts": (1,), "limit": limit, "twin": 0.5})
        one = TwinFlow(Cast(teacher_of(RF(), "x0"), student=student), config)  # type: ignore[arg-type]
        with one.cast.only("student"):
            one.loss("student", batch_of(x=data_of()))["twin"].backward()
        assert isinstance(student.net, Answers)
        assert student.net.made.grad is not None
        assert student.net.made.grad.item() == pytest.approx(0.5 * limit)


def test_a_process_whose_times_are_negative_already_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="negative times: those of this process are so already"):
        twin_of(PROCESSES["edm"], "flow")


def test_twin_flow_learns_the_teachers_distribution_with_one_network() -> None:
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    start = {part: (0.8, 1.0) for part in ("jumps", "field", "fake")}
    student = Denoiser(Twin(RF(), "flow", **start).float(), RF(), "flow", inputs={"s"})
    run = StageRun(0, Stage("twin_flow", 150, {"lr": 3e-2, "batch": 64, "generate": 256}), teacher, student, ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE)
    run.method.prepare(source, Workspace())
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    for part in ("jumps", "field", "fake"):
        assert final[f"net.{part}.shift"].item() == pytest.approx(0, abs=0.06)
        assert final[f"net.{part}.log_std"].exp().item() == pytest.approx(STD, abs=0.06)


# three targets -------------------------------------------------------------------------------------------------------


def outputs(process: Process, kind: Kind, steps: int, *, method: Any = TraFlow, **how: Any) -> dict[str, float]:
    teacher = how.pop("teacher", None) or teacher_of(process, kind)
    config = resolve("traflow").config({"top": top(kind), "steps": steps, **how.pop("settings", {})})
    one = method(Cast(teacher, student=student_of(process, kind, **how)), config)
    return {name: float(value) for name, value in one.loss("student", batch_of(x=data_of())).items()}


@every_kind
@every_process
def test_the_targets_of_traflow_are_met_at_the_true_flow_map_only(process: Process, kind: Kind) -> None:
    right = outputs(process, kind, 24)
    assert right["mean_velocity"] < 1e-9
    assert right["output"] < 1e-4
    for wrong in ({"shift": TRUTH + OFF}, {"std": 1.2 * STD}):
        assert all(value > 2e-3 for value in outputs(process, kind, 24, **wrong).values())


def test_the_output_alone_says_whose_jumps_they_are() -> None:
    """Where no row stands still, a flow map of other data agrees with itself."""
    found = outputs(RF(), "flow", 24, settings={"diagonal": 0.0}, shift=TRUTH + 0.5)
    assert found["mean_velocity"] < 1e-9
    assert found["output"] > 0.05


def test_the_output_with_the_other_guidance_convention_fails_the_oracle() -> None:
    assert outputs(RF(), "flow", 24, teacher=other_guidance(RF(), "flow"))["output"] > 0.05


class Upwards(TraFlow):
    """The teacher's path leads to more noise, of which half is then taken for its output."""

    def output(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return super().output(x + t.reshape(-1, 1, 1, 1) * self.tutor.velocity(x, t, cond), t, cond)


def test_an_output_at_the_wrong_end_fails_the_oracle() -> None:
    assert outputs(RF(), "flow", 24, method=Upwards)["output"] > 0.05


def test_what_is_left_of_the_output_is_the_error_of_the_teachers_steps() -> None:
    """The last of them is of first order, once: its error falls with the square of the steps, and is squared here."""
    coarse, fine = (outputs(RF(), "flow", steps, settings={"power": 0.0})["output"] for steps in (8, 16))
    assert fine < coarse / 10


def test_the_output_in_numbers() -> None:
    """Student 3, teacher 1, whatever they are asked: the velocities to 0 are (x - 3) / t and (x - 1) / t."""
    student, teacher = Denoiser(Constant(3.0), RF(), "x0", inputs={"s"}), Denoiser(Constant(1.0), RF(), "x0")
    method = method_of("traflow", student, teacher, power=0.0, first_share=1.0, output=0.5)
    assert float(method.loss("student", batch_of(x=data_of()))["output"]) == pytest.approx(0.5 * 4)


# numbers -------------------------------------------------------------------------------------------------------------


class Constant(torch.nn.Module):
    """A network that predicts one picture whatever it sees."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        return self.value + 0 * x


T, S = 0.8, 0.2


def error_of(name: str, **settings: Any) -> tuple[float, float]:
    """The error at (T, S) of the student 3 with the teacher 1, in rectified flow, and its derivative by that 3.

    There u = (x - 3) / t, v = (x - 1) / t, and du/dt along a direction d is d / t - u / t.
    """
    student = Denoiser(Constant(3.0), RF(), "x0", inputs={"s"})
    method = method_of(name, student, Denoiser(Constant(1.0), RF(), "x0"), **settings)
    x = batch_of(1).noise
    t, s = (torch.tensor([value], dtype=torch.float64) for value in (T, S))
    with method.cast.only("student"):
        error = method.error(x, t, s, None, batch_of(1))
        error.mean().backward()
    assert isinstance(student.net, Constant)
    assert student.net.value.grad is not None
    torch.testing.assert_close(error, error.mean().expand_as(error))
    return error.mean().item(), student.net.value.grad.item()


def test_the_identities_in_numbers() -> None:
    """u - v = -2/t; along v du/dt = 2/t^2, along the student's own u it is 0. Only esd follows it with its gradient."""
    identity = -2 / T + (T - S) * 2 / T**2
    assert error_of("mean_flow") == pytest.approx((identity, -1 / T))
    assert error_of("ayf") == pytest.approx((identity, -1 / T))
    assert error_of("esd") == pytest.approx((identity, -1 / T + (T - S) / T**2))
    assert error_of("imean_flow") == pytest.approx((-2 / T, -1 / T))
    for name in ("psd", "shortcut"):  # a network of one end is consistent
        assert error_of(name) == pytest.approx((0, -1 / T), abs=1e-12)


def test_the_jumps_of_twin_flow_in_numbers() -> None:
    """A step d on v and two jumps from there on, over d; the value is cut at the limit, the gradient is not."""
    d = 0.01
    right = -2 / T + 2 * (T - d - S) / (T * (T - d))
    assert error_of("twin_flow", limit=10.0) == pytest.approx((right, -1 / T))
    assert error_of("twin_flow", limit=0.5) == pytest.approx((-0.5, -1 / T))


def test_the_warm_up_of_ayf_begins_with_the_velocity() -> None:
    assert error_of("ayf", warmup=4) == pytest.approx((-2 / T, -1 / T))
    method = method_of("ayf", student_of(RF(), "flow"), warmup=4)
    shares = [method.curriculum["tangent"]]
    for iteration in range(5):
        method.after(iteration)
        shares.append(method.curriculum["tangent"])
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("name", DERIVED)
def test_differences_agree_with_the_exact_derivative(name: str) -> None:
    student = student_of(RF(), "flow", shift=TRUTH + 0.5, std=0.8)
    exact, near = (method_of(name, student, difference=step) for step in (0, 1e-4))
    t, s = (torch.linspace(low, high, 16, dtype=torch.float64) for low, high in ((0.3, 1.0), (0.1, 0.9)))
    x, cond = batch_of(16).noise, torch.full((16,), MEAN, dtype=torch.float64)
    right = exact.error(x, t, s, cond, batch_of(16))
    gap = (near.error(x, t, s, cond, batch_of(16)) - right).norm() / right.norm()
    assert 0 < gap < 1e-3


@pytest.mark.parametrize(("power", "weight"), [(0.0, 1.0), (0.5, 1 / 2.5), (1.0, 1 / 6.25)])
def test_rows_are_weighted_by_a_power_of_their_own_error(power: float, weight: float) -> None:
    error = torch.full((3, *SHAPE), 2.0, requires_grad=True)
    loss = weighted(error, power, 2.25)
    assert loss.item() == pytest.approx(4 * weight)
    loss.backward()
    assert error.grad is not None
    assert error.grad.sum().item() == pytest.approx(4 * weight)  # of 2 error x weight: the weight has no gradient


class Listening(GaussianNet):
    """Remembers what it was asked."""

    asked: list[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        self.asked.append((t, s))
        return super().forward(x, t, cond, s, w)


def asked_of(name: str, **settings: Any) -> list[tuple[Tensor, Tensor]]:
    net = Listening(RF(), "flow", TRUTH)
    net.asked = []
    method = method_of(name, Denoiser(net, RF(), "flow", inputs={"s"}), **settings)
    method.loss("student", batch_of(x=data_of()))
    return net.asked


@every_name
@pytest.mark.parametrize("diagonal", [0.0, 0.25, 1 - 1e-9])
def test_the_share_of_the_diagonal_is_exact_and_leaves_a_jump(name: str, diagonal: float) -> None:
    same, *jumps = asked_of(name, diagonal=diagonal)
    assert len(same[0]) == min(round(64 * diagonal), 63)
    assert torch.equal(*same)
    assert len(jumps[-1][0]) == 64 - len(same[0])


def test_jumps_of_shortcuts_are_dyadic_and_those_of_others_start_at_noise_as_often_as_asked() -> None:
    method = method_of("shortcut", student_of(RF(), "flow"), halvings=3, first_share=0.25)
    assert isinstance(method, Shortcut)
    t, s = method.levels(batch_of(512))
    parts = 1 / (t - s)
    assert set(parts.tolist()) == {1.0, 2.0, 4.0, 8.0}
    assert torch.equal((t * parts).round(), t * parts)
    for name in NAMES:
        started: MeanVelocity = method_of(name, student_of(RF(), "flow"), first_share=0.5)
        t, s = started.levels(batch_of(512))
        assert bool((s < t).all())
        assert bool((s >= 0).all())
        assert float((t == 1).double().mean()) > 0.4


def test_the_target_of_shortcuts_is_a_moving_average_of_the_student() -> None:
    student, target = student_of(RF(), "flow", shift=1.0), student_of(RF(), "flow", shift=0.0)
    preset = resolve("shortcut")
    cast = Cast(teacher_of(RF(), "flow"), student=student, target=target)
    method = preset.method(cast, preset.config({"keep": 0.75}))
    method.after(0)
    assert cast.weights("target")["net.shift"].item() == pytest.approx(0.25)
    assert preset.method.roles(preset.config({}))["target"].train == "frozen"


def test_the_middle_parts_a_jump_in_two_halves() -> None:
    (_, _), (_, _), (first, between), (_, end) = asked_of("psd", diagonal=0.0, midpoint=True)
    torch.testing.assert_close(between, (first + end) / 2)


def test_a_network_that_does_not_read_the_second_time_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="reads s"):
        method_of("mean_flow", student_of(RF(), "flow", reads_s=False))
