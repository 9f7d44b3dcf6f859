import pytest

from engines.errors import (
    ContradictoryFields,
    FewstepError,
    InvalidRequest,
    InvalidSize,
    ModelNotFound,
    StepsNotAllowed,
)
from engines.manifest import Guidance
from engines.registry.base import Revision, TierTarget
from server.router import UNTIERED, Choice, Names, Wanted, resolve
from tests.unit.server.manifests import CFG, manifest, revision

TEACHER = manifest("shapes", 32, mark=1, guidance=CFG)
STUDENT = manifest(
    "shapes-fast", 1, 2, 4, mark=2, guidance=Guidance(mode="baked", default=2.0, minimum=2.0, maximum=2.0)
)
OLD = manifest("shapes-fast", 1, 4, 8, mark=3)
MANIFESTS = {student.version: student for student in (TEACHER, STUDENT, OLD)}
NOW = revision(2, {"low": (STUDENT, 1), "medium": (STUDENT, 4), "high": (TEACHER, 32)})
BEFORE = revision(1, {"medium": (OLD, 4), "high": (TEACHER, 32)})
MEASURED_MS = {1: 3.0, 4: 10.0, 32: 150.0}


def unmeasured(_: TierTarget) -> float | None:
    return None


def measured(target: TierTarget) -> float | None:
    return MEASURED_MS.get(target.steps)


def choose(wanted: Wanted, latency=unmeasured, revisions: tuple[Revision, ...] = (NOW, BEFORE)) -> Choice:  # type: ignore[no-untyped-def]
    return resolve(wanted, revisions, MANIFESTS, latency_ms=latency)


def refused(kind: type[FewstepError], wanted: Wanted, latency=unmeasured) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(kind) as caught:
        choose(wanted, latency)
    return caught.value.message


def test_without_a_word_the_default_tier_serves() -> None:
    choice = choose(Wanted("shapes"))
    assert (choice.version, choice.tier, choice.steps) == (STUDENT.version, "medium", 4)
    assert (choice.width, choice.height) == (32, 32)


@pytest.mark.parametrize(("tier", "steps"), [("low", 1), ("medium", 4), ("high", 32)])
def test_a_tier_decides_the_steps(tier: str, steps: int) -> None:
    assert choose(Wanted("shapes", tier=tier)).steps == steps


def test_an_unknown_tier_is_refused_with_those_there_are() -> None:
    message = refused(InvalidRequest, Wanted("shapes", tier="ultra"))
    assert "'ultra'" in message
    assert "low, medium, high" in message


def test_a_tier_and_its_own_steps_agree() -> None:
    assert choose(Wanted("shapes", tier="medium", steps=4)).tier == "medium"


def test_a_tier_and_other_steps_contradict_and_both_are_named() -> None:
    message = refused(ContradictoryFields, Wanted("shapes", tier="medium", steps=2, names=Names(tier="quality")))
    assert "quality=medium" in message
    assert "steps=2" in message


@pytest.mark.parametrize(("steps", "tier"), [(1, "low"), (2, "low"), (4, "low"), (32, "high")])
def test_steps_choose_the_cheapest_tier_whose_version_allows_them(steps: int, tier: str) -> None:
    choice = choose(Wanted("shapes", steps=steps))
    assert (choice.tier, choice.steps) == (tier, steps)


def test_steps_outside_the_contract_are_refused_with_the_allowed_ones() -> None:
    names = Names(steps="num_inference_steps")
    message = refused(StepsNotAllowed, Wanted("shapes", steps=16, names=names))
    assert "num_inference_steps=16" in message
    assert "1, 2, 4, 32" in message


def test_steps_that_did_not_pass_the_gate_are_refused_though_the_student_has_them() -> None:
    gated = NOW.model_copy(update={"allowed": {STUDENT.version: [1, 4], TEACHER.version: [32]}})
    with pytest.raises(StepsNotAllowed, match="1, 4, 32"):
        choose(Wanted("shapes", steps=2), revisions=(gated,))


@pytest.mark.parametrize("digits", [12, 30, 64])
def test_a_named_version_serves_in_its_own_best_tier(digits: int) -> None:
    choice = choose(Wanted(f"shapes-fast@{STUDENT.digest[:digits]}"))
    assert (choice.version, choice.tier, choice.steps) == (STUDENT.version, "medium", 4)
    assert choose(Wanted(f"shapes@{TEACHER.digest[:digits]}")).steps == 32


def test_a_version_may_be_named_by_its_deployment() -> None:
    assert choose(Wanted(f"shapes@{STUDENT.digest[:12]}")).version == STUDENT.version


def test_the_previous_revision_serves_only_those_who_name_its_version() -> None:
    assert choose(Wanted(f"shapes-fast@{OLD.digest}")).version == OLD.version
    assert choose(Wanted(f"shapes-fast@{OLD.digest}", steps=8)).tier == "medium"
    assert "1, 2, 4, 32" in refused(StepsNotAllowed, Wanted("shapes", steps=8))


def test_a_version_that_serves_nowhere_is_not_found() -> None:
    assert "it has shapes-fast@" in refused(ModelNotFound, Wanted("shapes-fast@" + "0" * 12))


def test_fewer_than_twelve_digits_name_nothing() -> None:
    refused(ModelNotFound, Wanted(f"shapes-fast@{STUDENT.digest[:11]}"))


def test_a_version_and_a_tier_of_another_contradict() -> None:
    message = refused(ContradictoryFields, Wanted(f"shapes-fast@{STUDENT.digest}", tier="high"))
    assert "model=shapes-fast@" in message
    assert "tier=high" in message


def test_a_version_and_steps_it_does_not_allow_are_refused() -> None:
    message = refused(StepsNotAllowed, Wanted(f"shapes-fast@{STUDENT.digest}", steps=32))
    assert "choose from 1, 2, 4" in message


def test_a_version_no_tier_names_serves_in_the_counts_it_passed() -> None:
    extra = NOW.model_copy(update={"allowed": {**NOW.allowed, OLD.version: [1, 4]}})
    choice = choose(Wanted(f"shapes-fast@{OLD.digest}"), revisions=(extra,))
    assert (choice.tier, choice.steps) == (UNTIERED, 4)
    assert choose(Wanted(f"shapes-fast@{OLD.digest}", steps=1), revisions=(extra,)).steps == 1


@pytest.mark.parametrize(
    ("limit_ms", "tier", "downgraded"), [(5, "low", "medium"), (20, "medium", None), (500, "high", None)]
)
def test_a_latency_limit_gets_the_best_tier_that_keeps_it(limit_ms: int, tier: str, downgraded: str | None) -> None:
    choice = choose(Wanted("shapes", max_latency_ms=limit_ms), measured)
    assert (choice.tier, choice.downgraded_from) == (tier, downgraded)


def test_a_latency_limit_below_the_fastest_tier_is_refused_with_what_that_takes() -> None:
    assert "takes about 3 ms" in refused(InvalidRequest, Wanted("shapes", max_latency_ms=1), measured)


def test_unmeasured_a_latency_limit_gets_the_cheapest_tier() -> None:
    assert choose(Wanted("shapes", max_latency_ms=1)).tier == "low"


@pytest.mark.parametrize(
    "wanted", [Wanted("shapes", tier="high", max_latency_ms=20), Wanted("shapes", steps=32, max_latency_ms=20)]
)
def test_a_latency_limit_contradicts_what_has_precedence_over_it(wanted: Wanted) -> None:
    message = refused(ContradictoryFields, wanted, measured)
    assert "max_latency_ms=20" in message
    assert ("tier=high" if wanted.tier else "steps=32") in message


def test_a_size_that_is_made_is_kept_and_another_is_refused_with_those_there_are() -> None:
    assert choose(Wanted("shapes", size=(64, 48))).width == 64
    assert "32x32, 64x48" in refused(InvalidSize, Wanted("shapes", size=(48, 64)))


def test_guidance_outside_what_the_student_was_made_for_is_refused() -> None:
    assert "2.0..2.0" in refused(InvalidRequest, Wanted("shapes", guidance=3.0))
    assert choose(Wanted("shapes", tier="high", guidance=3.0)).steps == 32
