"""Keys take turns by the engine time they were handed out; of its own requests a key gets the most due first."""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.fair_queue import FairQueue, Source, Waiting, in_turn, take
from server.messages import CLASSES


def waiting(name: str, owner: str = "a", *, rows: int = 1, due_s: float = 0.0, cost_s: float = 1.0) -> Waiting[str]:
    return Waiting(name, owner, rows, 0.0, due_s, cost_s)


def queue(*given: Waiting[str]) -> FairQueue[str]:
    made: FairQueue[str] = FairQueue()
    for one in given:
        made.add(one)
    return made


def served(queue: FairQueue[str]) -> Iterator[str]:
    while (one := queue.peek()) is not None:
        queue.pop(one)
        yield one.key


def test_one_key_is_served_by_due_time_and_equal_ones_in_the_order_they_came() -> None:
    assert list(served(queue(*(waiting(f"{due_s}{i}", due_s=due_s) for i, due_s in enumerate([3, 1, 2, 1]))))) == [
        "11",
        "13",
        "22",
        "30",
    ]


def test_a_key_that_floods_waits_behind_itself() -> None:
    made = queue(*(waiting(f"flood{i}", "flood") for i in range(100)))
    assert list(served(queue())) == []
    order = served(made)
    assert [next(order) for _ in range(3)] == ["flood0", "flood1", "flood2"]
    made.add(waiting("other", "other", due_s=50.0))
    assert "other" in [next(order) for _ in range(2)]


def test_time_is_shared_and_not_requests() -> None:
    made = queue(*(waiting(f"dear{i}", "dear", cost_s=4.0) for i in range(9)))
    for i in range(36):
        made.add(waiting(f"cheap{i}", "cheap"))
    first = list(served(made))[:25]
    assert sum(name.startswith("dear") for name in first) == 5


def test_who_was_away_has_saved_up_nothing() -> None:
    made = queue(*(waiting(f"a{i}") for i in range(50)))
    order = served(made)
    for _ in range(40):
        next(order)
    for i in range(10):
        made.add(waiting(f"b{i}", "b"))
    following = [next(order) for _ in range(10)]
    assert 4 <= sum(name.startswith("b") for name in following) <= 6


def test_who_leaves_and_comes_back_is_still_charged() -> None:
    made = queue(*(waiting(f"a{i}") for i in range(9)), waiting("b0", "b", cost_s=5.0))
    order = served(made)
    assert {next(order), next(order)} == {"a0", "b0"}
    made.add(waiting("b1", "b"))
    assert [next(order) for _ in range(4)] == ["a1", "a2", "a3", "a4"]


def test_a_request_that_ended_while_it_waited_leaves_and_costs_nothing() -> None:
    made = queue(waiting("gone"), waiting("kept"), waiting("b", "b"))
    made.remove("gone", "a")
    made.remove("unknown", "nobody")
    assert len(made) == 2
    assert list(served(made)) == ["kept", "b"]


def test_keys_take_turns_where_nothing_was_measured() -> None:
    made = queue(*(waiting(f"{owner}{i}", owner, cost_s=0.0) for i in range(3) for owner in "ab"))
    assert list(served(made)) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def keys(taken: list[Waiting[str]]) -> list[str]:
    return [one.key for one in taken]


def test_what_is_taken_fits_and_a_request_larger_than_the_room_comes_alone() -> None:
    made = queue(waiting("a", rows=2), waiting("b", rows=2, due_s=1), waiting("c", due_s=2))
    assert keys(take([Source(made, below=True)], 3, 3)) == ["a"]
    assert keys(take([Source(made, below=True)], 1, 1)) == ["b"]
    assert keys(take([Source(made, below=True)], 1, 0)) == []


def test_the_place_kept_for_class_high_takes_what_should_be_done_soon() -> None:
    normal = queue(waiting("late", due_s=9.0), waiting("urgent", "b", due_s=1.0), waiting("urgent too", "c", due_s=2.0))
    high = queue(waiting("high", due_s=99.0))
    assert keys(take([Source(high, below=False), Source(normal, below=True)], 3, 0, slack_below_s=5.0)) == [
        "high",
        "urgent",
        "urgent too",
    ]
    assert keys(take([Source(normal, below=True)], 3, 0, slack_below_s=5.0)) == []
    assert keys(take([Source(normal, below=True)], 3, 1)) == ["late"]


class Shares:
    """A queue, and for each two keys that both wait what each was handed out since they do."""

    def __init__(self, dearest: dict[str, float]) -> None:
        self.queue: FairQueue[str] = FairQueue()
        self.order: list[str] = []
        self._dearest, self._waits = dearest, Counter[str]()
        self._given: dict[tuple[str, str], Counter[str]] = {}

    def add(self, one: Waiting[str]) -> None:
        self.queue.add(one)
        self._waits[one.owner] += 1
        self._begin()

    def serve(self) -> None:
        if (one := self.queue.peek()) is None:
            return
        self.queue.pop(one)
        self.order.append(one.key)
        self._waits[one.owner] -= 1
        for (first, second), given_s in self._given.items():
            if one.owner in (first, second):
                given_s[one.owner] += one.cost_s  # type: ignore[assignment]
                ahead_s = abs(given_s[first] - given_s[second])
                assert ahead_s <= self._dearest[first] + self._dearest[second] + 1e-9
        self._begin()

    def _begin(self) -> None:
        both = [pair for pair in combinations("abcd", 2) if all(self._waits[name] for name in pair)]
        self._given = {pair: self._given.get(pair, Counter()) for pair in both}


requests = st.lists(
    st.tuples(st.sampled_from("abcd"), st.floats(0.01, 2.0), st.floats(0, 100), st.booleans()), max_size=60
)


@given(requests)
def test_no_request_is_lost_and_keys_that_wait_are_handed_out_alike(came: list[tuple[str, float, float, bool]]) -> None:
    """The bound of start-time fair queueing: while two keys wait, they differ by the dearest request of each."""
    dearest = {name: max((cost for owner, cost, *_ in came if owner == name), default=0.0) for name in "abcd"}
    shares = Shares(dearest)
    for number, (owner, cost_s, due_s, served_now) in enumerate(came):
        shares.add(waiting(str(number), owner, due_s=due_s, cost_s=cost_s))
        if served_now:
            shares.serve()
    while len(shares.queue):
        shares.serve()
    assert sorted(shares.order, key=int) == [str(number) for number in range(len(came))]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 9])
def test_every_class_of_every_deployment_comes_first(number: int) -> None:
    names = [f"m{i}" for i in range(number)]
    firsts = Counter(in_turn(turn, names)[0] for turn in range(1, 8 * number + 1))
    assert firsts == {(name, each): times for name in names for each, times in (("high", 6), ("normal", 1), ("low", 1))}
    assert all(len(set(in_turn(turn, names))) == 3 * number for turn in range(1, 9))


@given(
    st.integers(1, 3), st.sets(st.integers(0, 8)), st.integers(1, 6), st.integers(1, 6), st.integers(1, 50), st.data()
)
def test_no_queue_waits_longer_than_eight_turns_for_each_deployment(
    deployments: int, flooded: set[int], rows: int, below: int, begun: int, data: st.DataObject
) -> None:
    """Whichever queues never run empty: what is next in a queue is taken when that queue comes first."""
    names = [f"m{i}" for i in range(deployments)]
    queues = {(name, each): queue() for name in names for each in CLASSES}
    for i in flooded:
        for number in range(8 * deployments * rows):
            list(queues.values())[i % len(queues)].add(waiting(f"flood{number}", "flood"))
    queues[data.draw(st.sampled_from(list(queues)))].add(waiting("mine", "a"))
    taken: list[str] = []
    for turn in range(begun, begun + 8 * deployments):
        sources = [Source(queues[key], key[1] != "high") for key in in_turn(turn, names)]
        taken += keys(take(sources, rows, min(rows, below)))
    assert "mine" in taken


def test_a_place_kept_for_what_is_due_soon_is_for_nobody_who_is_far_ahead() -> None:
    """One key's dear requests wait; another's short ones pass them until they had a second of the engine more."""
    source = Source(queue(waiting("dear", "a", due_s=100.0, cost_s=5.0)), below=True)
    for i in range(20):
        source.queue.add(waiting(f"short{i}", "b", due_s=1.0, cost_s=0.25))
    kept = [one.key for _ in range(20) for one in take([source], 1, 0, slack_below_s=10.0)]
    assert kept == [f"short{i}" for i in range(5)]  # 0, .25, .5, .75 and 1 s ahead
    assert keys(take([source], 1, 1, slack_below_s=10.0)) == ["dear"]
    assert keys(take([source], 1, 0, slack_below_s=10.0)) == ["short5"]
