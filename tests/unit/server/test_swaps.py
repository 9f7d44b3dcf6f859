"""The rules of a swap: when a candidate becomes current, when it ends otherwise, and what may be unloaded."""

import dataclasses

from engines.registry.base import Candidate, Revision, TierTarget
from server.brokers.base import Phase
from server.swaps import Decision, Holdings, Situation, begun_ms, decide, phase_seconds, retirable

OLD, NEW = f"toy@{'0' * 64}", f"toy@{'1' * 64}"


def candidate(base: int = 1) -> Candidate:
    return Candidate(
        swap_id="swap-2",
        deployment="toys",
        base_revision=base,
        tiers={"low": TierTarget(student=NEW, steps=1)},
        default_tier="low",
        allowed={NEW: [1]},
        created_at="2026-01-01T00:00:00Z",
    )


def revision(number: int, swap_id: str | None = "swap-1") -> Revision:
    return candidate().revision(number, created_at="2026-01-01T00:00:00Z").model_copy(update={"swap_id": swap_id})


def phase(name: str, worker: str = "a", reason: str | None = None, at_ms: int = 0, **seconds: float) -> Phase:
    return Phase(worker, name, reason, at_ms, seconds)


def situation(**phases: str) -> Situation:
    said = {worker: phase(name, worker, "bad blob" if name == "rejected" else None) for worker, name in phases.items()}
    return Situation(candidate(), revision(1), ["a", "b"], said, waited_s=5.0, timeout_s=120.0)


def test_a_candidate_becomes_current_when_every_worker_is_ready() -> None:
    assert decide(situation(a="ready", b="ready")) == Decision("commit")


def test_one_worker_that_is_not_ready_holds_it_back() -> None:
    assert decide(situation(a="ready", b="verifying")) == Decision("wait")
    assert decide(situation(a="ready")) == Decision("wait")


def test_a_dead_worker_is_not_waited_for() -> None:
    now = dataclasses.replace(situation(a="ready", b="building"), workers=["a"])
    assert decide(now) == Decision("commit")


def test_without_any_live_worker_nothing_becomes_current() -> None:
    now = dataclasses.replace(situation(a="ready"), workers=[])
    assert decide(now) == Decision("wait")
    assert decide(dataclasses.replace(now, waited_s=121.0)).kind == "drop"


def test_one_rejection_drops_it_with_its_reason() -> None:
    assert decide(situation(a="ready", b="rejected")) == Decision("drop", "rejected by b: bad blob")


def test_a_worker_that_takes_too_long_drops_it_and_is_named() -> None:
    now = dataclasses.replace(situation(a="ready", b="warming"), waited_s=120.0)
    assert decide(now) == Decision("drop", "not ready after 120 s: b is warming")


def test_a_candidate_made_from_an_older_revision_is_superseded() -> None:
    now = dataclasses.replace(situation(a="ready", b="ready"), current=revision(2))
    assert decide(now).kind == "supersede"


def test_a_successor_of_a_coordinator_that_died_after_the_commit_only_says_so() -> None:
    now = dataclasses.replace(situation(a="ready", b="ready"), current=revision(2, "swap-2"))
    assert decide(now) == Decision("settle")


def test_the_first_candidate_of_a_deployment_needs_no_revision_before_it() -> None:
    now = dataclasses.replace(situation(a="ready", b="live"), candidate=candidate(base=0), current=None)
    assert decide(now) == Decision("commit")


def test_the_time_of_a_swap_is_not_started_anew_by_a_successor() -> None:
    said = {"a": phase("warming", at_ms=9_000, staged=1.0, building=3.0), "b": phase("staged", "b", at_ms=6_500)}
    assert begun_ms(said, seen_ms=20_000) == 5_000
    assert begun_ms({}, seen_ms=20_000) == 20_000


def test_a_phase_took_as_long_as_on_the_slowest_worker() -> None:
    said = [phase("ready", staged=0.1, building=2.0), phase("ready", "b", staged=0.3, building=1.0, odd=9.0)]
    assert phase_seconds(said) == {"staged": 0.3, "building": 2.0}


def holdings(since_s: float) -> Holdings:
    return Holdings(frozenset("abcd"), frozenset("a"), frozenset("ab"), frozenset("d"), since_s)


def test_the_previous_revision_stays_for_a_while_and_what_is_older_goes() -> None:
    assert retirable(holdings(299.0), keep_previous_s=300.0) == ["c"]
    assert retirable(holdings(300.0), keep_previous_s=300.0) == ["b", "c"]
    assert retirable(holdings(0.0), keep_previous_s=0.0) == ["b", "c"]
