"""A run: resumed bit by bit, stopped within a step, best kept, alarms given."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs.batches import Rows, TensorSource
from distill_jobs.plan import Costs
from distill_jobs.progress import Hooks, Wish
from distill_jobs.stage import Average, Stage, StageRun, lr_factor
from distill_jobs.timing import measure, prepared_rows
from distill_jobs.trainer import Result, TrainConfig, Trainer
from engines.errors import Diverged, InvalidRequest, LeaseLost
from tests.unit.distill_jobs.tiny import STAGES, TinyNet, tiny_source, tiny_student, tiny_teacher

CONFIG = TrainConfig(seed=3, ema=(0.9, 0.5), checkpoint_every=1, checkpoint_every_s=1e9, report_every_s=0.0)


def stage(name: str, iterations: int = 7, **settings: Any) -> Stage:
    return Stage(name, iterations, {**STAGES[name], **settings})


def trainer(
    stages: list[Stage],
    folder: Path | None = None,
    *,
    dropout: float = 0.0,
    hooks: Hooks | None = None,
    config: TrainConfig = CONFIG,
    fence: int = 0,
) -> Trainer:
    torch.manual_seed(17)
    return Trainer(
        stages, tiny_teacher(), tiny_student(dropout), tiny_source(), config, folder=folder, hooks=hooks, fence=fence
    )


def wish_after(iterations: int, wish: Wish) -> Callable[[], Wish | None]:
    """A poll that is asked often and wishes from the n-th time on."""
    asked = 0

    def poll() -> Wish | None:
        nonlocal asked
        asked += 1
        return wish if asked > iterations else None

    return poll


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", STAGES)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    name: str, dropout: float, tmp_path: Path
) -> None:
    whole = trainer([stage(name)], dropout=dropout).fit()
    for asked in (2, 1, 2):  # three short lives
        left = trainer([stage(name)], tmp_path, dropout=dropout, hooks=Hooks(poll=wish_after(asked, "pause"))).fit()
        assert left.state == "paused"
        torch.randn(3)  # another process has other randomness
    resumed = trainer([stage(name)], tmp_path, dropout=dropout).fit()
    assert resumed.state == whole.state == "finished"
    assert same(resumed.weights, whole.weights)
    assert not same(whole.weights, dict(tiny_student().state_dict()))


def test_a_chain_of_stages_resumes_within_its_second(tmp_path: Path) -> None:
    chain = [stage("kd", 5), stage("sid", 5)]
    whole = trainer(chain).fit()
    assert trainer(chain, tmp_path, hooks=Hooks(poll=wish_after(9, "pause"))).fit().stage == 1
    resumed = trainer(chain, tmp_path).fit()
    assert same(resumed.weights, whole.weights)
    assert set(resumed.schedules) == {1, 2, 4}
    assert resumed.schedules[2].times == (1.0, 0.6, 0.0)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.distill_jobs.test_trainer import trainer, stage
from distill_jobs.progress import Hooks

def die(event):
    if event["type"] == "checkpoint" and event["iteration"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)

trainer([stage("sid")], Path(sys.argv[1]), hooks=Hooks(event=die)).fit()
"""


def test_a_killed_trainer_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    resumed = trainer([stage("sid")], tmp_path).fit()
    assert same(resumed.weights, trainer([stage("sid")]).fit().weights)


def test_a_wish_is_heard_before_the_next_iteration() -> None:
    events: list[dict[str, Any]] = []
    hooks = Hooks(poll=wish_after(3, "cancel"), event=events.append)
    left = trainer([stage("sid", 100)], hooks=hooks).fit()
    assert (left.state, left.iteration) == ("canceled", 3)


def test_preparation_hears_a_wish_and_goes_on_where_it_was(tmp_path: Path) -> None:
    slow = [stage("kd", 3, pairs=256)]
    left = trainer(slow, tmp_path, hooks=Hooks(poll=wish_after(2, "pause"))).fit()
    assert (left.state, left.iteration) == ("paused", 0)
    assert len(list((tmp_path / "prepared-00").iterdir())) == 2
    assert same(trainer(slow, tmp_path).fit().weights, trainer(slow).fit().weights)


def test_finish_ends_now_with_the_best_so_far() -> None:
    ended = trainer([stage("sid", 100)], hooks=Hooks(poll=wish_after(5, "finish"))).fit()
    assert (ended.state, ended.iteration) == ("finished", 5)
    assert ended.weights


def test_a_hard_stop_counts_the_time_of_earlier_lives(tmp_path: Path) -> None:
    ticks = iter(range(10_000))
    hooks = Hooks(clock=lambda: float(next(ticks)), poll=wish_after(10, "pause"))
    slow = [Stage("sid", 1000, STAGES["sid"], hard_stop_s=60.0)]
    trainer(slow, tmp_path, hooks=hooks).fit()
    ended = trainer(slow, tmp_path, hooks=Hooks(clock=lambda: float(next(ticks)))).fit()
    whole = trainer(slow, tmp_path / "whole", hooks=Hooks(clock=lambda: float(next(ticks)))).fit()
    assert ended.stopped_early
    assert whole.stopped_early
    assert abs(ended.iteration - whole.iteration) <= 2


def run_with_scores(scores: list[float], **config: Any) -> tuple[Result, list[dict[str, Tensor]]]:
    seen: list[dict[str, Tensor]] = []
    left = iter(scores)

    def evaluate(iteration: int, student: Any, schedules: Any) -> dict[str, float]:
        torch.randn(5)  # an evaluation may use the global randomness
        seen.append(copy.deepcopy(dict(student.state_dict())))
        return {"fd": next(left), "diversity": 1.0}

    settings = TrainConfig(seed=3, ema=(0.9,), eval_every=2, **config)
    return trainer([stage("sid", 8)], hooks=Hooks(evaluate=evaluate), config=settings).fit(), seen


def test_the_best_by_metric_is_kept_and_not_the_last() -> None:
    ended, seen = run_with_scores([3.0, 1.0, 2.0, 2.5])
    assert same(ended.weights, seen[1])
    assert ended.metrics == {"fd": 1.0, "diversity": 1.0}
    assert ended.iteration == 4


def test_the_end_is_kept_where_an_earlier_best_may_have_been_luck() -> None:
    ended, seen = run_with_scores([3.0, 1.0, 2.0, 1.08])
    assert same(ended.weights, seen[3])
    assert (ended.metrics["fd"], ended.iteration) == (1.08, 8)
    ended, seen = run_with_scores([3.0, 1.0, 2.0, 1.12])
    assert same(ended.weights, seen[1])


def test_the_highest_can_be_best() -> None:
    ended, seen = run_with_scores([3.0, 1.0, 2.0, float("nan")], best_is_highest=True)
    assert same(ended.weights, seen[0])


def test_evaluation_does_not_touch_the_runs_randomness() -> None:
    quiet = trainer([stage("sid", 8)], config=TrainConfig(seed=3, ema=(0.9,)), dropout=0.3).fit()
    hooks = Hooks(evaluate=lambda *_: {"other": float(torch.randn(3).sum())})
    noisy = trainer(
        [stage("sid", 8)], config=TrainConfig(seed=3, ema=(0.9,), eval_every=1), hooks=hooks, dropout=0.3
    ).fit()
    assert same(quiet.weights, noisy.weights)


def test_progress_says_losses_gradients_speed_and_time_left() -> None:
    events: list[dict[str, Any]] = []
    panels: list[set[str]] = []
    hooks = Hooks(event=events.append, panel=lambda iteration, latents: panels.append(set(latents)))
    trainer([stage("sid", 8)], hooks=hooks).fit()
    last = [event for event in events if event["type"] == "progress"][-1]
    assert {"loss.fake.dsm", "loss.student.sid", "grad_norm.fake", "grad_norm.student"} <= set(last)
    assert last["iteration"] == last["iterations"] == 8
    assert last["it_s"] > 0
    assert last["eta_s"] == 0
    assert set(last["lr"]) == {"fake", "student"}
    assert panels == [{"gen", "real", "fake"}]


def test_a_collapsed_student_raises_alarms() -> None:
    events: list[dict[str, Any]] = []
    one = trainer([stage("sid", 1, lr=1e-9)], hooks=Hooks(event=events.append))
    net = one.student.net
    assert isinstance(net, TinyNet)

    class Constant(TinyNet):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            return x + 0 * self.outer.bias.sum()  # flow = x at t = 1: every picture is black

    one.student.net = Constant()
    one.fit()
    assert {event["what"] for event in events if event["type"] == "alarm"} == {"std_ratio", "diversity_ratio"}


def test_updates_without_a_finite_gradient_are_skipped_counted_and_in_the_end_refused() -> None:
    run = StageRun(0, stage("dmd", 50), tiny_teacher(), tiny_student(), max_skips=4)
    run.iterate(tiny_source())
    before = copy.deepcopy(run.cast.weights("fake"))
    run.cast["fake"].net.outer.register_full_backward_hook(lambda *_: (torch.full((8, 16), float("nan")),))
    run.iterate(tiny_source())
    assert run.skipped["fake"] == 2
    assert same(before, run.cast.weights("fake"))
    with pytest.raises(Diverged, match="4 updates in a row"):
        run.iterate(tiny_source())


def test_the_newer_trainer_shuts_the_older_one_out(tmp_path: Path) -> None:
    def steal(event: dict[str, Any]) -> None:
        if event["type"] == "checkpoint" and event["iteration"] == 2:
            trainer([stage("sid")], tmp_path, fence=2, hooks=Hooks(poll=lambda: "cancel")).fit()

    with pytest.raises(LeaseLost):
        trainer([stage("sid")], tmp_path, fence=1, hooks=Hooks(event=steal)).fit()


def test_the_rate_warms_up_stays_and_falls_to_two_percent() -> None:
    rates = [lr_factor(i, 1000) for i in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[599] == 1
    assert rates[799] == pytest.approx(0.51, abs=0.01)
    assert rates[-1] == pytest.approx(0.02, abs=0.003)


def test_an_average_follows_its_decay() -> None:
    average = Average(0.5, {"w": torch.zeros(1), "n": torch.tensor(0)})
    for i in range(1, 4):
        average.update({"w": torch.ones(1), "n": torch.tensor(i)}, i + 100)
    assert average.weights["w"].item() == pytest.approx(1 - 0.5**3)
    assert average.weights["n"].item() == 3


def test_bf16_autocast_trains_in_single_precision_weights() -> None:
    ended = trainer([stage("sid", 3)], config=TrainConfig(bf16=True, ema=(0.9,))).fit()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in ended.weights.values())


def test_a_search_is_no_stage_and_a_flow_map_needs_a_network_that_reads_s() -> None:
    with pytest.raises(InvalidRequest, match="it is a search"):
        StageRun(0, Stage("optimal_steps", 3), tiny_teacher(), tiny_student())
    plain = tiny_student()
    plain.inputs = frozenset()
    with pytest.raises(InvalidRequest, match="reads s"):
        StageRun(0, stage("lsd"), tiny_teacher(), plain)


@pytest.mark.parametrize("name", STAGES)
def test_a_trial_takes_the_time_of_every_part_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    cost = measure(stage(name, 100), tiny_teacher(), tiny_student(), tiny_source(), config=CONFIG, folder=folder)
    assert min(cost.iteration_s, cost.checkpoint_s) > 0
    prepares = bool({"pairs", "generate"} & STAGES[name].keys())
    assert (cost.pair_s > 0) == (cost.pair_bytes > 0) == prepares
    assert not folder.exists()
    assert prepared_rows(stage(name)) == (64 if prepares else 0)


class Slow(TensorSource):
    """Every request for rows takes a second."""

    now = 0.0

    def rows(self, position: int, count: int) -> Rows:
        self.now += 1.0
        return super().rows(position, count)


def slow_trial(name: str, folder: Path) -> Costs:
    source = Slow(torch.linspace(-1, 1, 50), tiny_source().shape)

    def evaluate(*_: Any) -> dict[str, float]:
        source.now += 7.0
        return {"fd": 1.0}

    return measure(
        stage(name, 100),
        tiny_teacher(),
        tiny_student(),
        source,
        config=CONFIG,
        folder=folder,
        evaluate=evaluate,
        clock=lambda: source.now,
    )


def test_a_trial_counts_seconds_of_an_update_a_pair_an_evaluation_and_bytes_of_a_pair(tmp_path: Path) -> None:
    critic = slow_trial("sid", tmp_path)  # two updates of the fake and one of the student, each of other rows
    assert (critic.iteration_s, critic.pair_s, critic.pair_bytes) == (3.0, 0.0, 0)
    assert critic.evaluation_s == 7.0 + 1.0  # a panel's rows
    regression = slow_trial("kd", tmp_path)  # of pairs alone, after one shard of them
    assert (regression.iteration_s, regression.pair_s) == (0.0, 1 / 64)
    states, condition, header = 5 * 8 * 4, 4, 4
    assert states + condition <= regression.pair_bytes <= states + condition + header
    assert critic.peak_bytes > 1 << 20


def test_what_a_run_needed_is_of_all_its_lives(tmp_path: Path) -> None:
    """The clock stands still but for the question before each iteration."""
    now = 0.0

    def lived(asked: int | None) -> Result:
        wish = wish_after(asked, "pause") if asked is not None else (lambda: None)

        def poll() -> Wish | None:
            nonlocal now
            now += 1.0
            return wish()

        return trainer([stage("sid")], tmp_path, hooks=Hooks(poll=poll, clock=lambda: now)).fit()

    assert lived(3).needs.train_seconds == 4.0
    ended = lived(None)
    assert ended.needs.train_seconds == 4.0 + 4.0
    assert ended.needs.memory_bytes > 1 << 20


def test_a_checkpoint_of_the_release_before_needs_were_counted_is_gone_on_from(tmp_path: Path) -> None:
    assert trainer([stage("sid")], tmp_path, hooks=Hooks(poll=wish_after(3, "pause"))).fit().state == "paused"
    for file in (tmp_path / "latest").glob("*/meta.json"):
        meta = json.loads(file.read_text())
        del meta["needs"]
        file.write_text(json.dumps(meta))
    ended = trainer([stage("sid")], tmp_path, hooks=Hooks(clock=lambda: 5.0)).fit()
    assert (ended.state, ended.needs.train_seconds) == ("finished", 0.0)
