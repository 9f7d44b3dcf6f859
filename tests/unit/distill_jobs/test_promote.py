"""Which tier map a student is proposed with, and what becomes of a proposal."""

import pytest

from distill_jobs import promote
from engines.errors import NotFound, SwapRejected
from engines.manifest import Component, Schedule, StudentManifest
from engines.registry.base import Candidate, Outcome, Revision, TierTarget
from engines.registry.memory import MemoryRegistry

AT = "2026-01-01T00:00:00Z"
TEACHER, FIRST, SECOND = (f"{name}@{digit * 64}" for name, digit in (("teacher", "a"), ("first", "b"), ("second", "c")))


def revision(number: int = 1, **tiers: tuple[str, int]) -> Revision:
    targets = {tier: TierTarget(student=version, steps=steps) for tier, (version, steps) in tiers.items()}
    allowed: dict[str, list[int]] = {}
    for version, steps in tiers.values():
        allowed.setdefault(version, []).append(steps)
    return Revision(
        deployment="d", number=number, tiers=targets, default_tier=min(tiers), allowed=allowed, created_at=AT
    )


def test_only_the_students_own_tiers_are_replaced() -> None:
    current = revision(high=(TEACHER, 32), low=(FIRST, 1), medium=(FIRST, 4))
    new = promote.tier_map(current, SECOND, {"medium": 4}, [2, 4])
    assert {tier: target.student for tier, target in new.tiers.items()} == {
        "high": TEACHER, "low": FIRST, "medium": SECOND,
    }  # fmt: skip
    assert new.allowed == {TEACHER: [32], FIRST: [1, 4], SECOND: [2, 4]}


def test_a_version_that_no_tier_names_any_more_is_allowed_nothing() -> None:
    new = promote.tier_map(revision(high=(TEACHER, 32), low=(FIRST, 1)), SECOND, {"low": 1}, [1])
    assert set(new.allowed) == {TEACHER, SECOND}


def test_the_default_becomes_medium_with_the_first_student_and_then_stays_as_people_set_it() -> None:
    alone = revision(high=(TEACHER, 32))
    assert promote.tier_map(alone, FIRST, {"low": 1}, [1]).default_tier == "high"
    assert promote.tier_map(alone, FIRST, {"medium": 4}, [4]).default_tier == "medium"
    chosen = revision(high=(TEACHER, 32), medium=(FIRST, 4))
    assert promote.tier_map(chosen, SECOND, {"medium": 4}, [4]).default_tier == chosen.default_tier == "high"


def test_it_is_live_when_all_its_tiers_are() -> None:
    current = revision(high=(TEACHER, 32), low=(FIRST, 1))
    assert promote.is_live(current, FIRST, {"low": 1})
    assert not promote.is_live(current, FIRST, {"low": 1, "medium": 4})
    assert not promote.is_live(None, FIRST, {"low": 1})


class Workers:
    """Decide about the pending candidate each time that somebody waits."""

    def __init__(self, registry: MemoryRegistry, *decisions: str) -> None:
        self.registry, self.decisions = registry, list(decisions)

    def __call__(self) -> None:
        for candidate in self.registry.pending("d"):
            self.decide(candidate, self.decisions.pop(0))

    def decide(self, candidate: Candidate, state: str) -> None:
        number = None
        if state == "superseded":
            self.registry.propose(
                "d", candidate.tiers, default_tier="high", allowed=candidate.allowed, base_revision=1, note="newer"
            )
            return
        if state == "live":
            number = len(self.registry.history("d")) + 1
            self.registry.commit(candidate.revision(number, created_at=AT))
        outcome = Outcome(swap_id=candidate.swap_id, state=state, reason="too slow", revision=number, at=AT)
        self.registry.settle("d", candidate.swap_id, outcome)


def published(registry: MemoryRegistry) -> tuple[str, str]:
    part = Component(weights=registry.put_blob(b"w"), files={})
    versions = [
        registry.publish(
            StudentManifest(
                name=name, family="sd", kind="teacher", components={"encoder": part, "denoiser": part, "decoder": part},
                schedules={1: Schedule(times=(1.0, 0.0))}, resolutions=((8, 8),), latent_channels=4, downscale=8,
            )
        )
        for name in ("teacher", "first")
    ]  # fmt: skip
    registry.commit(revision(high=(versions[0], 1)))
    return versions[0], versions[1]


def propose(registry: MemoryRegistry, version: str, workers: Workers, timeout_s: float = 5.0) -> Outcome:
    return promote.promote(
        registry, "d", version, {"low": 1}, [1], note="n", announce=lambda _: None, pause=workers, timeout_s=timeout_s
    )


def test_a_student_that_workers_take_is_live() -> None:
    registry = MemoryRegistry()
    _, version = published(registry)
    assert propose(registry, version, Workers(registry, "live")).revision == 2
    assert promote.is_live(registry.current("d"), version, {"low": 1})


def test_a_student_that_workers_refuse_is_an_error_with_their_reason() -> None:
    registry = MemoryRegistry()
    _, version = published(registry)
    with pytest.raises(SwapRejected, match="too slow"):
        propose(registry, version, Workers(registry, "dropped"))


def test_a_proposal_that_was_overtaken_is_made_again() -> None:
    registry = MemoryRegistry()
    _, version = published(registry)
    assert propose(registry, version, Workers(registry, "superseded", "live", "live")).state == "live"


def test_nobody_waits_for_ever() -> None:
    registry = MemoryRegistry()
    _, version = published(registry)
    with pytest.raises(SwapRejected, match="not decided in time"):
        propose(registry, version, Workers(registry), timeout_s=0.0)


def test_a_deployment_that_does_not_exist_is_said_so() -> None:
    with pytest.raises(NotFound, match="does not exist"):
        propose(MemoryRegistry(), FIRST, Workers(MemoryRegistry()))
