"""Each rule on both sides of its limit, and that what was not measured did not pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from distill_jobs.gate import judge
from distill_jobs.spec import GateSpec


@dataclass(frozen=True)
class Distances:
    fd_ratio: float | None = 1.2
    fd_ratio_ci: tuple[float, float] | None = (1.1, 1.3)


@dataclass(frozen=True)
class Measured(Distances):
    alignment_ratio: float | None = 0.95
    diversity_ratio: float | None = 0.9
    grain_ratio: float | None = 2.0
    alignment_forgotten: float | None = None
    networks: Mapping[str, Distances] = field(default_factory=dict)


GATES = GateSpec(fd_ratio={1: 1.5, 4: 1.2}, alignment_ratio=0.93, diversity_ratio=0.8, grain_ratio=3.0, latency_ms=20)
GOOD = Measured()


def broken(rules: Measured, latency_ms: float = 10.0) -> list[str]:
    return [result.rule for result in judge(GATES, {1: rules}, {1: latency_ms}).failures]


def test_a_good_student_passes_every_rule() -> None:
    verdict = judge(GATES, {1: GOOD}, {1: 10.0})
    assert verdict.passing == (1,)
    assert {r.rule for r in verdict.results} == {
        "fd_ratio", "alignment_ratio", "diversity_ratio", "grain_ratio", "latency_ms",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "at_limit", "beyond"),
    [
        ("fd_ratio", 1.5, 1.5001),
        ("alignment_ratio", 0.93, 0.9299),
        ("diversity_ratio", 0.8, 0.7999),
        ("grain_ratio", 3.0, 3.0001),
    ],
)
def test_a_rule_is_kept_at_its_limit_and_broken_beyond(rule: str, at_limit: float, beyond: float) -> None:
    assert broken(replace(GOOD, **{rule: at_limit})) == []
    assert broken(replace(GOOD, **{rule: beyond})) == [rule]


def test_what_is_left_of_a_concept_is_judged_where_the_student_forgets() -> None:
    def left(value: float | None) -> list[str]:
        verdict = judge(GATES, {1: replace(GOOD, alignment_forgotten=value)}, {1: 10.0}, forgets=True)
        return [result.rule for result in verdict.failures]

    assert (left(0.1), left(0.1001), left(None)) == ([], ["alignment_forgotten"], ["alignment_forgotten"])
    assert broken(replace(GOOD, alignment_forgotten=1.0)) == []


def test_latency_has_its_limit() -> None:
    assert broken(GOOD, latency_ms=20.0) == []
    assert broken(GOOD, latency_ms=20.1) == ["latency_ms"]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_was_not_measured_did_not_pass(value: float | None) -> None:
    assert broken(replace(GOOD, alignment_ratio=value)) == ["alignment_ratio"]
    assert [r.value for r in judge(GATES, {1: replace(GOOD, fd_ratio=value)}, {1: 1.0}).failures] == [None]


def test_each_step_count_is_judged_by_its_own_limit() -> None:
    verdict = judge(GATES, {1: replace(GOOD, fd_ratio=1.3), 4: replace(GOOD, fd_ratio=1.3)}, {1: 1.0, 4: 1.0})
    assert verdict.passing == (1,)
    assert verdict.passing_tiers({"low": 1, "medium": 4}) == {"low": 1}


def test_the_job_passed_if_every_published_tier_did() -> None:
    verdict = judge(GATES, {1: GOOD, 4: replace(GOOD, fd_ratio=9.0)}, {1: 1.0, 4: 1.0})
    assert verdict.as_dict({"low": 1})["passed"] is True
    assert verdict.as_dict({"low": 1, "medium": 4})["passed"] is False
    assert verdict.as_dict({})["passed"] is False


def test_the_interval_stands_beside_the_value_and_decides_nothing() -> None:
    result = judge(GATES, {1: replace(GOOD, fd_ratio=1.49, fd_ratio_ci=(1.2, 1.9))}, {1: 1.0}).results[0]
    assert (result.passed, result.interval) == (True, (1.2, 1.9))


def test_a_rule_without_a_limit_is_not_judged() -> None:
    verdict = judge(GateSpec(fd_ratio=2.0, alignment_ratio=None, diversity_ratio=None, grain_ratio=None), {1: GOOD})
    assert [r.rule for r in verdict.results] == ["fd_ratio"]


def test_a_further_network_has_a_limit_of_its_own_and_fails_where_it_has_not_looked() -> None:
    none: dict[str, None] = dict.fromkeys(("fd_ratio", "alignment_ratio", "diversity_ratio", "grain_ratio"))
    gates = GateSpec(**none, networks={"dinov2": {1: 1.1, 4: 1.3}})
    seen = {k: replace(GOOD, networks={"dinov2": Distances(1.2, (1.0, 1.4))}) for k in (1, 4)}
    verdict = judge(gates, seen)
    assert verdict.passing == (4,)
    assert [(r.rule, r.value, r.interval) for r in verdict.failures] == [("fd_ratio.dinov2", 1.2, (1.0, 1.4))]
    assert [r.rule for r in judge(gates, {4: GOOD}).failures] == ["fd_ratio.dinov2"]
