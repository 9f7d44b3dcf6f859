from dataclasses import replace

from server.batcher import Batcher, LaneKey, Row, due
from server.brokers.base import Claim
from tests.unit.server import toy

FIRST = replace(toy.claim(toy.student()), entry_id="1700000000123-0", enqueued_ms=1_700_000_000_123)
SECOND = replace(FIRST, entry_id="1700000000123-1")
NEXT_MS = replace(FIRST, entry_id="1700000000124-0", enqueued_ms=1_700_000_000_124)


def test_claims_of_one_millisecond_came_in_the_order_of_their_queue() -> None:
    assert FIRST.arrived_s < SECOND.arrived_s < NEXT_MS.arrived_s


def test_rows_of_claims_of_one_millisecond_end_one_after_the_other() -> None:
    batcher = Batcher[Row]((1,))
    left = {"first": 3, "second": 3}
    for name, claim in (("first", FIRST), ("second", SECOND)):
        batcher.add(row(name, claim))
    done = []
    while batch := batcher.next_batch():
        (one,) = batch
        done.append(one.request_id)
        left[one.request_id] -= 1
        if left[one.request_id]:
            batcher.add(one)
    assert done == ["first"] * 3 + ["second"] * 3


def row(name: str, claim: Claim) -> Row:
    due_s = due(arrived_s=claim.arrived_s, deadline_s=2e9, cost_s=0.1, priority=0, ageing_s=1.0)
    return Row(request_id=name, lane=LaneKey("denoise", "e"), due_s=due_s, deadline_s=2e9)
