from collections.abc import Callable

import pytest

from engines.errors import (
    ContradictoryFields,
    FewstepError,
    InvalidRequest,
    InvalidSize,
    ModelNotFound,
    Overloaded,
    StepsNotAllowed,
)
from engines.manifest import Guidance, StudentManifest
from engines.refine import FIRST_STEP
from engines.registry.base import Revision, TierTarget
from server.menu import AUTO, UNTIERED, Choice, Names, Wanted
from server.messages import TierSteps
from server.router import Expected, resolve
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


def unmeasured(_: TierTarget) -> Expected | None:
    return None


def measured(target: TierTarget) -> Expected | None:
    return busy(target, slower=1.0)


def busy(target: TierTarget, slower: float = 10.0) -> Expected | None:
    """At a load at which everything takes ten times as long as on an idle worker."""
    ms = MEASURED_MS.get(target.steps)
    return None if ms is None else Expected(ms, slower * ms)


Expect = Callable[[TierTarget], Expected | None]


def choices(
    wanted: Wanted, expect: Expect = unmeasured, revisions: tuple[Revision, ...] = (NOW, BEFORE)
) -> tuple[Choice, ...]:
    return resolve(wanted, revisions, MANIFESTS, expect=expect)


def choose(wanted: Wanted, expect: Expect = unmeasured, revisions: tuple[Revision, ...] = (NOW, BEFORE)) -> Choice:
    (choice,) = choices(wanted, expect, revisions)
    return choice


def refused(kind: type[FewstepError], wanted: Wanted, expect: Expect = unmeasured) -> str:
    with pytest.raises(kind) as caught:
        choose(wanted, expect)
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
    ("limit_ms", "tier", "downgraded"),
    [(5, "low", TierSteps(tier="medium", steps=4)), (20, "medium", None), (500, "high", None)],
)
def test_a_latency_limit_gets_the_best_tier_that_keeps_it(
    limit_ms: int, tier: str, downgraded: TierSteps | None
) -> None:
    choice = choose(Wanted("shapes", max_latency_ms=limit_ms), measured)
    assert (choice.tier, choice.downgraded_from) == (tier, downgraded)


def test_a_latency_limit_is_kept_at_the_present_load() -> None:
    assert choose(Wanted("shapes", max_latency_ms=120), busy).steps == 4
    assert choose(Wanted("shapes", max_latency_ms=99), busy).steps == 1


def test_a_latency_limit_may_get_a_count_between_two_tiers() -> None:
    def expect(target: TierTarget) -> Expected:
        return Expected(target.steps, 10.0 * target.steps)

    choice = choose(Wanted("shapes", max_latency_ms=25), expect)
    assert (choice.version, choice.steps, choice.tier) == (STUDENT.version, 2, "low")


def test_a_latency_limit_that_only_the_load_forbids_is_to_come_back() -> None:
    with pytest.raises(Overloaded) as caught:
        choose(Wanted("shapes", max_latency_ms=20), busy)
    assert caught.value.retry_after_s == pytest.approx(0.010)
    with pytest.raises(Overloaded, match="tier=medium takes about 100 ms"):
        choose(Wanted("shapes", tier="medium", max_latency_ms=20), busy)


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


def test_auto_is_the_default_tier_and_then_ever_fewer_steps() -> None:
    ladder = choices(Wanted("shapes", tier=AUTO))
    assert [(choice.tier, choice.steps) for choice in ladder] == [("medium", 4), ("low", 2), ("low", 1)]
    assert {choice.version for choice in ladder} == {STUDENT.version}
    above = TierSteps(tier="medium", steps=4)
    assert [choice.downgraded_from for choice in ladder] == [None, above, above]


def test_auto_goes_from_the_teacher_to_its_students() -> None:
    taught = NOW.model_copy(update={"default_tier": "high"})
    assert [choice.steps for choice in choices(Wanted("shapes", tier=AUTO), revisions=(taught,))] == [32, 4, 2, 1]


def test_a_teacher_takes_no_fewer_steps_than_its_tier_says() -> None:
    blurring = manifest("shapes", 2, 4, 32, mark=1, guidance=CFG).model_copy(update={"kind": "teacher"})
    alone = revision(1, {"high": (blurring, 32)}, default="high")
    wanted = Wanted("shapes", tier=AUTO)
    assert [choice.steps for choice in resolve(wanted, [alone], {blurring.version: blurring}, expect=unmeasured)] == [
        32
    ]


def test_a_rung_saves_a_third_of_the_rows_or_is_none() -> None:
    many = manifest("many", 1, 2, 3, 4, 5, 6, 7, 8, mark=1)
    one = revision(1, {"medium": (many, 8)})
    ladder = resolve(Wanted("shapes", tier=AUTO), [one], {many.version: many}, expect=unmeasured)
    assert [choice.steps for choice in ladder] == [8, 5, 3, 2, 1]


def test_auto_leaves_out_what_cannot_honour_guidance_or_size() -> None:
    taught = NOW.model_copy(update={"default_tier": "high"})
    ladder = choices(Wanted("shapes", tier=AUTO, guidance=3.0), revisions=(taught,))
    assert [choice.steps for choice in ladder] == [32]


@pytest.mark.parametrize("tier", [None, AUTO])
def test_who_names_steps_gets_them_and_no_ladder(tier: str | None) -> None:
    assert choose(Wanted("shapes", tier=tier, steps=2)).steps == 2
    assert choose(Wanted("shapes")).downgraded_from is None


def test_auto_of_a_named_version_stays_with_it() -> None:
    ladder = choices(Wanted(f"shapes-fast@{OLD.digest}", tier=AUTO))
    assert [(choice.version, choice.steps) for choice in ladder] == [(OLD.version, 4), (OLD.version, 1)]


TAUGHT = manifest("shapes-fast", 1, 2, 4, mark=2, base=TEACHER)


def refined(wanted: Wanted, **tiers: tuple[StudentManifest, int]) -> tuple[Choice, ...]:
    manifests = {student.version: student for student, _ in tiers.values()}
    return resolve(wanted, [revision(1, tiers)], manifests, expect=unmeasured)


def test_a_first_step_by_the_teacher_needs_it_in_the_deployment() -> None:
    wanted = Wanted("shapes", refinement=FIRST_STEP)
    (choice,) = refined(wanted, medium=(TAUGHT, 4), high=(TEACHER, 32))
    assert (choice.version, choice.steps) == (TAUGHT.version, 4)
    assert (choice.teacher, choice.refinement) == (TEACHER.version, FIRST_STEP)
    with pytest.raises(InvalidRequest, match="needs the teacher of shapes-fast@"):
        refined(wanted, medium=(TAUGHT, 4))
    with pytest.raises(InvalidRequest, match="takes one step"):
        refined(
            Wanted("shapes", tier="low", refinement=FIRST_STEP), low=(TAUGHT, 1), medium=(TAUGHT, 4), high=(TEACHER, 32)
        )


def test_auto_keeps_a_step_for_the_student_where_the_first_is_the_teacher_s() -> None:
    wanted = Wanted("shapes", tier=AUTO, refinement=FIRST_STEP)
    ladder = refined(wanted, low=(TAUGHT, 1), medium=(TAUGHT, 4), high=(TEACHER, 32))
    assert [choice.steps for choice in ladder] == [4, 2]


@pytest.mark.parametrize(("strength", "first"), [(0.25, 3), (0.5, 2), (0.6, 2), (0.75, 1), (1.0, 0)])
def test_a_picture_that_is_changed_comes_in_where_its_strength_says(strength: float, first: int) -> None:
    choice = choose(Wanted(model="shapes", strength=strength))
    assert (choice.steps, choice.edits_from) == (4, first)
    assert choose(Wanted(model="shapes")).edits_from is None


def test_a_strength_that_leaves_no_step_is_refused_with_the_least_that_does() -> None:
    assert "0.25" in refused(InvalidRequest, Wanted(model="shapes", steps=4, strength=0.2))


def test_auto_leaves_out_counts_that_would_leave_no_step_of_a_change() -> None:
    rungs = choices(Wanted(model="shapes", tier=AUTO, strength=0.5))
    assert [(rung.steps, rung.edits_from) for rung in rungs] == [(4, 2), (2, 1)]


def test_a_latency_limit_is_not_kept_by_leaving_no_step_of_a_change() -> None:
    assert choose(Wanted(model="shapes", max_latency_ms=12, strength=0.75), measured).steps == 4
    assert choose(Wanted(model="shapes", strength=0.3, max_latency_ms=20), measured).edits_from == 3


def test_what_is_changed_has_no_first_step_for_a_teacher() -> None:
    assert "refine" in refused(ContradictoryFields, Wanted(model="shapes", strength=0.5, refinement=FIRST_STEP))
