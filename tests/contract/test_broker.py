"""What every broker promises: one answer to each request, whoever dies, is late or asks twice."""

import asyncio
from typing import Any

import pytest

from server.brokers.base import Broker, Claim, Emitted, Finished, Remembered, StaleVersion
from server.messages import GenerateRequest, GenerateResult, StepEvent
from tests.contract.conftest import Hub
from tests.eventually import aeventually

V1, V2 = (f"shapes@{digit * 64}" for digit in "12")


def request_of(request_id: str, **changes: Any) -> GenerateRequest:
    fields: dict[str, Any] = {
        "id": request_id,
        "model": "shapes",
        "version": V1,
        "tier": "low",
        "steps": 1,
        "prompt": "a red circle",
        "width": 64,
        "height": 64,
        "seed": 7,
        "budget_ms": 30_000,
        "reply_to": "gateway",
    }
    return GenerateRequest(**(fields | changes))


def done(claim: Claim, **changes: Any) -> GenerateResult:
    fields: dict[str, Any] = {"id": claim.request.id, "status": "succeeded", "version": claim.request.version}
    return GenerateResult(**(fields | changes))


async def claim_all(worker: Broker, max_rows: int = 100, **options: Any) -> list[Claim]:
    return await worker.claim(["shapes"], max_rows, 0, **options)


def ids(claims: list[Claim]) -> list[str]:
    return [claim.request.id for claim in claims]


async def collect(broker: Broker, request_id: str, **options: Any) -> list[Emitted]:
    return [emitted async for emitted in broker.events(request_id, **options)]


class TestOneAnswer:
    async def test_a_request_goes_to_a_worker_and_its_pictures_come_back(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        request = request_of("r1", prompt="ein roter Kreis ●", guidance=2.0, traceparent="00-ab-cd-01")
        entry = await gateway.publish(request)
        assert (entry.id, entry.created) == ("r1", True)
        assert entry.deadline_ms == entry.enqueued_ms + 30_000
        assert abs(entry.enqueued_ms - gateway.now_ms()) < 1000

        [claim] = await claim_all(worker)
        assert claim.request == request
        assert (claim.enqueued_ms, claim.deadline_ms, claim.deliveries) == (
            entry.enqueued_ms,
            entry.deadline_ms,
            1,
        )
        assert await worker.running([claim]) == [claim]
        result = done(claim, seeds=[7, 8], num_images=2, ignored_words=["roter"])
        assert await worker.finish(claim, result, [b"\x89PNG 0", b"\x89PNG 1"])

        assert await gateway.wait("r1", 5) == result
        assert await gateway.result("r1") == result
        assert await gateway.images("r1", 3) == [b"\x89PNG 0", b"\x89PNG 1", None]
        assert await gateway.image("r1", 1) == b"\x89PNG 1"
        assert await claim_all(worker) == []

    @pytest.mark.parametrize("sizes", [(100, 200), (10_000, 10_000), (16_384,), (16_385,), ()])
    async def test_an_answer_brings_its_pictures_small_or_large(self, hub: Hub, sizes: tuple[int, ...]) -> None:
        gateway, other, worker = await hub("gateway"), await hub("other"), await hub("w1")
        await gateway.publish(request_of("r1", n=max(1, len(sizes))))
        waiting = [asyncio.create_task(each.answer("r1", 10)) for each in (gateway, other)]
        [claim] = await claim_all(worker)
        pictures = [bytes([i]) * size for i, size in enumerate(sizes)]
        result = done(claim, num_images=len(sizes))
        assert await worker.finish(claim, result, pictures)
        for task in waiting:
            answered = await asyncio.wait_for(task, 5)
            assert answered is not None
            assert (answered.result, list(answered.images)) == (result, pictures)
        assert await gateway.images("r1", len(sizes)) == pictures
        late = await gateway.answer("r1", 5)
        assert late is not None
        assert list(late.images) == pictures
        assert await gateway.answer("nobody", 5) is None
        assert await gateway.answer("r1", 0) == late
        await gateway.publish(request_of("r2"))
        assert await gateway.answer("r2", 0) is None

    async def test_the_picture_that_a_request_changes_is_there_until_it_ends(self, hub: Hub) -> None:
        gateway, worker, other = await hub("gateway"), await hub("w1"), await hub("w2")
        await gateway.publish(request_of("r1", edits_from=2), b"\x00 pixels")
        await gateway.publish(request_of("r2"))
        first, _ = await claim_all(worker)
        assert await other.source("r1") == await worker.source("r1") == b"\x00 pixels"
        assert await worker.source("r2") is None
        await gateway.publish(request_of("r1", edits_from=2), b"\x00 pixels")
        await worker.finish(first, done(first), [b"picture"])
        assert await worker.source("r1") is None
        await gateway.publish(request_of("r3", edits_from=1), b"pixels")
        await gateway.cancel("r3")
        assert await worker.source("r3") is None

    async def test_a_waiting_gateway_is_woken(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1"))
        waiting = asyncio.create_task(gateway.wait("r1", None))
        [claim] = await claim_all(worker)
        await worker.finish(claim, done(claim))
        assert await asyncio.wait_for(waiting, 5) == done(claim)

    async def test_waiting_ends_with_its_timeout_and_at_once_for_nobodys_id(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        await gateway.publish(request_of("r1"))
        assert await gateway.wait("r1", 0) is None
        assert await gateway.wait("r1", 0.01) is None
        assert await asyncio.wait_for(gateway.wait("nobody", None), 5) is None
        assert await gateway.result("nobody") is None
        assert await gateway.status("nobody") is None
        assert not await gateway.cancel("nobody")

    async def test_of_two_workers_that_finish_one_claim_the_first_wins(self, hub: Hub) -> None:
        gateway, first, second = await hub("gateway"), await hub("w1"), await hub("w2")
        await gateway.publish(request_of("r1"))
        [claim] = await claim_all(first)
        assert await second.finish(claim, done(claim, worker="w2"), [b"second"])
        assert not await first.finish(claim, done(claim, worker="w1"), [b"first"])
        result = await gateway.wait("r1", 5)
        assert result is not None
        assert result.worker == "w2"
        assert await gateway.images("r1", 1) == [b"second"]

    async def test_publishing_an_id_again_queues_nothing(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        entry = await gateway.publish(request_of("r1"))
        again = await gateway.publish(request_of("r1"))
        assert (again.entry_id, again.deadline_ms, again.created) == (entry.entry_id, entry.deadline_ms, False)
        assert await gateway.pins("shapes") == {V1: 1}
        assert len(await claim_all(worker)) == 1

    async def test_many_answers_go_in_one_call_and_each_says_who_won(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(3):
            await gateway.publish(request_of(f"r{i}"))
        claims = await claim_all(worker)
        await gateway.cancel("r1")
        won = await worker.finish_many([Finished(claim, done(claim), [b"picture"]) for claim in claims])
        assert won == [True, False, True]
        assert [await gateway.image(f"r{i}", 0) for i in range(3)] == [b"picture", None, b"picture"]

    async def test_a_gateway_that_comes_back_finds_the_answer(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1"))
        [claim] = await claim_all(worker)
        await hub.restart("gateway")
        await worker.finish(claim, done(claim), [b"picture"])
        again = await hub("gateway")
        assert await again.wait("r1", 5) == done(claim)
        assert await again.image("r1", 0) == b"picture"

    async def test_another_gateway_can_wait_for_a_request_too(self, hub: Hub) -> None:
        gateway, other, worker = await hub("gateway"), await hub("other"), await hub("w1")
        await gateway.publish(request_of("r1"))
        waiting = [asyncio.create_task(each.wait("r1", None)) for each in (gateway, other, other)]
        [claim] = await claim_all(worker)
        await asyncio.wait(waiting, timeout=0.05)
        await worker.finish(claim, done(claim))
        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [done(claim)] * 3

    async def test_answers_expire(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway", result_ttl_s=0.05), await hub("w1", result_ttl_s=0.05)
        await gateway.publish(request_of("r1"))
        [claim] = await claim_all(worker)
        await worker.finish(claim, done(claim), [b"picture"])

        async def gone() -> bool:
            return await gateway.status("r1") is None and await gateway.image("r1", 0) is None

        await aeventually(gone)


class TestElsewhere:
    async def test_what_is_elsewhere_is_left_to_others_and_what_is_behind_it_is_not(self, hub: Hub) -> None:
        gateway, worker, other = await hub("gateway"), await hub("w1"), await hub("w2")
        for i, version in enumerate(["here", "away", "here", "away"]):
            await gateway.publish(request_of(f"r{i}", version=version))
        assert ids(await claim_all(worker, elsewhere_ms={"away": 60_000})) == ["r0", "r2"]
        assert ids(await claim_all(other, elsewhere_ms={"here": 60_000})) == ["r1", "r3"]

    async def test_it_is_not_left_for_longer_than_said(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1", version="away"))
        assert ids(await claim_all(worker, elsewhere_ms={"away": 60_000})) == []

        async def claimed() -> list[str]:
            return ids(await claim_all(worker, elsewhere_ms={"away": 20}))

        assert await aeventually(claimed) == ["r1"]

    async def test_who_waits_leaves_it_too(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await claim_all(worker)
        waiting = asyncio.create_task(worker.claim(["shapes"], 8, 10.0, elsewhere_ms={"away": 60_000}))
        for name, version in (("r1", "away"), ("r2", "here")):
            await asyncio.wait([waiting], timeout=0.02)
            await gateway.publish(request_of(name, version=version))
        assert ids(await asyncio.wait_for(waiting, 5)) == ["r2"]

    async def test_other_keys_are_served_meanwhile_but_not_far_ahead(self, hub: Hub) -> None:
        """As in a place that is kept: a key may be a second of engine time ahead of the one whose turn it is."""
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r0", version="away", owner="a"))
        for i in range(4):
            await gateway.publish(request_of(f"b{i}", version="here", owner="b", cost_s=0.6))
        assert ids(await claim_all(worker, elsewhere_ms={"away": 60_000})) == ["b0", "b1"]


class TestEndings:
    async def test_a_canceled_request_is_never_claimed(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1"))
        assert await gateway.cancel("r1")
        assert not await gateway.cancel("r1")
        result = await gateway.wait("r1", 5)
        assert result is not None
        assert (result.status, result.error and result.error.code) == ("canceled", "request_canceled")
        assert await claim_all(worker) == []

    async def test_a_cancel_reaches_the_worker_and_its_late_answer_loses(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        heard = asyncio.create_task(anext(worker.cancels()))
        await gateway.publish(request_of("r1"))
        [claim] = await claim_all(worker)
        assert await worker.running([claim]) == [claim]
        assert await gateway.cancel("r1")
        assert await asyncio.wait_for(heard, 5) == "r1"
        assert await worker.running([claim]) == []
        assert not await worker.finish(claim, done(claim), [b"late"])
        assert await gateway.images("r1", 1) == [None]
        status = await gateway.status("r1")
        assert status is not None
        assert status.state == "canceled"

    async def test_an_expired_request_says_so(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1"))
        assert await worker.expire("r1")
        assert not await gateway.cancel("r1")
        result = await gateway.wait("r1", 5)
        assert result is not None
        assert (result.status, result.error and result.error.code) == ("expired", "deadline_exceeded")

    async def test_a_finished_request_can_be_neither_canceled_nor_expired(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1"))
        [claim] = await claim_all(worker)
        await worker.finish(claim, done(claim))
        assert not await gateway.cancel("r1")
        assert not await gateway.expire("r1")
        assert await gateway.result("r1") == done(claim)

    async def test_racing_endings_have_one_winner(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(20):
            await gateway.publish(request_of(f"r{i}"))
        for claim in await claim_all(worker):
            won = await asyncio.gather(
                gateway.cancel(claim.request.id),
                worker.finish(claim, done(claim), [b"picture"]),
                gateway.expire(claim.request.id),
            )
            assert sum(won) == 1
        assert await gateway.pins("shapes") == {}

    async def test_a_status_tells_the_whole_way(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for request_id in ("r1", "r2", "r3"):
            await gateway.publish(request_of(request_id, owner="alice"))
        queued = await gateway.status("r3", with_position=True)
        assert queued is not None
        assert (queued.state, queued.owner, queued.version, queued.position) == ("queued", "alice", V1, 2)
        [claim] = await claim_all(worker, 1)
        moved = await gateway.status("r3", with_position=True)
        assert moved is not None
        assert moved.position == 1
        await worker.running([claim])
        running = await gateway.status("r1", with_position=True)
        assert running is not None
        assert (running.state, running.worker, running.position) == ("running", "w1", None)
        await worker.finish(claim, done(claim))
        ended = await gateway.status("r1")
        assert ended is not None
        assert (ended.state, ended.result) == ("succeeded", done(claim))
        assert ended.started_ms is not None
        assert ended.ended_ms is not None
        assert ended.enqueued_ms <= ended.started_ms <= ended.ended_ms


class TestClaiming:
    async def test_high_comes_before_normal_before_low(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for request_id, priority in (("low", -5), ("normal", -4), ("normal2", 4), ("high", 5)):
            await gateway.publish(request_of(request_id, priority=priority))
        assert ids(await claim_all(worker)) == ["high", "normal", "normal2", "low"]

    async def test_low_does_not_starve(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("low", priority=-10))
        for i in range(10):
            await gateway.publish(request_of(f"normal{i}"))
        taken = [each for _ in range(8) for each in ids(await claim_all(worker, 1))]
        assert "low" in taken

    async def test_normal_does_not_starve_between_high_and_low(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(10):
            await gateway.publish(request_of(f"high{i}", priority=9))
            await gateway.publish(request_of(f"low{i}", priority=-9))
        await gateway.publish(request_of("normal"))
        taken = [each for _ in range(8) for each in ids(await claim_all(worker, 1))]
        assert "normal" in taken
        assert sum(each.startswith("high") for each in taken) == 6

    @pytest.mark.parametrize("vain", [3, 7])
    async def test_low_does_not_starve_beside_claims_that_get_nothing(self, hub: Hub, vain: int) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(20):
            await gateway.publish(request_of(f"normal{i}"))
        await gateway.publish(request_of("low", priority=-10))
        taken = []
        for _ in range(8):
            taken += ids(await claim_all(worker, 1))
            for _ in range(vain):  # as a full worker makes at every step
                assert await claim_all(worker, 4, max_rows_below_high=0) == []
        assert "low" in taken

    async def test_rows_are_counted_not_requests(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for request_id, n in (("r1", 2), ("r2", 3), ("r3", 4), ("r4", 1)):
            await gateway.publish(request_of(request_id, n=n))
        assert ids(await claim_all(worker, 5)) == ["r1", "r2"]
        assert ids(await claim_all(worker, 4)) == ["r3"]
        assert ids(await claim_all(worker, 4)) == ["r4"]

    async def test_a_request_larger_than_the_room_comes_alone(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1", n=10))
        await gateway.publish(request_of("r2"))
        assert ids(await claim_all(worker, 4)) == ["r1"]

    async def test_room_can_be_kept_for_high(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(4):
            await gateway.publish(request_of(f"normal{i}"))
        for i in range(2):
            await gateway.publish(request_of(f"high{i}", priority=10))
        assert ids(await claim_all(worker, 4, max_rows_below_high=1)) == ["high0", "high1", "normal0"]
        assert await claim_all(worker, 4, max_rows_below_high=0) == []

    async def test_what_is_due_first_goes_first_and_equal_ones_as_they_came(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i, due_after_s in enumerate((90.0, 30.0, 60.0, 30.0, -30.0)):
            await gateway.publish(request_of(f"r{i}", due_after_s=due_after_s))
        assert ids(await claim_all(worker)) == ["r4", "r1", "r3", "r2", "r0"]

    async def test_a_key_that_floods_waits_behind_itself(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(20):
            await gateway.publish(request_of(f"flood{i}", owner="flood", cost_s=0.1))
        assert ids(await claim_all(worker, 4)) == [f"flood{i}" for i in range(4)]
        await gateway.publish(request_of("other", owner="other", cost_s=0.1))
        assert "other" in ids(await claim_all(worker, 2))

    async def test_keys_share_engine_time_and_not_requests(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(20):
            await gateway.publish(request_of(f"cheap{i}", owner="cheap", cost_s=0.1))
            await gateway.publish(request_of(f"dear{i}", owner="dear", cost_s=0.4))
        taken = ids(await claim_all(worker, 15))
        assert sum(name.startswith("dear") for name in taken) == 3

    async def test_a_request_that_ended_while_it_waited_takes_no_turn(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(3):
            await gateway.publish(request_of(f"a{i}", owner="a", cost_s=0.1))
            await gateway.publish(request_of(f"b{i}", owner="b", cost_s=0.1))
        await gateway.cancel("a0")
        await gateway.expire("b0")
        assert ids(await claim_all(worker, 3)) == ["a1", "b1", "a2"]
        assert ids(await claim_all(worker)) == ["b2"]

    async def test_what_should_be_done_soon_may_have_the_place_of_high(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("late", due_after_s=300.0))
        await gateway.publish(request_of("soon", owner="z", due_after_s=1.0))
        assert await claim_all(worker, 4, max_rows_below_high=0) == []
        assert await claim_all(worker, 4, max_rows_below_high=0, slack_below_ms=1000) == []
        assert ids(await claim_all(worker, 4, max_rows_below_high=0, slack_below_ms=1001)) == ["soon"]
        assert ids(await claim_all(worker, 4, max_rows_below_high=1)) == ["late"]

    async def test_what_a_blocked_claim_took_is_not_handed_out_again(self, hub: Hub) -> None:
        gateway, first, second = await hub("gateway"), await hub("w1"), await hub("w2")
        claiming = asyncio.create_task(first.claim(["shapes"], 8, None))
        await asyncio.wait([claiming], timeout=0.05)
        await gateway.publish(request_of("r1"))
        [claim] = await asyncio.wait_for(claiming, 5)
        await gateway.publish(request_of("r2"))
        assert ids(await claim_all(second)) == ["r2"]
        await first.running([claim])
        status = await gateway.status("r1", with_position=True)
        assert status is not None
        assert status.worker == "w1"

    async def test_a_worker_takes_only_from_its_deployments(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1", model="other"))
        assert await claim_all(worker) == []
        assert ids(await worker.claim(["shapes", "other"], 8, 0)) == ["r1"]
        assert await worker.claim([], 8, 0) == []
        assert await worker.claim(["shapes"], 0, 0) == []

    @pytest.mark.parametrize("priority", [0, 9])
    async def test_a_blocked_claim_wakes_with_the_first_request(self, hub: Hub, priority: int) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        claiming = asyncio.create_task(worker.claim(["shapes"], 8, None))
        await asyncio.wait([claiming], timeout=0.05)
        await gateway.publish(request_of("r1", priority=priority))
        assert ids(await asyncio.wait_for(claiming, 5)) == ["r1"]

    async def test_a_claim_without_requests_ends_with_its_time(self, hub: Hub) -> None:
        worker = await hub("w1")
        assert await asyncio.wait_for(worker.claim(["shapes"], 8, 0.05), 5) == []

    async def test_a_request_is_claimed_by_one_of_many_workers(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        workers = [await hub(f"w{i}") for i in range(4)]
        for i in range(40):
            await gateway.publish(request_of(f"r{i}"))
        found = await asyncio.gather(*(claim_all(worker, 3) for worker in workers for _ in range(4)))
        assert sorted(each for claims in found for each in ids(claims)) == sorted(f"r{i}" for i in range(40))

    async def test_the_load_is_known_by_class(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        empty = await gateway.queue_state("shapes")
        assert (sum(empty.waiting.values()), empty.running, sum(empty.cost_s.values())) == (0, 0, 0)
        for i, priority in enumerate((0, 0, 5, -5)):
            await gateway.publish(request_of(f"r{i}", priority=priority, cost_s=0.25))
        [high] = await claim_all(worker, 1)
        state = await gateway.queue_state("shapes")
        assert state.waiting == {"high": 0, "normal": 2, "low": 1}
        assert state.running == 1
        assert state.cost_s == {"high": 0.25, "normal": 0.5, "low": 0.25}
        await worker.finish(high, done(high))
        await gateway.cancel("r0")
        state = await gateway.queue_state("shapes")
        assert (state.waiting["normal"], state.running) == (1, 0)
        assert state.cost_s == {"high": 0.0, "normal": 0.25, "low": 0.25}

    async def test_the_load_is_known_by_owner(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i, owner in enumerate(("", "calm", "flood", "flood", "flood")):
            await gateway.publish(request_of(f"r{i}", owner=owner, cost_s=0.25))
        assert (await gateway.queue_state("shapes")).owed_s["normal"] == {"": 0.25, "calm": 0.25, "flood": 0.75}
        claims = await claim_all(worker, 2)
        assert {claim.request.owner for claim in claims} == {"", "calm"}
        for claim in claims:
            await worker.finish(claim, done(claim))
        await gateway.cancel("r4")
        state = await gateway.queue_state("shapes")
        assert state.owed_s == {"high": {}, "normal": {"flood": 0.5}, "low": {}}

    async def test_of_too_many_owners_the_load_is_known_together_alone(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        for i in range(65):
            await gateway.publish(request_of(f"r{i}", owner=f"key{i}", cost_s=0.25))
        state = await gateway.queue_state("shapes")
        assert (state.cost_s["normal"], state.owed_s["normal"]) == (65 * 0.25, {})
        await gateway.cancel("r7")
        assert len((await gateway.queue_state("shapes")).owed_s["normal"]) == 64


class TestDeath:
    async def test_claims_return_when_the_lease_is_gone_and_not_before(self, hub: Hub) -> None:
        gateway, first, second = await hub("gateway"), await hub("w1"), await hub("w2")
        entry = await gateway.publish(request_of("r1"))
        await claim_all(first)
        assert await second.reclaim(["shapes"]) == []
        await first.release_lease()

        async def returned() -> list[Claim]:
            return await second.reclaim(["shapes"])

        [claim] = await aeventually(returned)
        assert (claim.request.id, claim.deliveries, claim.returned, claim.poisoned) == ("r1", 2, True, False)
        assert claim.deadline_ms == entry.deadline_ms
        assert await second.reclaim(["shapes"]) == []
        assert await second.finish(claim, done(claim))
        assert await gateway.wait("r1", 5) == done(claim)

    async def test_a_lease_ends_by_itself(self, hub: Hub) -> None:
        gateway, first, second = await hub("gateway"), await hub("w1", lease_s=0.05), await hub("w2")
        await gateway.publish(request_of("r1"))
        await claim_all(first)

        async def returned() -> list[Claim]:
            return await second.reclaim(["shapes"])

        assert ids(await aeventually(returned)) == ["r1"]

    async def test_a_kept_lease_outlives_its_time_and_ends_with_the_context(self, hub: Hub) -> None:
        watcher, worker = await hub("watcher"), await hub("w1", lease_s=0.2)
        with worker.keep_lease(lambda: {"deployments": ["shapes"]}):
            for _ in range(20):
                await asyncio.wait([asyncio.create_task(watcher.ping())], timeout=1)
                [info] = await watcher.workers()
                assert (info.id, info.info) == ("w1", {"deployments": ["shapes"]})
                await asyncio.wait([asyncio.create_task(asyncio.Event().wait())], timeout=0.02)
        assert await watcher.workers() == []

    async def test_a_worker_that_was_only_slow_loses_to_the_one_that_took_over(self, hub: Hub) -> None:
        gateway, slow, other = await hub("gateway"), await hub("w1"), await hub("w2")
        await gateway.publish(request_of("r1"))
        [stale] = await claim_all(slow)
        await slow.release_lease()

        async def returned() -> list[Claim]:
            return await other.reclaim(["shapes"])

        [claim] = await aeventually(returned)
        await slow.renew_lease({})
        assert await other.finish(claim, done(claim, worker="w2"), [b"w2"])
        assert not await slow.finish(stale, done(stale, worker="w1"), [b"w1"])
        assert await gateway.image("r1", 0) == b"w2"
        assert await gateway.pins("shapes") == {}
        assert await slow.reclaim(["shapes"]) == []

    async def test_a_request_that_kills_its_workers_is_poisoned_at_the_third_delivery(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        await gateway.publish(request_of("r1"))
        await claim_all(await hub("w1"))
        for dead, heir in (("w1", "w2"), ("w2", "w3")):
            await (await hub(dead)).release_lease()
            worker = await hub(heir)
            await worker.renew_lease({})

            async def returned(worker: Broker = worker) -> list[Claim]:
                return await worker.reclaim(["shapes"])

            [claim] = await aeventually(returned)
        assert (claim.deliveries, claim.poisoned) == (3, True)
        assert await worker.poison(claim)
        assert not await worker.poison(claim)
        result = await gateway.wait("r1", 5)
        assert result is not None
        assert (result.status, result.error and result.error.code) == ("failed", "request_poisoned")
        assert await worker.dead_letters("shapes") == [request_of("r1")]
        assert await gateway.pins("shapes") == {}

    async def test_workers_are_those_whose_lease_lives(self, hub: Hub) -> None:
        gateway, first, second = await hub("gateway"), await hub("w1"), await hub("w2")
        await first.renew_lease({"versions": [V1], "step_s": 0.01})
        await second.renew_lease({})
        assert {worker.id: worker.info for worker in await gateway.workers()} == {
            "w1": {"versions": [V1], "step_s": 0.01},
            "w2": {},
        }
        await second.release_lease()
        assert [worker.id for worker in await gateway.workers()] == ["w1"]


class TestEvents:
    async def test_progress_is_read_from_its_beginning_to_its_end(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        await gateway.publish(request_of("r1", steps=2, events=True))
        reading = asyncio.create_task(collect(gateway, "r1"))
        [claim] = await claim_all(worker)
        await worker.running([claim])
        await worker.emit(StepEvent(id="r1", kind="step", step=1, total=2))
        await worker.emit(StepEvent(id="r1", kind="partial_image", step=1, total=2), b"\x89PNG partial")
        await worker.finish(claim, done(claim))
        expected = [
            Emitted(StepEvent(id="r1", kind="queued", total=2)),
            Emitted(StepEvent(id="r1", kind="running", total=2)),
            Emitted(StepEvent(id="r1", kind="step", step=1, total=2)),
            Emitted(StepEvent(id="r1", kind="partial_image", step=1, total=2), b"\x89PNG partial"),
            Emitted(StepEvent(id="r1", kind="ended", status="succeeded")),
        ]
        assert await asyncio.wait_for(reading, 5) == expected
        assert await collect(gateway, "r1") == expected
        assert await collect(gateway, "r1", after=3) == expected[3:]

    async def test_a_request_without_events_has_an_end(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        await gateway.publish(request_of("r1"))
        await gateway.cancel("r1")
        ended = [Emitted(StepEvent(id="r1", kind="ended", status="canceled"))]
        assert await asyncio.wait_for(collect(gateway, "r1"), 5) == ended
        assert await asyncio.wait_for(collect(gateway, "nobody"), 5) == []


class TestIdempotency:
    async def test_a_key_is_bound_once_per_owner(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        assert await gateway.remember("key", "hash1", "r1", 60, owner="alice") is None
        assert await gateway.remember("key", "hash1", "r2", 60, owner="alice") == Remembered("hash1", "r1")
        assert await gateway.remember("key", "hash2", "r3", 60, owner="alice") == Remembered("hash1", "r1")
        assert await gateway.remember("key", "hash2", "r3", 60, owner="bob") is None
        assert await gateway.remember("key", "hash1", "r1", 60, owner="alice") is None

    async def test_a_key_is_forgotten_after_its_time(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        assert await gateway.remember("key", "hash1", "r1", 0.02) is None

        async def free() -> bool:
            return await gateway.remember("key", "hash2", "r2", 60) is None

        await aeventually(free)


class TestSwaps:
    async def test_pins_count_unfinished_requests_and_fall_once_at_each_end(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        for i in range(4):
            await gateway.publish(request_of(f"r{i}", version=V1 if i < 3 else V2))
        assert await gateway.pins("shapes") == {V1: 3, V2: 1}
        claims = await claim_all(worker)
        await worker.finish(claims[0], done(claims[0]))
        await worker.finish(claims[0], done(claims[0]))
        await gateway.cancel("r1")
        await gateway.expire("r1")
        assert await gateway.pins("shapes") == {V1: 1, V2: 1}
        await worker.poison(claims[2])
        assert await gateway.pins("shapes") == {V2: 1}

    async def test_a_version_retires_only_when_nothing_pins_it(self, hub: Hub) -> None:
        gateway, worker = await hub("gateway"), await hub("w1")
        assert await worker.servable("shapes") is None
        await worker.set_servable("shapes", [V1, V2])
        await gateway.publish(request_of("r1", version=V1))
        assert not await worker.retire("shapes", V1)
        assert await worker.servable("shapes") == {V1, V2}
        await gateway.cancel("r1")
        assert await worker.retire("shapes", V1)
        assert await worker.servable("shapes") == {V2}
        with pytest.raises(StaleVersion):
            await gateway.publish(request_of("r2", version=V1))
        assert await gateway.status("r2") is None
        assert await gateway.pins("shapes") == {}
        assert await asyncio.wait_for(gateway.wait("r2", None), 5) is None
        await gateway.publish(request_of("r2", version=V2))

    async def test_a_deployment_whose_versions_are_all_retired_accepts_nothing(self, hub: Hub) -> None:
        gateway = await hub("gateway")
        await gateway.set_servable("shapes", [V1])
        assert await gateway.retire("shapes", V1)
        assert await gateway.servable("shapes") == frozenset()
        with pytest.raises(StaleVersion):
            await gateway.publish(request_of("r1"))

    async def test_phases_are_kept_per_worker_with_the_time_they_began(self, hub: Hub) -> None:
        first, second = await hub("w1"), await hub("w2")
        assert await first.phases("sw_1") == {}
        await first.report_phase("sw_1", "w1", "building")
        began = (await second.phases("sw_1"))["w1"].at_ms
        await first.report_phase("sw_1", "w1", "building")
        await second.report_phase("sw_1", "w2", "rejected", "blob is corrupt", seconds={"staged": 0.5})
        phases = await first.phases("sw_1")
        assert (phases["w1"].phase, phases["w1"].reason, phases["w1"].at_ms) == ("building", None, began)
        assert (phases["w2"].phase, phases["w2"].reason) == ("rejected", "blob is corrupt")
        assert phases["w2"].seconds == {"staged": 0.5}

    async def test_a_named_lease_has_one_owner_and_a_rising_number(self, hub: Hub) -> None:
        broker = await hub("w1")
        fence = await broker.acquire("swap:shapes", "w1", 60)
        assert fence is not None
        assert await broker.acquire("swap:shapes", "w2", 60) is None
        assert await broker.acquire("swap:shapes", "w1", 60) == fence
        assert await broker.renew("swap:shapes", "w1", 60)
        assert not await broker.renew("swap:shapes", "w2", 60)
        await broker.release("swap:shapes", "w2")
        assert await broker.renew("swap:shapes", "w1", 60)
        await broker.release("swap:shapes", "w1")
        assert not await broker.renew("swap:shapes", "w1", 60)
        after = await broker.acquire("swap:shapes", "w2", 60)
        assert after is not None
        assert after > fence

    async def test_a_named_lease_ends_by_itself(self, hub: Hub) -> None:
        broker = await hub("w1")
        fence = await broker.acquire("job", "w1", 0.02)
        assert fence is not None

        async def taken() -> int | None:
            return await broker.acquire("job", "w2", 60)

        assert await aeventually(taken) > fence
        assert not await broker.renew("job", "w1", 60)

    async def test_an_announcement_wakes_who_listens(self, hub: Hub) -> None:
        listener, speaker = await hub("w1"), await hub("w2")
        hearing = asyncio.create_task(anext(listener.announcements()))

        async def heard() -> bool:
            await speaker.announce("deployment:shapes")
            return hearing.done()

        await aeventually(heard)
        assert await hearing == "deployment:shapes"
