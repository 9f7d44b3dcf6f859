"""What the methods promise around their mathematics: settings, schemas, gradients by role, and that students learn."""

from typing import Any

import pytest
import torch

from distill_jobs.batches import Rows, TensorSource, make_batch
from distill_jobs.methods import __main__ as generator
from distill_jobs.methods import _schemas
from distill_jobs.methods.base import Workspace, presets, resolve
from distill_jobs.methods.kd import KD
from distill_jobs.methods.score_matching import GRIDS
from distill_jobs.pairs import TeacherPath, collect
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import BaseDenoiser, Denoiser
from engines.errors import InvalidRequest, UnknownPlugin
from engines.process import RF
from engines.solvers import sample, trajectory
from tests.unit.distill_jobs.closed_form import SHAPE, STD, GaussianNet, exact_pairs, teacher_of
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher

# settings and schemas ------------------------------------------------------------------------------------------------


def test_the_generated_schemas_are_up_to_date() -> None:
    assert generator.PATH.read_text() == generator.generated(), "run python -m distill_jobs.methods"
    assert generator.TERMS_PATH.read_text() == generator.generated_terms(), "run python -m distill_jobs.methods"


@pytest.mark.parametrize("name", presets())
def test_a_method_says_what_it_is_and_where_it_is_from(name: str) -> None:
    preset = presets()[name]
    assert preset.description.endswith(".")
    assert preset.paper


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    for ask in (resolve, lambda name: _schemas.check(name, {})):
        with pytest.raises(UnknownPlugin, match=r"'dmd3' does not exist: choose from .*dmd, .*kd"):
            ask("dmd3")


BAD: list[tuple[str, dict[str, Any]]] = [
    ("sid", {"lr": 0}),
    ("sid", {"alhpa": 1.0}),
    ("dmd", {"alpha": 1.0}),
    ("kd", {"counts": []}),
    ("kd", {"counts": ["many"]}),
    ("kd", {"batch": 1.5}),
    ("kd", {"train": "half"}),
    ("dmd", {"fake_updates": 0}),
    ("dmd", {"eta": 1.5}),
    ("lsd", {"delta": 1.0}),
    ("optimal_steps", {"solvers": 4}),
    ("optimal_steps", {"solvers": ["linear"]}),
    ("reflow", {"teacher_solver": "rk45"}),
    ("boot", {"counts": [2]}),
    ("sid", {"counts": [0]}),
    ("sid", {"grids": {"2": ["one"]}}),
]


@pytest.mark.parametrize(("name", "settings"), BAD)
def test_bad_settings_are_refused_by_name_with_and_without_torch(name: str, settings: dict[str, Any]) -> None:
    (key,) = settings
    for refuse in (lambda: _schemas.check(name, settings), lambda: resolve(name).config(settings)):
        with pytest.raises(InvalidRequest, match=f"method setting {key}") as caught:
            refuse()
        assert (caught.value.param or "").startswith(f"method.{key}")


@pytest.mark.parametrize("name", presets())
def test_the_defaults_pass_their_own_check(name: str) -> None:
    _schemas.check(name, _schemas.schemas()[name]["defaults"])
    resolve(name).config(_schemas.schemas()[name]["defaults"])


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 1.0), (0.5, 0.8), (1.2, 0.5), (1.0, 0.0)])
def test_a_grid_must_fall_within_its_count(levels: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequest, match="falling levels"):
        resolve("sid").config({"grids": {2: levels}})


def test_a_grid_for_a_count_that_the_student_is_not_made_for_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"grids\[3\] is of no use: the student's step counts are \[1, 2\]"):
        resolve("sid").config({"counts": [1, 2], "grids": {3: (1.0, 0.6, 0.3)}})


def test_own_rows_need_a_student_of_several_steps() -> None:
    with pytest.raises(InvalidRequest, match="own_share needs a count of at least 2"):
        resolve("kd").config({"counts": (1,), "own_share": 0.25})


def test_the_presets_have_the_prototypes_settings() -> None:
    kd, sid, dmd, lsd = (resolve(name).config({}) for name in ("kd", "sid", "dmd", "lsd"))
    assert (kd.lr, kd.batch, kd.pairs, kd.rungs) == (1e-3, 128, 4992, (1.0, 0.75, 0.5, 0.25))
    assert (kd.beta1, kd.beta2, kd.first_share, kd.teacher_steps) == (0.9, 0.99, 0.5, 16)
    assert (sid.lr, sid.fake_lr, sid.batch, sid.fake_updates, sid.alpha) == (3e-4, 1e-3, 32, 5, 1.0)
    assert (sid.beta1, sid.beta2, sid.tau_min, sid.tau_max) == (0.0, 0.99, 0.02, 0.98)
    assert (dmd.lr, dmd.fake_lr) == (5e-4, 1e-3)
    assert (lsd.lr, lsd.batch, lsd.delta) == (1e-3, 64, 0.125)


def test_schedules_are_what_training_samples_and_other_counts_get_a_uniform_grid() -> None:
    run = StageRun(0, Stage("sid", 1, {"counts": [1, 3, 4], "eta": 0.0}), tiny_teacher(), tiny_student())
    assert run.schedules[4].times == (*GRIDS[4], 0.0)
    assert run.schedules[3].times == pytest.approx((1, 2 / 3, 1 / 3, 0))
    assert {schedule.eta for schedule in run.schedules.values()} == {0.0}
    assert {schedule.solver for schedule in run.schedules.values()} == {"ddim"}


# gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_each_role_alone_takes_the_gradients_of_its_loss(name: str) -> None:
    run = StageRun(0, Stage(name, 4, STAGES[name]), tiny_teacher(), tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    for role in run.optimisers:
        with run.cast.only(role):
            sum(run.method.loss(role, run.batch(tiny_source(), 0)).values()).backward()
        touched = {
            player for player in run.roles if any(p.grad is not None for p in run.cast.module(player).parameters())
        }
        assert touched == {role}
        assert all(p.grad is None for p in run.cast.teacher.parameters())
        run.cast.module(role).zero_grad(set_to_none=True)


def test_the_critic_leads_by_its_warm_up_and_its_updates() -> None:
    settings = {**STAGES["dmd"], "fake_updates": 3, "fake_warmup": 6}
    run = StageRun(0, Stage("dmd", 9, settings), tiny_teacher(), tiny_student())
    counts = []
    for _ in range(4):
        run.iterate(tiny_source())
        counts.append((run.updates["fake"], run.updates["student"]))
    assert counts == [(3, 0), (6, 0), (9, 1), (12, 2)]


class Answer(Denoiser):
    """A denoiser that answers one x0 whatever it is asked."""

    def __init__(self, value: float) -> None:
        super().__init__(lambda x, *_: x, RF(), "x0")
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x: Any, t: Any, cond: Any = None, s: Any = None, w: Any = None) -> Any:
        return self.value + 0 * x, (x - (1 - t).reshape(-1, 1, 1, 1) * self.value) / t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("rescaled", [1.0, 100.0])
def test_the_dmd_gradient_is_the_disagreement_over_its_scale(rescaled: float) -> None:
    """Critic 3, teacher 1, student 0: (3 - 1) / |0 - 1|, whatever the unit of the data."""
    cast = Cast(Answer(1.0 * rescaled), student=Answer(0.0), fake=Answer(3.0 * rescaled))
    method = resolve("dmd").method(cast, resolve("dmd").config({"counts": (1,)}))
    with cast.only("student") as student:
        batch = make_batch(Rows(cond=torch.zeros(4)), SHAPE, 0)
        method.loss("student", batch)["dmd"].backward()
    assert student.value.grad.item() == pytest.approx(2.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_sid_loss_is_the_papers(alpha: float) -> None:
    """(T - F) ((T - y) - alpha (T - F)) / |y - T| with teacher 1, critic 3, student 0."""
    cast = Cast(Answer(1.0), student=Answer(0.0), fake=Answer(3.0))
    method = resolve("sid").method(cast, resolve("sid").config({"counts": (1,), "alpha": alpha}))
    loss = method.loss("student", make_batch(Rows(cond=torch.zeros(4)), SHAPE, 0))["sid"]
    assert loss.item() == pytest.approx(-2 * (1 + 2 * alpha))


def test_an_updates_randomness_follows_from_seed_stage_and_position_alone() -> None:
    def noise(seed: int, index: int, position: int, ambient: int) -> torch.Tensor:
        torch.manual_seed(ambient)
        run = StageRun(index, Stage("sid", 3, STAGES["sid"]), tiny_teacher(), tiny_student(), seed=seed)
        return run.batch(tiny_source(), position).noise

    assert torch.equal(noise(1, 0, 5, ambient=1), noise(1, 0, 5, ambient=2))
    for other in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        assert not torch.equal(noise(1, 0, 5, ambient=1), noise(*other, ambient=1))


# learning ------------------------------------------------------------------------------------------------------------


def single(net: GaussianNet) -> GaussianNet:
    return net.float()


def gaussian_run(name: str, **settings: Any) -> StageRun:
    """A student N(1 + 0.8, 1) that should become the unguided teacher's N(1, STD^2)."""
    teacher = Denoiser(single(GaussianNet(RF(), "flow")), RF(), "flow")
    student = Denoiser(single(GaussianNet(RF(), "flow", shift=0.8, std=1.0, endpoint=True)), RF(), "flow")
    settings = {"counts": (1,), "lr": 2e-2, "fake_lr": 5e-2, "beta1": 0.5, "batch": 64, **settings}
    return StageRun(0, Stage(name, 150, settings), teacher, student, ema=(0.9,))


@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_score_matching_reaches_the_mean_and_std_of_the_teacher(name: str) -> None:
    run = gaussian_run(name)
    source = TensorSource(torch.ones(256), SHAPE)
    while not run.done:
        run.iterate(source)
    final = run.averages[0].weights
    assert final["net.shift"].item() == pytest.approx(0, abs=0.05)
    assert final["net.log_std"].exp().item() == pytest.approx(STD, abs=0.04)


# pairs ---------------------------------------------------------------------------------------------------------------


def test_teacher_states_are_those_of_the_true_trajectory() -> None:
    teacher, noise = teacher_of(RF(), "flow"), torch.randn(16, *SHAPE, dtype=torch.float64)
    path = TeacherPath((1.0, 0.75, 0.5, 0.25), steps=64, solver="ab2")
    states = path.states(teacher, noise, torch.ones(16, dtype=torch.float64))
    assert (states - exact_pairs(RF(), noise, path.levels)).abs().max() < 1e-2


def test_rungs_are_the_nearest_points_of_the_path() -> None:
    path = TeacherPath((1.0, 0.6, 0.3), steps=16, solver="euler")
    assert path.levels == (1.0, 0.625, 0.3125)


# rows ----------------------------------------------------------------------------------------------------------------


def test_a_source_serves_each_row_once_an_epoch_and_the_same_at_the_same_position() -> None:
    source = TensorSource(torch.arange(10), SHAPE, seed=1)
    epochs = [torch.cat([source.rows(position, 5).cond for position in pair]) for pair in ((0, 1), (2, 3))]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(TensorSource(torch.arange(10), SHAPE, seed=1).rows(3, 5).cond, source.rows(3, 5).cond)


def test_pairs_follow_from_the_seed() -> None:
    path = TeacherPath((1.0,), steps=2, solver="euler")
    made = [collect(tiny_teacher(), tiny_source(), Workspace(seed=seed), path, 64) for seed in (1, 1, 2)]
    assert all(one is not None for one in made)
    first, again, other = (one.states for one in made if one is not None)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def kd_pairs(teacher: BaseDenoiser, **settings: Any) -> torch.Tensor:
    run = StageRun(0, Stage("kd", 1, {**STAGES["kd"], **settings}), teacher, tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    assert isinstance(run.method, KD)
    assert run.method.pairs is not None
    return run.method.pairs.states


def test_pairs_are_guided_within_the_interval_only() -> None:
    guided, unguided = kd_pairs(tiny_teacher()), kd_pairs(tiny_teacher().denoiser)
    assert torch.equal(kd_pairs(tiny_teacher(), guidance_interval=[0.0, 1.0]), guided)
    torch.testing.assert_close(kd_pairs(tiny_teacher(), guidance_interval=[0.3, 0.4]), unguided)  # between two steps
    late = kd_pairs(tiny_teacher(), guidance_interval=[0.0, 0.6])
    torch.testing.assert_close(late[:, 1], unguided[:, 1])  # the state at level .75, after the step from 1
    assert not torch.allclose(late[:, -1], unguided[:, -1])
    assert not torch.allclose(late[:, -1], guided[:, -1])


def test_own_rows_are_the_students_states_before_its_last_jump() -> None:
    run = StageRun(
        0, Stage("kd", 1, {**STAGES["kd"], "counts": [4], "eta": 0, "own_share": 0.25}), tiny_teacher(), tiny_student()
    )
    assert isinstance(run.method, KD)
    batch = run.batch(tiny_source(), 0) if run.method.prepare(tiny_source(), Workspace()) else None
    assert batch is not None
    level, states, ends = run.method._own(batch, 2)
    grid = run.schedules[4].times
    cond = batch.cond[:2]
    assert level == grid[3] == 0.25
    torch.testing.assert_close(states, sample(run.cast.student, batch.noise[:2], grid[:4], cond))
    torch.testing.assert_close(ends, trajectory(run.cast.teacher, states / 0.25, (0.25, 0.0), cond, solver="euler")[-1])


def test_own_rows_are_guided_within_the_interval_only() -> None:
    def ends(teacher: BaseDenoiser, **settings: Any) -> torch.Tensor:
        told = {**STAGES["kd"], "counts": [4], "eta": 0, "own_share": 0.25, **settings}
        run = StageRun(0, Stage("kd", 1, told), teacher, tiny_student())
        assert isinstance(run.method, KD)
        run.method.prepare(tiny_source(), Workspace())
        return run.method._own(run.batch(tiny_source(), 0), 2)[2]

    guided, unguided = ends(tiny_teacher()), ends(tiny_teacher().denoiser)
    assert not torch.allclose(guided, unguided)
    torch.testing.assert_close(ends(tiny_teacher(), guidance_interval=[0.3, 1.0]), unguided)  # the last rung is at .25


def test_an_interval_without_guidance_changes_nothing() -> None:
    plain = tiny_teacher().denoiser
    assert torch.equal(kd_pairs(plain, guidance_interval=[0.2, 0.8]), kd_pairs(plain))
