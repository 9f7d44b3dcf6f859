"""The batcher's rules, as sentences; no clock, no engine."""

from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batcher import Batcher, LaneKey, Row, due

NET = LaneKey("denoise", "net", (4, 8, 8))
OTHER = LaneKey("denoise", "other", (4, 8, 8))
TEXT = LaneKey("encode", "text")
PIXELS = LaneKey("decode", "vae", (4, 8, 8))


def row(
    name: str,
    *,
    lane: LaneKey = NET,
    due_s: float = 0.0,
    deadline_s: float = 60.0,
    needs_s: float = 0.0,
    network_rows: int = 1,
    alone: bool = False,
    feeds: LaneKey | None = None,
) -> Row:
    return Row(
        request_id=name,
        lane=lane,
        due_s=due_s,
        deadline_s=deadline_s,
        needs_s=needs_s,
        network_rows=network_rows,
        alone=alone,
        feeds=feeds,
    )


def ids(rows: Iterable[Row]) -> list[str]:
    return [one.request_id for one in rows]


def batches(batcher: Batcher[Row]) -> Iterator[list[str]]:
    while batch := batcher.next_batch():
        yield ids(batch)


@pytest.fixture
def batcher() -> Batcher[Row]:
    return Batcher(sizes=(1, 2, 4))


def test_an_empty_batcher_has_nothing_to_run(batcher: Batcher[Row]) -> None:
    assert batcher.next_batch() == []


def test_a_single_waiting_row_runs_at_once(batcher: Batcher[Row]) -> None:
    batcher.add(row("a", due_s=1e9))
    assert list(batches(batcher)) == [["a"]]


def test_the_most_urgent_rows_of_a_lane_go_together(batcher: Batcher[Row]) -> None:
    for name, due_s in zip("abcde", (5.0, 1.0, 4.0, 2.0, 3.0), strict=True):
        batcher.add(row(name, due_s=due_s))
    assert list(batches(batcher)) == [["b", "d", "e", "c"], ["a"]]


def test_lanes_are_never_mixed_and_the_most_urgent_row_chooses(batcher: Batcher[Row]) -> None:
    batcher.add(row("late", due_s=3.0))
    batcher.add(row("first", lane=OTHER, due_s=1.0))
    batcher.add(row("later", lane=OTHER, due_s=9.0))
    assert list(batches(batcher)) == [["first", "later"], ["late"]]


def test_a_guided_row_weighs_two(batcher: Batcher[Row]) -> None:
    for name in "abc":
        batcher.add(row(name, network_rows=2))
    assert ids(batcher.next_batch()) == ["a", "b"]


def test_a_row_too_heavy_for_the_rest_of_a_batch_lets_a_lighter_one_pass(batcher: Batcher[Row]) -> None:
    for due_s, (name, weight) in enumerate([("a", 1), ("b", 2), ("heavy", 2), ("c", 1)]):
        batcher.add(row(name, network_rows=weight, due_s=due_s))
    assert list(batches(batcher)) == [["a", "b", "c"], ["heavy"]]


def test_a_row_heavier_than_every_size_still_runs() -> None:
    batcher: Batcher[Row] = Batcher(sizes=(1,))
    batcher.add(row("guided", network_rows=2))
    assert ids(batcher.next_batch()) == ["guided"]


def test_rows_returned_by_a_death_run_alone_with_their_own_request(batcher: Batcher[Row]) -> None:
    batcher.add(row("fine", due_s=2.0))
    batcher.add(row("suspect", alone=True, due_s=1.0))
    batcher.add(row("suspect", alone=True, due_s=1.0))
    batcher.add(row("another suspect", alone=True, due_s=1.5))
    assert list(batches(batcher)) == [["suspect", "suspect"], ["another suspect"], ["fine"]]


def test_a_suspect_never_joins_the_batch_of_a_more_urgent_row(batcher: Batcher[Row]) -> None:
    batcher.add(row("fine", due_s=1.0))
    batcher.add(row("suspect", alone=True, due_s=2.0))
    assert list(batches(batcher)) == [["fine"], ["suspect"]]


def test_prompts_are_encoded_first_while_the_step_they_would_join_has_room(batcher: Batcher[Row]) -> None:
    batcher.add(row("running", due_s=0.0))
    batcher.add(row("new", lane=TEXT, feeds=NET, due_s=5.0))
    assert list(batches(batcher)) == [["new"], ["running"]]


def test_prompts_wait_while_the_step_is_full_of_more_urgent_rows(batcher: Batcher[Row]) -> None:
    for name in "abcd":
        batcher.add(row(name))
    batcher.add(row("new", lane=TEXT, feeds=NET, due_s=5.0))
    assert list(batches(batcher)) == [["a", "b", "c", "d"], ["new"]]


def test_prompts_for_another_lane_do_not_delay_this_step(batcher: Batcher[Row]) -> None:
    batcher.add(row("running"))
    batcher.add(row("new", lane=TEXT, feeds=OTHER, due_s=5.0))
    assert list(batches(batcher)) == [["running"], ["new"]]


def test_finished_latents_are_decoded_before_later_rows_step(batcher: Batcher[Row]) -> None:
    batcher.add(row("younger", due_s=2.0))
    batcher.add(row("done", lane=PIXELS, due_s=1.0))
    assert list(batches(batcher)) == [["done"], ["younger"]]


def test_expired_rows_leave_and_the_others_stay(batcher: Batcher[Row]) -> None:
    batcher.add(row("late", deadline_s=1.0))
    batcher.add(row("in time", deadline_s=1.1))
    assert ids(batcher.expire(now_s=1.0)) == ["late"]
    assert list(batches(batcher)) == [["in time"]]


def test_a_row_that_cannot_be_in_time_any_more_leaves_where_another_can(batcher: Batcher[Row]) -> None:
    batcher.add(row("late", deadline_s=2.0, needs_s=1.5))
    batcher.add(row("in time", deadline_s=2.0, needs_s=0.5))
    assert [ids(batcher.expire(now_s)) for now_s in (0.49, 0.5, 0.6)] == [[], ["late"], []]
    assert list(batches(batcher)) == [["in time"]]


def test_one_that_keeps_nobody_waiting_stays_until_its_deadline(batcher: Batcher[Row]) -> None:
    batcher.add(row("late", deadline_s=2.0, needs_s=1.5))
    assert [ids(batcher.expire(now_s)) for now_s in (1.0, 1.9)] == [[], []]
    batcher.add(row("late too", deadline_s=1.95, needs_s=1.5))
    assert [ids(batcher.expire(now_s)) for now_s in (1.9, 1.95)] == [[], ["late too"]]
    batcher.add(row("in time", lane=PIXELS))
    assert [ids(batcher.expire(now_s)) for now_s in (1.96, 2.0, 59.9, 60.0)] == [["late"], [], [], ["in time"]]


def test_all_rows_of_a_canceled_request_leave_whatever_their_stage(batcher: Batcher[Row]) -> None:
    batcher.add(row("gone"))
    batcher.add(row("gone", lane=PIXELS))
    batcher.add(row("kept", lane=PIXELS))
    assert ids(batcher.remove(["gone", "unknown"])) == ["gone", "gone"]
    assert list(batches(batcher)) == [["kept"]]


def test_the_size_with_the_most_rows_a_second_is_taken() -> None:
    seconds = {1: 0.008, 8: 0.032}
    batcher: Batcher[Row] = Batcher(sizes=(1, 8), cost_of=lambda _, size: seconds[size])
    for name in "abc":
        batcher.add(row(name))
    assert list(batches(batcher)) == [["a"], ["b"], ["c"]]  # 125 rows/s one by one, 94 padded to eight
    for name in "abcde":
        batcher.add(row(name))
    assert list(batches(batcher)) == [["a", "b", "c", "d", "e"]]  # 156 rows/s padded


@pytest.mark.parametrize(("eight_s", "calls"), [(0.0208, 1), (0.0212, 2)])
def test_of_sizes_that_are_about_as_good_the_largest_is_taken(eight_s: float, calls: int) -> None:
    seconds = {4: 0.010, 8: eight_s}  # 400 rows/s against 385 and 377
    batcher: Batcher[Row] = Batcher(sizes=(4, 8), cost_of=lambda _, size: seconds[size])
    for name in "abcdefgh":
        batcher.add(row(name))
    assert len(list(batches(batcher))) == calls


def test_a_cheap_request_passes_a_dear_one_that_came_before() -> None:
    dear = due(arrived_s=0.0, deadline_s=60.0, cost_s=1.0, priority=0, ageing_s=1.0)
    cheap = due(arrived_s=1.0, deadline_s=61.0, cost_s=0.02, priority=0, ageing_s=1.0)
    assert cheap < dear


def test_a_dear_request_is_not_passed_by_cheap_ones_for_ever() -> None:
    dear = due(arrived_s=0.0, deadline_s=90.0, cost_s=1.0, priority=0, ageing_s=1.0)
    cheap = due(arrived_s=64.1, deadline_s=150.0, cost_s=0.02, priority=0, ageing_s=1.0)
    assert dear < cheap


def test_the_deadline_counts_when_it_is_near_and_priority_beats_arrival() -> None:
    urgent = due(arrived_s=5.0, deadline_s=5.2, cost_s=1.0, priority=0, ageing_s=1.0)
    relaxed = due(arrived_s=4.0, deadline_s=64.0, cost_s=1.0, priority=0, ageing_s=1.0)
    high = due(arrived_s=5.0, deadline_s=65.0, cost_s=0.05, priority=5, ageing_s=1.0)
    assert high < urgent < relaxed


rows = st.builds(
    row,
    st.sampled_from("abcdefgh"),
    lane=st.sampled_from([NET, OTHER, TEXT, PIXELS]),
    due_s=st.floats(0, 100),
    network_rows=st.sampled_from([1, 2]),
    alone=st.booleans(),
    feeds=st.sampled_from([NET, OTHER]),
)
sizes = st.sampled_from([(1,), (1, 8), (1, 2, 4, 8), (4,)])


@given(st.lists(rows, max_size=40), sizes)
def test_no_row_is_lost_or_run_twice_and_no_batch_breaks_a_rule(given_rows: list[Row], sizes: tuple[int, ...]) -> None:
    batcher: Batcher[Row] = Batcher(sizes=sizes)
    for one in given_rows:
        batcher.add(one)
    ran: list[Row] = []
    while batch := batcher.next_batch():
        assert len({one.lane for one in batch}) == 1
        assert len(batch) == 1 or sum(one.network_rows for one in batch) <= sizes[-1]
        assert len({one.request_id for one in batch}) == 1 or not any(one.alone for one in batch)
        ran += batch
    assert len(batcher) == 0
    assert sorted(map(id, ran)) == sorted(map(id, given_rows))


@given(st.lists(st.tuples(st.integers(-4, 4), st.floats(0.001, 1.0)), min_size=1, max_size=4), st.integers(1, 10))
def test_no_row_starves_under_a_stream_of_more_urgent_ones(stream: list[tuple[int, float]], low: int) -> None:
    """One lane, one row a second of capacity, two a second arriving for ever: the low row runs within its bound."""
    batcher: Batcher[Row] = Batcher(sizes=(1,))

    def arriving(name: str, now_s: float, priority: int, cost_s: float) -> Row:
        deadline_s = now_s + 60
        due_s = due(arrived_s=now_s, deadline_s=deadline_s, cost_s=cost_s, priority=priority, ageing_s=1.0, stretch=8.0)
        return row(name, due_s=due_s, deadline_s=1e9)

    batcher.add(arriving("low", 0.0, -low, 1.0))
    for now_s in range(200):
        for priority, cost_s in stream[:2]:
            batcher.add(arriving("stream", float(now_s), priority, cost_s))
        if ids(batcher.next_batch()) == ["low"]:
            # due at 8 + low; what is ahead of it arrived in at most 8 + low + 4 seconds at two a second
            assert now_s <= 2 * (8 + low + 4) + 2
            return
    pytest.fail("the low row never ran")


def test_a_decision_looks_at_the_front_of_a_lane_however_many_wait() -> None:
    looked: list[str] = []

    class Watched(Row):
        def __getattribute__(self, name: str) -> object:
            if name in ("alone", "request_id"):
                looked.append(name)
            return super().__getattribute__(name)

    batcher: Batcher[Row] = Batcher(sizes=(1, 2, 4))
    for number in range(2000):
        batcher.add(Watched(request_id=str(number), lane=NET, due_s=float(number), deadline_s=60.0))
    looked.clear()
    assert [one.due_s for one in batcher.next_batch()] == [0.0, 1.0, 2.0, 3.0]
    assert len(looked) < 100


def test_deadlines_are_kept_in_mind_when_the_nearest_has_gone(batcher: Batcher[Row]) -> None:
    batcher.add(row("ran", deadline_s=1.0))
    batcher.next_batch()
    batcher.add(row("second", deadline_s=2.0))
    batcher.add(row("third", deadline_s=3.0))
    assert [ids(batcher.expire(now_s)) for now_s in (1.0, 1.5, 2.5, 2.9, 3.0, 9.0)] == [
        [],
        [],
        ["second"],
        [],
        ["third"],
        [],
    ]
    batcher.add(row("new", deadline_s=9.5))
    assert ids(batcher.expire(10.0)) == ["new"]


@given(st.lists(rows, min_size=1, max_size=40))
def test_rows_run_in_the_order_of_their_due_times(given_rows: list[Row]) -> None:
    """Earliest due first within a lane, where nothing else (weights, company, prompts) decides."""
    batcher: Batcher[Row] = Batcher(sizes=(1, 2, 4))
    for one in given_rows:
        one.lane, one.network_rows, one.alone = NET, 1, False
        batcher.add(one)
    ran = [one for batch in iter(batcher.next_batch, []) for one in batch]
    assert [id(one) for one in ran] == [id(one) for one in sorted(given_rows, key=lambda one: one.due_s)]
