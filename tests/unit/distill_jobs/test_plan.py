"""What a budget buys, in numbers that must come out."""

import json
from typing import Any

import pytest

from distill_jobs import spec as specs
from distill_jobs.needs import Needs
from distill_jobs.plan import Costs, Plan, expected, planned


def spec(**train: Any) -> specs.DistillJobSpec:
    return specs.parse(
        {
            "teacher": {"id": "t"},
            "student": {"name": "s", "steps": [1, 2]},
            "method": [{"name": "kd", "share": 0.5}, {"name": "sid", "share": 0.5, "fake_lr": 0.01}],
            "train": train,
        }
    )


def test_minutes_become_iterations_by_what_they_cost() -> None:
    plan = planned(spec(max_minutes=2), [Costs(0.1), Costs(0.5)], [0, 0], spent_s=20)
    assert [stage.iterations for stage in plan.stages] == [500, 100]  # 50 s each


def test_the_hard_stop_is_at_twice_the_time() -> None:
    plan = planned(spec(max_minutes=1), [Costs(0.1), Costs(0.5)], [0, 0])
    assert [stage.hard_stop_s for stage in plan.stages] == [60.0, 60.0]


def test_pairs_are_paid_for_and_take_no_more_than_their_share() -> None:
    plan = planned(spec(max_minutes=2), [Costs(0.1, pair_s=0.01), Costs(0.1)], [4992, 0])
    kd = plan.stages[0]
    assert kd.settings["pairs"] == 1984  # 20 of 60 s, in whole shards of 64
    assert kd.iterations == int((60 - 1984 * 0.01) / 0.1)
    affordable = planned(spec(max_minutes=2), [Costs(0.1, pair_s=0.001), Costs(0.1)], [4992, 0])
    assert affordable.stages[0].settings["pairs"] == 4992


def test_evaluations_are_paid_for() -> None:
    free, paid = (
        planned(spec(max_minutes=2), [Costs(0.1, evaluation_s=cost)] * 2, [0, 0]).iterations for cost in (0.0, 1.0)
    )
    assert free - paid == 7 / 0.1  # seven of a second each are 6 % of two minutes


def test_iterations_are_shared_out_and_win_over_minutes_that_allow_more() -> None:
    assert [s.iterations for s in planned(spec(iterations=100), [Costs(1)] * 2, [0, 0]).stages] == [50, 50]
    both = planned(spec(iterations=100, max_minutes=100), [Costs(0.1)] * 2, [0, 0])
    assert [stage.iterations for stage in both.stages] == [50, 50]


COSTS = [
    Costs(0.1, pair_s=0.01, evaluation_s=1.0, checkpoint_s=0.5, pair_bytes=1000, peak_bytes=5000),
    Costs(0.5, evaluation_s=2.0, peak_bytes=60_000),
]


def test_what_training_should_need_is_the_sum_of_its_parts_and_its_highest_peak() -> None:
    """Five evaluations of each stage; a checkpoint of .5 s every 10 s and one at the end; 64 pairs were in the peak."""
    plan = planned(spec(iterations=100, checkpoint_every_s=10), COSTS, [128, 0])
    assert [stage.seconds for stage in plan.stages] == pytest.approx([1.28 + 5 + 0.5 + 50 * 0.105, 10 + 25])
    assert plan.needs == Needs(5000 + 64 * 1000, plan.stages[0].seconds + plan.stages[1].seconds)
    often = planned(spec(iterations=100, checkpoint_every=5), COSTS, [128, 0])
    assert often.stages[0].seconds == pytest.approx(1.28 + 5 + 0.5 + 50 * 0.2)
    assert planned(spec(iterations=100), COSTS, [64, 0]).memory_bytes == 60_000


def test_a_plan_for_minutes_should_need_them() -> None:
    plan = planned(spec(max_minutes=5), COSTS, [128, 0], spent_s=10)
    assert plan.needs.train_seconds == pytest.approx(290, abs=4)  # an evaluation or two, rounded


def test_a_budget_that_pays_for_nothing_still_trains_a_little() -> None:
    assert min(s.iterations for s in planned(spec(max_minutes=0.01), [Costs(9.0)] * 2, [0, 0]).stages) >= 1


def test_the_jobs_wishes_reach_every_method_and_its_own_fields_win() -> None:
    plan = planned(spec(iterations=2, batch=16, lr=0.5), [Costs(1)] * 2, [0, 0])
    assert plan.stages[0].settings == {"counts": [1, 2], "batch": 16, "lr": 0.5}
    assert plan.stages[1].settings["fake_lr"] == 0.01


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan = planned(spec(max_minutes=1), [Costs(0.1)] * 2, [64, 0], bf16=True)
    assert Plan.of(plan.as_dict() | {"stages": plan.as_dict()["stages"]}) == plan


def test_a_plan_of_the_release_before_goes_on_and_says_nothing_of_its_needs() -> None:
    plan = planned(spec(iterations=100), [Costs(0.1)] * 2, [64, 0])
    written = json.loads(json.dumps(plan.as_dict()))
    assert expected(written) == plan.needs
    del written["memory_bytes"]
    for stage in written["stages"]:
        stage["seconds"] = None
    assert expected(written) is None
    assert Plan.of(written).iterations == 100
    assert [stage.seconds for stage in Plan.of(written).stages] == [0.0, 0.0]


@pytest.mark.parametrize(("stage", "before"), [(0, 0), (1, 50)])
def test_steps_count_over_the_whole_job(stage: int, before: int) -> None:
    assert planned(spec(iterations=100), [Costs(1)] * 2, [0, 0]).done_before(stage) == before
