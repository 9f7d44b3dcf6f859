"""Which state follows which, and that an owner who was replaced can write nothing."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jobs.jobs import ENDED, DistillJob, Entry, JobState, check_command, claimed, first, moved
from engines.errors import AlreadyEnded, Conflict, FewstepError, LeaseLost

AT = "2026-01-01T00:00:00Z"


def job(*states: JobState) -> DistillJob:
    log = (first(AT), *(Entry(number=i, state=state, at=AT, fence=1) for i, state in enumerate(states, 2)))
    return DistillJob("dj_1", {}, log)


def extended(before: DistillJob, entry: Entry) -> DistillJob:
    return DistillJob(before.id, before.spec, (*before.log, entry))


def test_a_job_goes_through_its_states_in_order() -> None:
    now = job()
    now = extended(now, claimed(now, "a", AT))
    for name in ("preparing", "running", "exporting", "evaluating", "publishing", "succeeded"):
        now = extended(now, moved(now, JobState(name), at=AT, fence=now.fence))
    assert now.ended
    assert now.finished_at == AT


@pytest.mark.parametrize(
    ("state", "to"),
    [
        (JobState.QUEUED, JobState.SUCCEEDED),
        (JobState.RUNNING, JobState.PUBLISHING),
        (JobState.PAUSED, JobState.RUNNING),
    ],
)
def test_no_state_is_skipped(state: JobState, to: JobState) -> None:
    with pytest.raises(Conflict, match="cannot become"):
        moved(job(state), to, at=AT, fence=1)


@pytest.mark.parametrize("state", sorted(frozenset(JobState) - ENDED - {JobState.PAUSED}))
def test_work_may_be_laid_aside_at_any_point(state: JobState) -> None:
    paused = moved(job(state), JobState.PAUSED, at=AT, fence=1)
    assert moved(extended(job(state), paused), JobState.QUEUED, at=AT).state is JobState.QUEUED


@pytest.mark.parametrize("state", sorted(ENDED))
def test_nothing_follows_an_end(state: JobState) -> None:
    for to in JobState:
        with pytest.raises(AlreadyEnded):
            moved(job(state), to, at=AT, fence=9)
    with pytest.raises(AlreadyEnded):
        claimed(job(state), "a", AT)


def test_the_earlier_of_two_owners_writes_nothing_more() -> None:
    before = job(JobState.PREPARING, JobState.RUNNING)
    taken = extended(before, claimed(before, "second", AT))
    with pytest.raises(LeaseLost, match="taken over"):
        moved(taken, JobState.EXPORTING, at=AT, fence=before.fence)
    assert moved(taken, JobState.EXPORTING, at=AT, fence=taken.fence).fence == taken.fence


def test_only_its_owner_moves_a_job_that_is_worked_on() -> None:
    with pytest.raises(Conflict, match="owned"):
        moved(job(JobState.RUNNING), JobState.CANCELED, at=AT)
    assert moved(job(), JobState.CANCELED, at=AT).state is JobState.CANCELED


def test_a_paused_job_is_not_claimed() -> None:
    with pytest.raises(Conflict, match="resume it first"):
        claimed(job(JobState.PAUSED), "a", AT)


@pytest.mark.parametrize(
    ("state", "command", "allowed"),
    [
        (JobState.RUNNING, "pause", True),
        (JobState.EVALUATING, "pause", False),
        (JobState.EVALUATING, "cancel", True),
        (JobState.RUNNING, "resume", False),
        (JobState.PAUSED, "resume", True),
        (JobState.SUCCEEDED, "cancel", False),
    ],
)
def test_commands_are_refused_where_they_cannot_work(state: JobState, command: str, allowed: bool) -> None:
    if allowed:
        check_command(job(state), command)
    else:
        with pytest.raises(Conflict, match=command):
            check_command(job(state), command)


@given(st.lists(st.tuples(st.sampled_from(JobState), st.integers(0, 1), st.booleans()), max_size=30))
def test_whatever_is_tried_the_log_stays_a_legal_history(tries: list[tuple[JobState, int, bool]]) -> None:
    now, fences = job(), [0, 0]
    for to, who, claim in tries:
        try:
            entry = claimed(now, str(who), AT) if claim else moved(now, to, at=AT, fence=fences[who])
        except FewstepError:
            continue
        fences[who] = entry.fence
        now = extended(now, entry)
    numbers = [entry.number for entry in now.log]
    assert numbers == list(range(1, len(now.log) + 1))
    assert [e.fence for e in now.log] == sorted(e.fence for e in now.log)
    assert not [a for a, _ in itertools.pairwise(now.log) if a.state in ENDED]
