"""What a free engine thread calls next, and which call has all threads."""

from concurrent.futures import Future
from typing import Any

from server.batcher import Batcher, LaneKey, Row
from server.behind import Piece
from server.turns import Turns

LANE = LaneKey("denoise", "a", (4, 8, 8))


def turns(streams: int = 2, rows: int = 0) -> Turns[Row]:
    made = Turns(Batcher[Row]((1, 2)), lambda: streams)
    for i in range(rows):
        made.batcher.add(Row(request_id=f"r{i}", lane=LANE, due_s=float(i), deadline_s=60.0))
    return made


def waiting(made: Turns[Row]) -> "Future[Any]":
    future: Future[Any] = Future()
    made.behind.add(lambda: None, future)
    return future


def test_a_call_is_lone_only_where_nothing_runs_and_nothing_waits() -> None:
    made = turns(rows=1)
    batch = made.next()
    assert isinstance(batch, list)
    assert made.lone
    number = made.flights.begin(batch)
    assert not made.lone
    made.flights.end(number)
    assert made.lone
    waiting(made)
    assert not made.lone  # another thread takes that up at once
    assert isinstance(made.next(), Piece)
    assert not made.lone
    made.behind.end()
    assert made.lone
    assert not turns(rows=1).lone


def test_live_rows_and_pieces_behind_them_share_the_streams() -> None:
    made = turns(streams=2, rows=5)
    waiting(made)
    first, second = made.next(), made.next()
    assert [len(each) if isinstance(each, list) else each for each in (first, second)] == [2, 2]
    for batch in (first, second):
        assert isinstance(batch, list)
        made.flights.begin(batch)
    assert not made.free
    assert made.next() is None
    made.flights.end(1)
    assert isinstance(made.next(), list)
