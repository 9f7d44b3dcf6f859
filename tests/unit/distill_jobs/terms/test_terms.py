"""What every loss term promises in a stage: it trains, takes its own gradients, resumes, and says what it is."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Batch, Source, TensorSource, repeated
from distill_jobs.methods.base import Workspace
from distill_jobs.progress import Hooks
from distill_jobs.stage import Stage, StageRun
from distill_jobs.terms.base import Term, Terms, Wanted, terms
from distill_jobs.timing import measure
from distill_jobs.trainer import Result, TrainConfig, Trainer
from engines.errors import InvalidRequest, UnknownPlugin
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher

TERMS = terms()
every_term = pytest.mark.parametrize("name", TERMS)


def with_data() -> TensorSource:
    source = tiny_source()
    x = torch.randn(source.size, *source.shape, generator=torch.Generator().manual_seed(1))
    return TensorSource(source.cond, source.shape, x=x)


def stage(name: str, method: str = "dmd", iterations: int = 5, weight: float = 0.1) -> Stage:
    return Stage(method, iterations, STAGES[method], terms=(Wanted(name, weight),))


def made(name: str, method: str = "dmd") -> StageRun:
    run = StageRun(0, stage(name, method), tiny_teacher(), tiny_student())
    run.method.prepare(tiny_source(), Workspace())
    return run


@every_term
def test_a_term_says_what_it_is_and_where_it_is_from(name: str) -> None:
    first = (TERMS[name].__doc__ or "").partition("\n")[0]
    assert first.endswith(".")
    assert TERMS[name].paper


@every_term
def test_a_terms_roles_alone_take_the_gradients_of_its_losses(name: str) -> None:
    run = made(name)
    batch = run.batch(with_data(), 0)
    for role in (*run.terms.roles(), "student"):
        with run.cast.only(role):
            sum(run.terms.loss(role, run.method, batch).values(), torch.zeros(())).backward()
        touched = {one for one in run.roles if any(p.grad is not None for p in run.cast.module(one).parameters())}
        assert touched == {role}
        assert all(p.grad is None for p in run.cast.teacher.parameters())
        run.cast.module(role).zero_grad(set_to_none=True)


def test_two_terms_of_one_name_have_a_figure_each() -> None:
    wanted = (Wanted("moment", 1.0), Wanted("moment", 3.0))
    run = StageRun(0, Stage("kd", 2, STAGES["kd"], terms=wanted), tiny_teacher(), tiny_student())
    run.method.prepare(with_data(), Workspace())
    seen = run.iterate(with_data())
    assert {"loss.student.moment", "loss.student.moment.2"} <= seen.keys()


def fit(one: Stage, source: Source, folder: Path | None = None, pauses: int = 0) -> Result:
    asked = iter(["go"] * pauses + ["pause"])
    hooks = Hooks(poll=lambda: "pause" if next(asked) == "pause" else None) if pauses else Hooks()
    config = TrainConfig(seed=3, ema=(0.9,), checkpoint_every=1, checkpoint_every_s=1e9, report_every_s=0.0)
    return Trainer([one], tiny_teacher(), tiny_student(), source, config, folder=folder, hooks=hooks).fit()


@every_term
@pytest.mark.parametrize("method", ["dmd", "kd"])
def test_a_stage_with_a_term_trains_and_resumes_bit_by_bit(name: str, method: str, tmp_path: Path) -> None:
    one, source = stage(name, method), with_data()
    whole = fit(one, source)
    assert fit(one, source, tmp_path, pauses=4).state == "paused"
    torch.randn(3)  # another process has other randomness
    resumed = fit(one, source, tmp_path)
    assert resumed.state == whole.state == "finished"
    assert all(torch.equal(resumed.weights[key], value) for key, value in whole.weights.items())
    plain = fit(replace(one, terms=()), source)
    assert any(not torch.equal(plain.weights[key], value) for key, value in whole.weights.items())


@every_term
def test_a_term_is_logged_under_its_name_and_its_weight_scales_it(name: str) -> None:
    seen = []
    for weight in (0.1, 0.2):
        run = StageRun(0, stage(name, "sid", weight=weight), tiny_teacher(), tiny_student())
        logs: dict[str, float] = {}
        while f"loss.student.{name}" not in logs:
            logs = run.iterate(with_data())
        seen.append(logs[f"loss.student.{name}"])
    assert seen[1] == pytest.approx(2 * seen[0], rel=1e-4)


@every_term
def test_a_term_trains_in_bf16_with_single_precision_weights(name: str) -> None:
    config = TrainConfig(bf16=True, ema=(0.9,))
    ended = Trainer([stage(name, iterations=3)], tiny_teacher(), tiny_student(), with_data(), config).fit()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in ended.weights.values())


def test_a_term_joins_late_and_its_weight_rises() -> None:
    """Of 10 iterations none for 4, then a fourth more in each until all of it counts."""
    one = Wanted("reward", 2.0, after=0.4, ramp=0.4)
    assert [one.weight_at(done) for done in (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 1.5, 2, 2])
    late = Stage("sid", 10, {**STAGES["sid"], "fake_warmup": 0}, terms=(one, Wanted("mode_seeking", after=0.7)))
    run = StageRun(0, late, tiny_teacher(), tiny_student())
    seen = [run.iterate(tiny_source()) for _ in range(10)]
    for name, first in (("reward", 4), ("mode_seeking", 7)):
        assert [f"loss.student.{name}" in logs for logs in seen] == [False] * first + [True] * (10 - first)
    assert seen[4]["loss.student.reward"] == 0 != seen[5]["loss.student.reward"]


def test_a_terms_own_roles_learn_before_it_joins() -> None:
    late = Stage("sid", 10, STAGES["sid"], terms=(Wanted("proxy_reward", after=0.9),))
    run = StageRun(0, late, tiny_teacher(), tiny_student())
    logs = [run.iterate(tiny_source()) for _ in range(2)][-1]
    assert "loss.proxy.proxy_reward" in logs
    assert "loss.student.proxy_reward" not in logs


@pytest.mark.parametrize("role", ["student", "proxy"])
def test_all_of_a_terms_losses_see_as_many_samples_as_it_asks_for(role: str) -> None:
    seen: list[int] = []

    def counted(y: Tensor, batch: Batch) -> Tensor:
        seen.append(len(y))
        return y.flatten(1).mean(dim=1)

    run = made("proxy_reward", "sid")
    run.terms._live[0][1].reward = counted  # type: ignore[attr-defined]
    batch = run.batch(tiny_source(), 0)
    run.terms.loss(role, run.method, batch)
    assert seen == [2 * len(batch)]


def test_training_and_its_trial_hand_the_decoder_to_rewards_of_pictures(tmp_path: Path) -> None:
    def decode(y: Tensor) -> Tensor:
        return 128 + 20 * torch.cat([y, 0 * y[:, :1]], dim=1)

    colours = Wanted("reward", settings={"reward": "colourfulness"})
    one = replace(stage("reward", "sid"), terms=(colours,))
    parts = ([one], tiny_teacher(), tiny_student(), tiny_source(), TrainConfig())
    assert Trainer(*parts, decode=decode).fit().state == "finished"
    assert measure(one, *parts[1:4], config=parts[4], folder=tmp_path / "trial", decode=decode).iteration_s > 0
    with pytest.raises(InvalidRequest, match="there is no decoder"):
        Trainer(*parts).fit()


def test_an_unknown_term_or_setting_is_refused_by_name() -> None:
    with pytest.raises(UnknownPlugin, match=r"'gan' .*choose from .*adversarial"):
        Wanted("gan").resolve()
    with pytest.raises(InvalidRequest, match="term moment, setting tau"):
        Wanted("moment", settings={"tau": 0.5}).resolve()


# how many samples a term sees ----------------------------------------------------------------------------------------


class Seen(Term):
    """Keeps what it was given."""

    def __init__(self, count: int) -> None:
        self.samples = count  # type: ignore[misc]
        self.seen: list[tuple[Tensor, Batch]] = []

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        self.seen.append((y, batch))
        return y.sum()

    def report(self, y: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"rows": torch.tensor(float(len(y)))}


def shown(*counts: int) -> tuple[list[Seen], dict[str, Tensor], int, Batch]:
    """Terms after one student's loss, that loss, and how many evaluations of the student it took."""
    run = made("moment", "sid")
    calls: list[Any] = []
    run.cast.student.net.register_forward_hook(lambda *_: calls.append(1))
    spies = [Seen(count) for count in counts]
    terms = Terms(())
    terms._live = [(Wanted(str(i)), spy, str(i)) for i, spy in enumerate(spies)]
    batch = run.batch(tiny_source(), 0)
    with run.cast.only("student"):
        return spies, terms.loss("student", run.method, batch), len(calls), batch


def test_terms_share_the_students_samples_and_each_sees_as_many_as_it_asks_for() -> None:
    (none, one, two), loss, _, batch = shown(0, 1, 2)
    n = len(batch)
    assert [len(spy.seen[0][0]) for spy in (none, one, two)] == [0, n, 2 * n]
    y, wide = two.seen[0]
    assert torch.equal(y[:n], one.seen[0][0])
    assert torch.equal(wide.cond[:n], wide.cond[n:])
    assert torch.equal(wide.noise[:n], batch.noise)
    assert not torch.equal(wide.noise[n:], batch.noise)
    assert one.seen[0][1] is batch
    assert {name: float(loss[f"{name}.rows"]) for name in "012"} == {"0": 0, "1": n, "2": 2 * n}
    assert not loss["2.rows"].requires_grad


def test_a_student_that_no_term_looks_at_is_not_sampled() -> None:
    assert shown(0)[2] == 0
    assert shown(1)[2] > 0


def test_repeated_rows_keep_their_order_and_their_data() -> None:
    run = made("moment", "sid")
    batch = run.batch(with_data(), 0)
    wide = repeated(batch, 2)
    assert wide.rows.x is not None
    assert batch.rows.x is not None
    assert torch.equal(wide.rows.x, torch.cat([batch.rows.x] * 2))
    assert len(wide) == 2 * len(batch)


def test_what_a_term_reports_trains_nothing() -> None:
    def weights(report: bool) -> dict[str, Tensor]:
        run = made("reward", "sid")
        if not report:
            run.terms._live[0][1].report = lambda y, batch: {}  # type: ignore[method-assign]
        for _ in range(4):
            run.iterate(tiny_source())
        return copy.deepcopy(run.cast.weights("student"))

    ours, quiet = weights(True), weights(False)
    assert all(torch.equal(ours[key], value) for key, value in quiet.items())
