"""Consistency distillation at a truth that is known: neighbours on the exact path end in one point."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows, TensorSource, make_batch
from distill_jobs.methods import consistency
from distill_jobs.methods.base import Method, resolve
from distill_jobs.methods.consistency import Consistency, Invertible, Segments, SubPath
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process, over
from tests.unit.distill_jobs.closed_form import (
    GUIDED_MEAN,
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
    RUNGS,
    TRUTH,
    every_kind,
    every_process,
    other_guidance,
    top,
    trajectory_loss,
)
from tests.unit.distill_jobs.tiny import TinyNet

TO_ZERO = {"cd", "lcm", "scott", "slam"}  # what a network without s can answer for every t at once
NAMES = tuple(consistency.PRESETS)
every_name = pytest.mark.parametrize("name", NAMES)
PCM = {"substeps": 8, "keep": None}


def loss(name: str, process: Process, kind: Kind, substeps: int = 8, **how: Any) -> float:
    """Without churn, whose steps leave the path. `slam` stands on a step's chord, so its steps are parted in rungs."""
    parts = {"substeps": 1, "skip": 20 // substeps} if name == "slam" else {"substeps": substeps}
    grids = {4: tuple(top(kind) * u for u in RUNGS)}
    settings = {"top": top(kind), "churn": 0.0, "grids": grids, **parts}
    return trajectory_loss(name, process, kind, settings=settings, reads_s=name not in TO_ZERO, seeds=1, **how)


@every_kind
@every_process
@every_name
def test_neighbours_agree_at_the_true_flow_map_only(name: str, process: Process, kind: Kind) -> None:
    beside = 1e-6 if name == "cd" else 5e-4  # cd's distance is a square
    right = loss(name, process, kind)
    assert right < 5e-3 * beside
    assert loss(name, process, kind, substeps=1, shift=TRUTH + OFF) > beside
    assert loss(name, process, kind, substeps=1, std=1.2 * STD) > beside


@every_process
@every_name
def test_what_is_left_at_the_truth_is_the_error_of_the_teachers_step(name: str, process: Process) -> None:
    """Half the step, half the error of a DDIM path, and the distance of small errors is quadratic; Heun's is less
    than that, down to where its last evaluation is kept off zero noise."""
    coarse, fine = (loss(name, process, "flow", substeps=n) for n in (1, 2))
    assert fine < coarse / 3.5


# mutants -------------------------------------------------------------------------------------------------------------


@every_name
def test_the_other_guidance_convention_fails_the_oracle(name: str) -> None:
    assert loss(name, RF(), "flow", teacher=other_guidance(RF(), "flow")) > 500 * loss(name, RF(), "flow")


def backwards(method: type[Method]) -> type[Method]:
    """The teacher's step leads to more noise."""

    class Backwards(method):  # type: ignore[misc, valid-type]
        def neighbour(self, batch: Batch, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
            return super().neighbour(batch, x, t, (2 * t - near).clamp(max=0.999 * self.process.t_max))

    return Backwards


@every_name
def test_a_teacher_that_steps_backwards_fails_the_oracle(name: str) -> None:
    assert loss(name, RF(), "flow", method=backwards(resolve(name).method)) > 500 * loss(name, RF(), "flow")


# ends ----------------------------------------------------------------------------------------------------------------


class PhaseNet(GaussianNet):
    """The flow map to the edge of each phase, by a network that is told t alone."""

    def __init__(self, process: Process, kind: Kind, levels: tuple[float, ...], **data: float) -> None:
        super().__init__(process, kind, **data)
        self.edges = torch.tensor(times.grid(process, levels), dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Tensor | None, w: Tensor | None) -> Tensor:
        return super().forward(x, t, cond, self.process.network_time(self.edge(self._own(t))), w)

    def edge(self, t: Tensor) -> Tensor:
        return torch.where(self.edges < t[:, None] * (1 - 1e-6), self.edges, 0).amax(dim=1)


def phased_loss(name: str, process: Process, kind: Kind, *, method: Any = None, phases: int, **data: float) -> float:
    data = {"shift": TRUTH, **data}
    players = {
        role: Denoiser(PhaseNet(process, kind, times.uniform(phases), **data), process, kind)
        for role in ("student", "target")
    }
    preset = resolve(name)
    cast = Cast(teacher_of(process, kind), **players)
    one = (method or preset.method)(cast, preset.config({"top": top(kind), "substeps": 8}))
    return float(one.loss("student", batch_of(x=data_of()))["consistency"])


@every_kind
@every_process
@pytest.mark.parametrize(("name", "phases"), [("pcm", 4), ("hyper_sd", 8)])
def test_a_network_without_s_learns_its_phases(name: str, phases: int, process: Process, kind: Kind) -> None:
    assert phased_loss(name, process, kind, phases=phases) < 3e-6
    assert phased_loss(name, process, kind, phases=phases, shift=TRUTH + OFF) > 5e-4
    assert phased_loss(name, process, kind, phases=phases, std=1.2 * STD) > 5e-4


class ToZero(Consistency):
    """The edges are forgotten."""

    def ends(self, batch: Batch, u: Tensor, r: Tensor) -> Tensor:
        return torch.zeros_like(u)


def test_phases_without_edges_fail_the_oracle() -> None:
    assert phased_loss("pcm", RF(), "flow", method=ToZero, phases=4) > 1e-3


def method_of(name: str, process: Process | None = None, **settings: Any) -> Any:
    process, preset = process or RF(), resolve(name)
    student, target = (student_of(process, "flow", reads_s=False) for _ in range(2))
    return preset.method(Cast(teacher_of(process, "flow"), student=student, target=target), preset.config(settings))


def ends_of(one: Any, level: float, rows: int = 256) -> set[float]:
    u = torch.full((rows,), level)
    return {round(float(end), 5) for end in one.ends(batch_of(rows), u, u)}


def test_a_student_is_trained_to_jump_where_its_sampler_will() -> None:
    assert ends_of(method_of("cd"), 0.3) == {0.0}
    assert ends_of(method_of("lcm", eta=0.6, counts=(4,)), 0.3) == {0.1}
    assert ends_of(method_of("pcm"), 0.3) == {0.25}
    assert ends_of(method_of("pcm"), 0.25) == {0.0}
    assert ends_of(method_of("pcm"), 1.0) == {0.75}
    assert ends_of(method_of("pcm", grids={4: (1.0, 0.9, 0.5, 0.1)}), 0.3) == {0.1}
    assert ends_of(method_of("pcm", PROCESSES["edm"]), 0.3) == {round(0.25 / 0.75, 5)}


def test_tdd_aims_at_the_rungs_of_all_its_counts_and_a_little_below() -> None:
    rungs = {round(end, 5) for end in (1 / 4, 1 / 5, 1 / 6, 2 / 7)}  # of 4 and 8, 5, 6 and 7 steps
    assert ends_of(method_of("tdd", spread=False, eta=0.0), 0.3) == rungs
    drawn = ends_of(method_of("tdd"), 0.3, 4096)
    assert all(any(0.8 * rung - 1e-5 <= end <= rung + 1e-5 for rung in rungs) for end in drawn)
    assert min(drawn) == pytest.approx(0.8 / 6, abs=2e-3)
    assert max(drawn) == pytest.approx(2 / 7, abs=2e-3)


def test_segments_merge_in_pairs_until_one_is_left() -> None:
    one = method_of("hyper_sd", phase_every=10)
    seen = []
    for iteration in range(50):
        one.after(iteration)
        if iteration % 10 == 5:
            seen.append((one.segments, one.schedules[4].eta, len(ends_of(one, 0.99) | ends_of(one, 0.1))))
    assert seen == [(8, 0.0, 2), (4, 0.0, 2), (2, 0.0, 2), (1, 1.0, 1), (1, 1.0, 1)]
    assert one.curriculum == {"phase": 5}
    assert isinstance(one, Segments)


# neighbours ----------------------------------------------------------------------------------------------------------


def test_neighbours_are_rungs_and_the_last_is_clean() -> None:
    u, r = consistency.rungs(torch.tensor([0.0, 0.001, 0.03, 0.99, 1.0]), count=40, skip=2, top=0.8)
    torch.testing.assert_close(u, 0.8 * torch.tensor([1, 1, 2, 40, 40]) / 40)
    torch.testing.assert_close(r, 0.8 * torch.tensor([0, 0, 0, 38, 38]) / 40)


def churned(
    process: Process, method: type[Method] = Consistency, churn: float = 1.0, substeps: int = 24
) -> tuple[float, float]:
    """(mean, deviation) of the teacher's stochastic path from noise level .9 to .3, over those of the marginal."""
    rows, preset = 1024, resolve("scott")
    cast = Cast(teacher_of(process, "flow"), student=student_of(process, "flow"), target=student_of(process, "flow"))
    one: Any = method(cast, preset.config({"churn": churn, "substeps": substeps}))
    t, s = (times.on(process, torch.full((rows,), level, dtype=torch.float64)) for level in (0.9, 0.3))
    batch = batch_of(rows)
    there = one.neighbour(batch, process.mix(data_of(rows), batch.noise, t), t, s)
    alpha, sigma = float(process.alpha(s)[0]), float(process.sigma(s)[0])
    return float(there.mean()) / (alpha * GUIDED_MEAN), float(there.std()) / (alpha**2 * STD**2 + sigma**2) ** 0.5


@every_process
@pytest.mark.parametrize("churn", [0.5, 1.0])
def test_stochastic_steps_keep_the_distribution_of_the_path(process: Process, churn: float) -> None:
    """What they lose of the deviation halves with the step, so twice the finer less the coarser is the limit."""
    (_, coarse), (mean, fine) = (churned(process, churn=churn, substeps=n) for n in (12, 24))
    assert mean == pytest.approx(1, abs=0.01)
    assert coarse < fine < 1
    assert 2 * fine - coarse == pytest.approx(1, abs=0.015)


class MoreNoise(Consistency):
    """The variance of the old noise is not given up."""

    def _ddim(self, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        x0, eps = self.cast.teacher(x, t, batch.cond)
        old = s * (1 - t) / ((1 - s) * t)  # of rectified flow
        return self.process.mix(x0, eps + over((1 - old.square()).sqrt(), x) * batch.randn(), s)


def test_stochastic_steps_with_more_noise_fail_the_oracle() -> None:
    assert churned(RF(), MoreNoise)[1] > 1.2


def test_all_the_noise_is_renewed_from_pure_noise_at_full_churn() -> None:
    """One ancestral step from t = 1 forgets x_t: the rest is x0 with fresh noise."""
    one = method_of("scott", churn=1.0, substeps=1)
    t = torch.ones(64, dtype=torch.float64)
    x0, _ = one.cast.teacher(batch_of().noise, t, batch_of().cond)
    there = one.neighbour(batch_of(), batch_of().noise, t, 0.5 * t)
    torch.testing.assert_close(there, 0.5 * x0 + 0.5 * batch_of().randn())


def pull(name: str, process: Process, shift: float, **settings: Any) -> float:
    """d loss / d mean of the student, over noise and its mirror image."""
    preset = resolve(name)
    players = {role: student_of(process, "flow", shift=shift, reads_s=False) for role in ("student", "target")}
    one = preset.method(Cast(teacher_of(process, "flow"), **players), preset.config(settings))
    with one.cast.only("student") as student:
        for seed in range(4):
            one.loss("student", batch_of(256, seed, x=data_of(256)))["consistency"].backward()
    return float(student.net.shift.grad)


@every_process
def test_scott_is_at_rest_at_the_true_mean_and_points_back_to_it(process: Process) -> None:
    above, at, under = (pull("scott", process, shift) for shift in (TRUTH + 0.5, TRUTH, TRUTH - 0.5))
    assert above > 0.02
    assert under < -0.02
    assert abs(at) < 0.1 * min(above, -under)


# the right side ------------------------------------------------------------------------------------------------------


def test_the_target_follows_the_student() -> None:
    one = method_of("cd", keep=0.75)
    with torch.no_grad():
        one.cast.student.net.shift.fill_(1.0)
        one.cast["target"].net.shift.fill_(0.0)
    one.after(0)
    assert float(one.cast["target"].net.shift) == pytest.approx(0.25)
    one.after(1)
    assert float(one.cast["target"].net.shift) == pytest.approx(0.4375)


def test_without_an_average_both_sides_are_the_student_under_one_dropout() -> None:
    preset = resolve("lcm")
    student = Denoiser(TinyNet(1, dropout=0.5), RF(), "flow")
    one: Any = preset.method(Cast(student, student=student), preset.config({"keep": None}))
    assert list(preset.method.roles(one.config)) == ["student"]
    x, t = torch.randn(64, 2, 2, 2), torch.full((64,), 0.5)
    zero, cond = torch.zeros(64), torch.zeros(1)
    with one.cast.only("student"):
        right = one.target(x, t, zero, cond)
        left = student.jump(x, t, zero, cond)
        other = student.jump(x, t, zero, cond)
    assert torch.equal(left, right)
    assert not torch.equal(left, other)
    assert left.requires_grad
    assert not right.requires_grad


def test_a_point_at_the_end_stays() -> None:
    one = method_of("cd")
    x = batch_of().noise
    t = torch.tensor([0.0, 0.5], dtype=torch.float64).repeat(32)
    there = one.target(x, t, torch.zeros_like(t), batch_of().cond)
    assert torch.equal(there[::2], x[::2])
    assert not torch.isclose(there[1::2], x[1::2]).all()


def test_the_distances_are_the_papers() -> None:
    """Squared: w e^2; pseudo-Huber over rows of d elements: w (sqrt(|e|^2 + c^2) - c) / sqrt(d), c = smooth sqrt(d)."""
    error = torch.tensor([3.0, 0.3]).reshape(2, 1, 1, 1).expand(2, *batch_of().noise.shape[1:])
    weight, d = torch.tensor([2.0, 1.0]), error[0].numel()
    assert float(method_of("cd").distance(error, weight)) == pytest.approx((2 * 9 + 0.09) / 2)
    c = 0.4 * d**0.5
    rows = [w * ((e**2 * d + c**2) ** 0.5 - c) / d**0.5 for w, e in ((2, 3.0), (1, 0.3))]
    assert float(method_of("lcm", smooth=0.4).distance(error, weight)) == pytest.approx(sum(rows) / 2)


def test_the_presets_are_the_papers() -> None:
    cd, lcm, pcm = (resolve(name).config({}) for name in ("cd", "lcm", "pcm"))
    assert (cd.rungs, cd.skip, cd.solver, cd.smooth, cd.keep, cd.eta) == (40, 1, "heun", None, 0.95, 1.0)
    assert (lcm.rungs, lcm.skip, lcm.solver, lcm.smooth, lcm.keep, lcm.eta) == (1000, 20, "ddim", 1e-3, 0.95, 1.0)
    assert (pcm.counts, pcm.eta) == ((4,), 0.0)


# sub-paths -----------------------------------------------------------------------------------------------------------


class Share:
    """A batch that draws one share for all rows."""

    def __init__(self, share: float) -> None:
        self.share = share

    def draw(self, times: Any) -> Tensor:
        return torch.full((64,), self.share, dtype=torch.float64)


def asked(process: Process, share: float) -> tuple[Tensor, ...]:
    """(x, t, there, near) of one step of the teacher, and (point, time) that slam asks about at this share of it."""
    one = method_of("slam", process)
    t, near = (times.on(process, torch.full((64,), level, dtype=torch.float64)) for level in (0.6, 0.4))
    x = process.mix(data_of(), batch_of().noise, t)
    there = one.neighbour(batch_of(), x, t, near)
    return x, t, there, near, *one.asked(Share(share), x, t, there, near)


@every_process
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_slam_asks_about_the_papers_point_between(process: Process, share: float) -> None:
    """alpha_t / alpha_u x_u = (1 - gamma) alpha_t / alpha_s x_s + gamma x_t, with gamma the share of sigma / alpha."""
    x, t, there, near, point, between = asked(process, share)
    torch.testing.assert_close(times.level_of(process, between), torch.full_like(t, 0.4 + 0.2 * share))
    alpha, ratio = process.alpha, {at: process.sigma(at) / process.alpha(at) for at in (t, near, between)}
    gamma = float(((ratio[between] - ratio[near]) / (ratio[t] - ratio[near]))[0])
    a, b, c = (float(alpha(at)[0]) for at in (t, near, between))
    torch.testing.assert_close(a / c * point, (1 - gamma) * a / b * there + gamma * x)


@every_process
def test_slam_at_the_far_end_of_the_step_is_lcm(process: Process) -> None:
    x, t, _, _, point, between = asked(process, 1.0)
    torch.testing.assert_close(point, x)
    torch.testing.assert_close(between, t)


def test_in_a_rectified_flow_the_point_is_the_plain_mixture() -> None:
    x, _, there, _, point, between = asked(RF(), 0.25)
    torch.testing.assert_close(point, 0.75 * there + 0.25 * x)
    torch.testing.assert_close(between, torch.full_like(between, 0.45))


class Turned(SubPath):
    """The share is counted from the other end, of the state alone."""

    def asked(self, batch: Batch, x: Tensor, t: Tensor, there: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        point, between = super().asked(batch, x, t, there, near)
        return x + there - point, between


def test_a_point_at_another_time_fails_the_oracle() -> None:
    assert loss("slam", RF(), "flow", method=Turned) > 100 * loss("slam", RF(), "flow")


# there and back ------------------------------------------------------------------------------------------------------


def both_ways(
    process: Process,
    kind: Kind,
    *,
    substeps: int = 8,
    teacher: Any = None,
    method: Any = Invertible,
    decoder: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
    **encoder: float,
) -> dict[str, dict[str, float]]:
    """The terms of both roles of `icd`, for exact flow maps that read s."""
    counts = (settings or {}).get("counts", (4,))
    grids = {k: tuple(top(kind) * u for u in times.uniform(k)) for k in counts}
    told = {"top": top(kind), "substeps": substeps, "grids": grids, "preserve": 1.0, **(settings or {})}
    config = resolve("icd").config(told)
    players = {"student": student_of(process, kind, **(decoder or {})), "encoder": student_of(process, kind, **encoder)}
    one = method(Cast(teacher or teacher_of(process, kind), **players), config)
    found = {role: one.loss(role, batch_of(x=data_of())) for role in ("encoder", "student")}
    return {role: {name: float(value) for name, value in terms.items()} for role, terms in found.items()}


@every_kind
@every_process
def test_the_encoder_is_at_the_truth_where_the_path_leads_up(process: Process, kind: Kind) -> None:
    right = both_ways(process, kind)["encoder"]
    assert right["consistency"] < 3e-6
    assert right["preservation"] < 1e-9
    for wrong in ({"shift": TRUTH + OFF}, {"std": 1.2 * STD}):
        assert both_ways(process, kind, substeps=1, **wrong)["encoder"]["consistency"] > 3e-5
        assert all(terms["preservation"] > 1e-3 for terms in both_ways(process, kind, **wrong).values())


class UpperNet(PhaseNet):
    """The flow map to the upper edge of each phase, by a network that is told t alone."""

    def edge(self, t: Tensor) -> Tensor:
        beyond = self.edges > t[:, None] * (1 - 1e-6)
        return torch.where(beyond, self.edges, self.edges[0]).amin(dim=1)


def test_the_encoders_consistency_is_its_own_affair() -> None:
    alone, beside = (both_ways(RF(), "flow", decoder={"shift": shift}) for shift in (TRUTH, TRUTH + 1))
    assert alone["encoder"]["consistency"] == beside["encoder"]["consistency"]
    assert alone["encoder"]["preservation"] < 1e-9 < beside["encoder"]["preservation"]


@every_process
def test_networks_without_s_learn_their_phases_both_ways(process: Process) -> None:
    """The line of the student's last phase ends in clean data; where encoding starts it is a little off the path."""

    def terms(**data: float) -> list[float]:
        nets = {"student": PhaseNet, "encoder": UpperNet}
        net = {role: one(process, "flow", times.uniform(4), shift=TRUTH, **data) for role, one in nets.items()}
        players = {role: Denoiser(one, process, "flow") for role, one in net.items()}
        one = Invertible(Cast(teacher_of(process, "flow"), **players), resolve("icd").config({"substeps": 8}))
        found = (one.loss(role, batch_of(x=data_of())) for role in players)
        return [float(value) for each in found for value in each.values()]

    assert max(terms()) < 2e-4
    assert min(terms(std=1.2 * STD)) > 2e-4


def test_an_encoder_of_the_other_guidance_convention_fails_the_oracle() -> None:
    assert both_ways(RF(), "flow", teacher=other_guidance(RF(), "flow"))["encoder"]["consistency"] > 1e-3


class Downwards(Invertible):
    """The neighbour of the encoder's point lies below it."""

    def neighbour(self, batch: Batch, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
        return super().neighbour(batch, x, t, (2 * t - near).clamp_min(1e-3))


def test_an_encoder_whose_neighbour_lies_below_fails_the_oracle() -> None:
    assert both_ways(RF(), "flow", method=Downwards)["encoder"]["consistency"] > 1e-3


def test_what_is_not_brought_back_is_the_difference_of_the_means() -> None:
    """One phase of a rectified flow, from .02 to 1, and means that differ by d: the student is off by .98 d, and the
    encoder by as much over the deviation at .02."""
    smooth, d = 1e-3, 0.3
    found = both_ways(RF(), "flow", decoder={"shift": TRUTH + d}, settings={"counts": (1,)})
    for role, off in (("student", 0.98 * d), ("encoder", 0.98 * d / (0.98**2 * STD**2 + 0.02**2) ** 0.5)):
        assert found[role]["preservation"] == pytest.approx((off**2 + smooth**2) ** 0.5 - smooth)


def test_without_preservation_the_students_loss_is_that_of_pcm() -> None:
    off: dict[str, Any] = {"shift": TRUTH + 0.3}
    ours = both_ways(RF(), "flow", decoder=off, settings={"preserve": 0.0})["student"]
    assert ours == {"consistency": pytest.approx(trajectory_loss("pcm", RF(), "flow", settings=PCM, seeds=1, **off))}
    assert both_ways(RF(), "flow", decoder=off)["student"].keys() == {"consistency", "preservation"}


def test_dynamic_guidance_leaves_the_noisy_levels_unguided() -> None:
    students = {role: student_of(RF(), "flow") for role in ("student", "encoder")}
    teacher = teacher_of(RF(), "flow")
    one = Invertible(Cast(teacher, **students), resolve("icd").config({"guidance_interval": (0.0, 0.7)}))
    batch = batch_of()
    for level, right in ((0.6, teacher), (0.8, teacher.denoiser)):
        t = torch.full((64,), level, dtype=torch.float64)
        line = right(batch.noise, t, batch.cond)
        torch.testing.assert_close(one.neighbour(batch, batch.noise, t, t + 0.1), RF().mix(*line, t + 0.1))


def test_encoding_must_start_in_the_last_phase() -> None:
    with pytest.raises(InvalidRequest, match=r"first must be below the last rung .* not 0\.02 with 64 steps"):
        resolve("icd").config({"counts": (4, 64)})


def test_encoder_and_decoder_learn_the_teachers_path_both_ways() -> None:
    teacher = Denoiser(GaussianNet(RF(), "flow").float(), RF(), "flow")
    student = Denoiser(GaussianNet(RF(), "flow", shift=0.8, std=1.0).float(), RF(), "flow", inputs={"s"})
    settings = {"lr": 2e-2, "batch": 64, "skip": 50, "substeps": 2, "smooth": 0.1}
    run = StageRun(0, Stage("icd", 150, settings), teacher, student, ema=(0.9,))
    x = 1 + STD * torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(2))
    source = TensorSource(torch.ones(256), SHAPE, x=x)
    while not run.done:
        run.iterate(source)
    for learnt in (run.averages[0].weights, run.cast.weights("encoder")):
        assert learnt["net.shift"].item() == pytest.approx(0, abs=0.06)
        assert learnt["net.log_std"].exp().item() == pytest.approx(STD, abs=0.05)


# learning ------------------------------------------------------------------------------------------------------------


@every_process
@every_name
def test_half_precision_gives_finite_gradients_to_the_ends_of_time(name: str, process: Process) -> None:
    preset = resolve(name)
    teacher, student, other = (Denoiser(TinyNet(seed), process, "flow") for seed in range(3))
    config = preset.config({"first_share": 0.3})
    others = {role: other for role in preset.method.roles(config) if role != "student"}
    one = preset.method(Cast(teacher, student=student, **others), config)
    batch = make_batch(Rows(cond=torch.ones(256), x=torch.randn(256, 2, 2, 2)), (2, 2, 2), seed=0)
    with one.cast.only("student"), torch.autocast("cpu", dtype=torch.bfloat16):
        sum(one.loss("student", batch).values()).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in student.parameters())


@pytest.mark.parametrize(("name", "substeps"), [("cd", 2), ("lcm", 4)])
def test_distillation_reaches_the_mean_and_deviation_of_the_teacher(name: str, substeps: int) -> None:
    def net(**data: Any) -> GaussianNet:
        return GaussianNet(RF(), "flow", **data).float()

    teacher = Denoiser(net(), RF(), "flow")
    student = Denoiser(net(shift=0.8, std=1.0, endpoint=True), RF(), "flow")
    settings = {"lr": 5e-2, "rungs": 8, "skip": 1, "keep": 0.5, "substeps": substeps}
    run = StageRun(0, Stage(name, 120, settings), teacher, student, ema=(0.9,))
    source = TensorSource(torch.ones(256), SHAPE, x=data_of(256, mean=1.0).float())
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert final["net.shift"].item() == pytest.approx(0, abs=0.02)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.04)
