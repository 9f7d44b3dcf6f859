import pytest

from engines.errors import GateFailed, InvalidRequest
from engines.registry.base import Registry, Revision
from engines.registry.memory import MemoryRegistry
from server.promotion import merged, passed
from tests.unit.server.manifests import manifest, publish, revision

TEACHER, STUDENT = manifest("shapes", 8, mark=1), manifest("shapes-fast", 1, 2, 4, mark=2)
FIRST = revision(1, {"high": (TEACHER, 8)}, default="high")
REPORT = {"gates": {"passed_steps": [1, 4, 64]}}


@pytest.fixture
def registry() -> Registry:
    made = MemoryRegistry()
    publish(made, TEACHER, STUDENT)
    return made


def promoted(registry: Registry, current: Revision | None, default: str | None = None, **tiers: int) -> Revision:
    targets = {tier: (STUDENT.version, steps) for tier, steps in tiers.items()}
    made = merged(registry, "shapes", current, targets, default)
    return Revision(
        deployment="shapes",
        number=1 if current is None else current.number + 1,
        tiers=made.tiers,
        default_tier=made.default_tier,
        allowed=made.allowed,
        created_at="2026-01-02T03:04:05+00:00",
    )


def test_only_the_named_tiers_are_replaced(registry: Registry) -> None:
    new = promoted(registry, FIRST, low=1)
    assert (new.tiers["high"], new.tiers["low"].steps) == (FIRST.tiers["high"], 1)


def test_the_default_moves_to_medium_with_the_first_student_and_then_stays_where_it_was_put(registry: Registry) -> None:
    assert promoted(registry, FIRST, low=1).default_tier == "high"
    second = promoted(registry, FIRST, medium=4)
    assert second.default_tier == "medium"
    third = promoted(registry, second, "low", low=1)
    assert third.default_tier == "low"
    assert promoted(registry, third, medium=2).default_tier == "low"


def test_a_new_deployment_gets_a_default_too(registry: Registry) -> None:
    assert promoted(registry, None, low=1, medium=4).default_tier == "medium"
    assert promoted(registry, None, low=1).default_tier == "low"


def test_a_default_that_is_no_tier_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidRequest, match="ultra"):
        promoted(registry, FIRST, "ultra", low=1)


def test_counts_that_did_not_pass_are_neither_served_nor_allowed(registry: Registry) -> None:
    registry.put_report(STUDENT.version, REPORT)
    assert promoted(registry, FIRST, low=1).allowed[STUDENT.version] == [1, 4]
    with pytest.raises(GateFailed, match="passed at 1, 4"):
        promoted(registry, FIRST, low=2)


def test_what_no_tier_names_any_more_is_allowed_nothing(registry: Registry) -> None:
    assert set(promoted(registry, FIRST, high=4).allowed) == {STUDENT.version}


def test_an_unjudged_student_may_do_what_it_was_made_for() -> None:
    assert passed(STUDENT, None) == passed(STUDENT, {"fd": 3}) == {1, 2, 4}
    assert passed(STUDENT, {"gates": {"passed_steps": []}}) == frozenset()
