"""What the whole scheduler promises, on recorded costs and a simulated clock; batcher, queues, room and admission are
those of production."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.clients import closed
from bench.fleet import STAGES, Asked, Fleet, Policy, Told, production
from bench.simulation import Simulation
from engines.cost import CostKey, CostModel

TEACHER = {"model": "teacher", "network_rows": 2}
quick = settings(max_examples=20, deadline=None)
few = settings(max_examples=6, deadline=None)


def costs(times: float = 1.0) -> CostModel:
    model = CostModel()
    for stage, call_s, row_s in (("encode", 0.0005, 0.0002), ("denoise", 0.003, 0.0025), ("decode", 0.001, 0.0015)):
        for size in (1, 2, 4, 8):
            model.observe(CostKey(stage, stage, ()), size, times * (call_s + row_s * size))
    return model


ONE = Fleet(costs())
TWO = Fleet(costs(), streams=2, overlapped=costs(1.2))
"""Two calls at once, each a fifth slower beside the other."""
UNBATCHED = Fleet(costs(), sizes=(1,))
fleets = st.sampled_from([ONE, TWO])
unbatched = st.sampled_from([UNBATCHED, replace(TWO, sizes=(1,))])


def run(asked: Sequence[Asked], fleet: Fleet = ONE, policy: Policy | None = None) -> list[Told]:
    simulation = Simulation(fleet, policy or Policy())
    told = simulation.run(asked)
    assert simulation.wasted_s == 0.0, "a worker was idle while a request waited"
    return told


def busy_s(fleet: Fleet, asked: Asked) -> float:
    """A request by itself while the other streams run as well."""
    return replace(fleet, costs=fleet.busy).alone_s(asked)


def every(seconds: float, until_s: float, **given: object) -> list[Asked]:
    return [Asked(at_s=i * seconds, **given) for i in range(int(until_s / seconds))]  # type: ignore[arg-type]


requests = st.lists(
    st.builds(
        Asked,
        at_s=st.floats(0, 1),
        steps=st.sampled_from([1, 2, 4, 8]),
        model=st.sampled_from(["student", "other"]),
        network_rows=st.sampled_from([1, 2]),
        n=st.integers(1, 3),
        owner=st.sampled_from("ab"),
        priority=st.integers(-10, 10),
        budget_s=st.sampled_from([0.05, 0.3, 60.0]),
        leaves_s=st.none() | st.floats(0, 0.3),
        prompt_known=st.booleans(),
    ),
    max_size=40,
)


@given(requests, fleets, st.integers(1, 4))
@quick
def test_every_request_has_its_one_end_and_all_of_its_work(asked: list[Asked], fleet: Fleet, workers: int) -> None:
    for told in run(asked, replace(fleet, workers=workers)):
        one = told.asked
        if told.ending == "succeeded":
            assert (told.evaluations, told.decoded) == (one.n * one.steps * one.network_rows, one.n)
            assert told.latency_s <= min(one.budget_s, one.leaves_s or 1e9) + 1e-9
        elif told.ending == "canceled":
            assert told.latency_s == pytest.approx(one.leaves_s)
        else:
            assert told.ending == "expired"
            least_s = one.steps * fleet.least_s("denoise") + sum(map(fleet.least_s, ("encode", "decode")))
            assert one.budget_s - least_s - 1e-9 <= told.latency_s <= one.budget_s + 1e-9


def in_time(asked: Sequence[Asked], fleet: Fleet, **policy: bool) -> float:
    """The share of these that is done within three times what it takes alone, where each says so."""
    told = run([replace(one, budget_s=3 * fleet.alone_s(one)) for one in asked], fleet, Policy(**policy))
    return sum(one.ending == "succeeded" for one in told) / len(told)


@pytest.mark.parametrize("fleet", [ONE, TWO])
def test_those_in_a_hurry_are_not_kept_out_by_what_they_pass(fleet: Fleet) -> None:
    admitting, rng = replace(fleet, max_wait_s=10.0), Random(1)
    kinds = [Asked(at_s=0.0, steps=1)] * 9 + [Asked(at_s=0.0, steps=32, **TEACHER)]
    rate, at_s, asked = 0.9 * len(kinds) / sum(map(fleet.queued_s, kinds)), 0.0, list[Asked]()
    for _ in range(1000):
        at_s += rng.expovariate(rate)
        asked.append(replace(rng.choice(kinds), at_s=at_s))
    everybody, by_urgency = in_time(asked, fleet), in_time(asked, admitting)
    assert by_urgency >= everybody
    assert by_urgency > 4 * in_time(asked, admitting, urgency=False)
    assert everybody > in_time(asked, fleet, giving_up=False)


@given(fleets, st.sampled_from([1, 2, 4, 32]), st.sampled_from([1, 2]), st.booleans())
@quick
def test_one_request_after_the_other_is_as_fast_as_without_batching(
    fleet: Fleet, steps: int, rows: int, known: bool
) -> None:
    for told in run(every(1.0, 3.0, steps=steps, network_rows=rows, prompt_known=known), fleet):
        assert told.latency_s == pytest.approx(ONE.alone_s(told.asked))


@given(st.lists(st.sampled_from([1, 2, 4, 32]), min_size=1, max_size=30))
@quick
def test_an_engine_with_work_never_pauses(steps: list[int]) -> None:
    told = run([Asked(at_s=0.0, steps=each) for each in steps], UNBATCHED)
    assert max(one.ended_s for one in told) == pytest.approx(sum(UNBATCHED.alone_s(one.asked) for one in told))


def test_calls_beside_others_take_longer_and_a_lone_one_until_it_is_none() -> None:
    fleet = Fleet(costs(), streams=2, overlapped=costs(1.5), sizes=(1,))
    call_s = fleet.seconds("decode", 1)
    step_s = fleet.seconds("denoise", 1)
    late_s = step_s / 2  # half of the first call is done, alone
    short, long = run([Asked(at_s=0.0, steps=1, prompt_known=True), Asked(at_s=0.0, steps=4, prompt_known=True)], fleet)
    first, _ = run([Asked(at_s=0.0, steps=1, prompt_known=True), Asked(at_s=late_s, steps=4, prompt_known=True)], fleet)
    assert first.latency_s == pytest.approx(late_s + 1.5 * (step_s / 2 + call_s))
    assert short.latency_s == pytest.approx(1.5 * (step_s + call_s))
    # The long one has begun its second step beside it, and has all threads from the third on.
    assert long.latency_s == pytest.approx(1.5 * 2 * step_s + 2 * step_s + call_s)


@given(st.sampled_from([1.0, 1.2, 2.0]), st.lists(st.sampled_from([1, 2, 4]), min_size=20, max_size=40))
@quick
def test_streams_divide_the_work_among_them(slower: float, steps: list[int]) -> None:
    one, two = UNBATCHED, replace(UNBATCHED, streams=2, overlapped=costs(slower))
    asked = [Asked(at_s=0.0, steps=each) for each in steps]
    last_s = {fleet.streams: max(told.ended_s for told in run(asked, fleet)) for fleet in (one, two)}
    longest_s = slower * max(two.alone_s(each) for each in asked)
    assert last_s[1] * slower / 2 - longest_s <= last_s[2] <= last_s[1] * slower / 2 + longest_s


@given(unbatched, st.lists(st.integers(0, 1000), min_size=3, max_size=12, unique=True))
@quick
def test_of_equally_dear_requests_the_earliest_deadline_ends_first(fleet: Fleet, order: list[int]) -> None:
    budgets_s = [0.2 + each / 10_000 for each in order]  # all can be met: 12 requests take .12 s
    told = run([Asked(at_s=0.0, steps=1, budget_s=budget_s) for budget_s in budgets_s], fleet)
    # A call of each stream has begun before the others came; everything else begins in order.
    later = sorted(told[fleet.streams :], key=lambda one: (one.ended_s, one.asked.budget_s))
    turns = [sorted(one.asked.budget_s for one in later).index(one.asked.budget_s) for one in later]
    assert all(abs(turn - place) < fleet.streams for place, turn in enumerate(turns))


@given(fleets, st.floats(0.5, 4.0), st.sampled_from([0, 4, 9]), st.integers(4, 40))
@quick
def test_long_teacher_rows_delay_an_urgent_step_by_at_most_one_of_theirs(
    fleet: Fleet, at_s: float, priority: int, rows: int
) -> None:
    teachers = [Asked(at_s=i / 20, steps=32, **TEACHER) for i in range(rows)]  # type: ignore[arg-type]
    urgent = Asked(at_s=at_s, steps=1, priority=priority)
    [told] = [one for one in run([*teachers, urgent], fleet) if one.asked is urgent]
    longest_s = max(fleet.busy_s(stage, 8) for stage in STAGES)
    own_s = fleet.busy_s("encode", 8) + fleet.busy_s("denoise", 1) + fleet.busy_s("decode", 8)  # in company
    assert told.latency_s <= own_s + longest_s + 1e-9


def test_without_a_place_for_what_overtakes_long_rows_would_shut_short_ones_out() -> None:
    """What the bound above owes to `slack_below_ms`."""
    teachers = [Asked(at_s=i / 50, steps=32, **TEACHER) for i in range(20)]  # type: ignore[arg-type]
    latest = {}
    for overtaking in (True, False):
        urgent = [Asked(at_s=at_s, steps=1) for at_s in (0.3, 0.5, 0.7)]
        told = run([*teachers, *urgent], policy=Policy(overtaking=overtaking))
        latest[overtaking] = max(one.latency_s for one in told if one.asked in urgent)
    assert latest[False] > 5 * latest[True]


@given(
    unbatched,
    st.lists(st.tuples(st.sampled_from([1, 4]), st.integers(-4, 4)), min_size=1, max_size=3),
    st.sampled_from([4, 8]),
    st.integers(-4, 0),
)
@example(UNBATCHED, [(4, -1)], 4, 0)  # two requests were begun before it ends: one before its claim and one after
@few
def test_no_row_starves(fleet: Fleet, stream: list[tuple[int, int]], steps: int, priority: int) -> None:
    """At twice the load that there is room for. What comes `stretch` times a row's cost (and eight priorities) after
    its claim is due later, so that all that can go before it, with a request that was begun on each stream, is what
    came before; and so it is again after the claim, from which due times count."""
    pace_s = sum(busy_s(fleet, Asked(at_s=0, steps=each)) for each, _ in stream) / 2 / fleet.streams
    row = Asked(at_s=0.5, steps=steps, priority=priority, budget_s=1e6)
    others = [
        Asked(at_s=i * pace_s, steps=each, priority=urgency, budget_s=1e6)
        for i in range(int(1.5 / pace_s))
        for each, urgency in stream
    ]
    told = run([*others, row], fleet)
    mine = told[-1]
    queued_s = production(mine, 0)
    one_s = max(busy_s(fleet, one.asked) for one in told)

    def before_s(until_s: float) -> float:
        before = sum(busy_s(fleet, one.asked) for one in told if one.asked.at_s + production(one, 0) <= until_s)
        return before / fleet.streams

    assert mine.claimed_s is not None
    assert mine.claimed_s - 0.5 <= before_s(0.5 + queued_s) + one_s
    assert mine.ended_s - mine.claimed_s <= before_s(mine.claimed_s + queued_s) + one_s
    assert queued_s <= 64 * fleet.queued_s(row) + 4


@given(fleets, st.integers(1, 2), st.sampled_from([1, 4]), st.floats(0.1, 0.4))
@few
def test_a_key_that_floods_holds_nobody_else_up(fleet: Fleet, workers: int, steps: int, pause_s: float) -> None:
    """What a worker holds when another key's request comes may end first, and no more of the flood."""
    fleet = replace(fleet, workers=workers)
    flood_s = fleet.queued_s(Asked(at_s=0, steps=steps)) / workers / 2  # twice what there is room for
    flood = every(flood_s, 1.5, steps=steps, owner="flood")
    calm = [Asked(at_s=0.5 + i * pause_s, steps=1, owner="quiet") for i in range(4)]
    told = run([*flood, *calm], fleet)
    worst_s = max(one.latency_s for one in told if one.asked.owner == "quiet")
    calls = steps * (1 + fleet.streams) / fleet.streams + 2  # of what is held, on each stream
    held_s = calls * fleet.busy_s("denoise", 8) + 3 * (fleet.busy_s("decode", 8) + fleet.busy_s("encode", 8))
    assert worst_s <= 2 * held_s + busy_s(fleet, calm[0])
    assert max(one.latency_s for one in told if one.asked.owner == "flood") > 0.4


@pytest.mark.parametrize("fleet", [ONE, TWO])
def test_what_would_wait_too_long_is_refused_and_the_rest_waits_no_longer(fleet: Fleet) -> None:
    fleet = replace(fleet, max_wait_s=0.5)
    told = run(every(fleet.queued_s(Asked(at_s=0, steps=2)) / 2, 4.0, steps=2), fleet)
    served = [one for one in told if one.ending == "succeeded"]
    assert 0.3 < len(served) / len(told) < 0.7
    assert max(one.latency_s for one in served) < 2 * 0.5


@given(fleets, st.integers(1, 2), st.sampled_from([1, 4]), st.floats(1.5, 4.0))
@few
def test_a_calm_key_is_not_refused_for_what_another_floods_with(
    fleet: Fleet, workers: int, steps: int, times: float
) -> None:
    fleet = replace(fleet, workers=workers, max_wait_s=1.0)
    flood_s = fleet.queued_s(Asked(at_s=0, steps=steps)) / workers / times
    flood = every(flood_s, 4.0, steps=steps, owner="flood")
    calm = [Asked(at_s=0.5 + 0.1 * i, steps=1, owner="calm") for i in range(30)]
    told = run([*flood, *calm], fleet)
    ends = {owner: [one for one in told if one.asked.owner == owner] for owner in ("flood", "calm")}
    assert all(one.ending == "succeeded" for one in ends["calm"])
    assert any(one.ending == "shed" for one in ends["flood"])
    assert max(one.latency_s for one in ends["flood"] if one.ending == "succeeded") < 2 * 1.0


def test_workers_share_one_queue() -> None:
    asked = [Asked(at_s=0.0, steps=4, prompt_known=True) for _ in range(400)]
    last = {workers: max(one.ended_s for one in run(asked, Fleet(costs(), workers))) for workers in (1, 4)}
    assert 3.5 < last[1] / last[4] <= 4.0


def test_a_closed_loop_asks_again_when_it_is_answered() -> None:
    """Two clients that each wait between an answer and their next request are what one stream has time for."""
    told = closed(UNBATCHED, {1: 0.5, 4: 0.5}, clients=2, seconds=2.0, around_s=0.1, seed=1)
    by_end = sorted(told, key=lambda one: one.ended_s)
    for one in told[2:]:
        assert any(one.asked.at_s == pytest.approx(other.ended_s + 0.1) for other in by_end)
    cycle_s = sum(one.latency_s + 0.1 for one in told) / len(told)
    assert len(told) == pytest.approx(2 * 2.0 / cycle_s, abs=2)
