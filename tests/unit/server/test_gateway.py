"""The gateway's own rules, over the in-memory broker and without HTTP."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from engines.errors import DeadlineExceeded, Gone, InvalidRequest, NotFound, Overloaded, Unavailable
from engines.manifest import StudentManifest, shown
from engines.registry.base import Revision
from engines.registry.memory import MemoryRegistry
from server import leases, metrics
from server.auth import Principal
from server.brokers.base import Entry, StaleVersion
from server.brokers.memory import MemoryBroker, MemoryServer
from server.gateway import Gateway
from server.intent import Intent
from server.menu import Wanted
from server.messages import GenerateRequest, GenerateResult
from server.settings import GatewaySettings
from tests.gateway_stack import COST
from tests.unit.server.manifests import manifest, publish, revision

OLD, NEW = manifest("shapes-fast", 1, 4, mark=1), manifest("shapes-fast", 1, 4, mark=2)
FIRST = revision(1, {"medium": (OLD, 4)})
WEB = Principal("web", frozenset({"generate"}))
INTENT = Intent(Wanted("shapes"), "a red circle")


class Clock:
    now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Picky(MemoryBroker):
    """Refuses the first publishes as stale."""

    def __init__(self, server: MemoryServer, refusals: int) -> None:
        super().__init__(server, "gateway-1")
        self.refusals, self.published = refusals, list[GenerateRequest]()

    async def publish(self, request: GenerateRequest, source: bytes | None = None) -> Entry:
        self.published.append(request)
        if self.refusals:
            self.refusals -= 1
            raise StaleVersion(request.model, request.version)
        return await super().publish(request, source)


class Stand:
    """A gateway whose catalog looks only when told to."""

    def __init__(
        self,
        refusals: int = 0,
        students: tuple[StudentManifest, ...] = (OLD, NEW),
        current: Revision = FIRST,
        **settings: object,
    ) -> None:
        self.registry = MemoryRegistry()
        publish(self.registry, *students)
        self.registry.commit(current)
        self.server, self.clock = MemoryServer(), Clock()
        self.broker = Picky(self.server, refusals)
        self.worker = MemoryBroker(self.server, "worker-1")
        chosen = GatewaySettings.model_validate(
            {"redis_url": "memory:", "registry_url": "memory:", "poll_s": 1000, **settings}
        )
        self.metrics = metrics.make()
        self.gateway = Gateway(chosen, self.broker, self.registry, self.metrics, clock_s=self.clock, now_s=self.clock)

    async def start(self, *, worker: bool = True) -> Gateway:
        if worker:
            lease = leases.WorkerLease(deployments={"shapes": [OLD.version]}, costs={OLD.version: COST})
            await self.worker.renew_lease(leases.write(lease))
        await self.gateway.start()
        return self.gateway


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    made = Stand()
    await made.start()
    yield made
    await made.gateway.stop()


async def test_a_request_is_pinned_with_its_seed_plan_and_predicted_cost(stand: Stand) -> None:
    ticket = await stand.gateway.submit(replace(INTENT, n=2), WEB)
    request = stand.broker.published[0]
    assert (request.id, request.version, request.steps, request.tier) == (ticket.id, OLD.version, 4, "medium")
    assert 0 <= request.seed < 2**63
    assert request.cost_s == pytest.approx(2 * (0.001 + 4 * 0.002 + 0.001))
    assert (request.owner, request.reply_to, request.budget_ms) == ("web", "gateway-1", 60_000)


async def test_a_request_without_a_model_gets_the_only_one(stand: Stand) -> None:
    assert (await stand.gateway.submit(replace(INTENT, wanted=Wanted("")), WEB)).model == "shapes"
    stand.registry.commit(revision(1, {"medium": (NEW, 4)}, deployment="other"))
    await stand.gateway.catalog.refresh()
    with pytest.raises(InvalidRequest, match="choose from other, shapes"):
        await stand.gateway.submit(replace(INTENT, wanted=Wanted("")), WEB)


@pytest.mark.parametrize("model", ["", "shapes"])
async def test_before_anything_is_deployed_a_request_is_to_come_back(model: str) -> None:
    stand = Stand()
    stand.gateway = Gateway(stand.gateway.settings, stand.broker, MemoryRegistry(), metrics.make())
    await stand.start()
    with pytest.raises(Unavailable):
        await stand.gateway.submit(replace(INTENT, wanted=Wanted(model)), WEB)
    await stand.gateway.stop()


async def test_a_stale_version_is_resolved_again_from_a_fresh_look() -> None:
    stand = Stand(refusals=1)
    await stand.start()
    stand.registry.commit(revision(2, {"medium": (NEW, 4)}))
    await stand.gateway.submit(INTENT, WEB)
    assert [request.version for request in stand.broker.published] == [OLD.version, NEW.version]
    assert len({(request.id, request.seed) for request in stand.broker.published}) == 1
    await stand.gateway.stop()


async def test_a_version_that_stays_stale_is_a_503_and_not_a_loop() -> None:
    stand = Stand(refusals=99)
    await stand.start()
    with pytest.raises(Unavailable):
        await stand.gateway.submit(INTENT, WEB)
    assert len(stand.broker.published) == 3
    await stand.gateway.stop()


async def full() -> Stand:
    """A stand whose queue takes no more normal requests, without having looked since the first."""
    stand = Stand(max_wait_s=0.045)
    await stand.start()
    for _ in range(5):
        await stand.gateway.submit(INTENT, WEB)
    return stand


async def test_our_own_requests_count_before_the_next_look() -> None:
    stand = await full()
    with pytest.raises(Overloaded) as caught:
        await stand.gateway.submit(INTENT, WEB)
    assert caught.value.retry_after_s == pytest.approx(0.005 + 0.010 + stand.gateway.settings.poll_s)
    assert len(stand.broker.published) == 5
    assert stand.metrics.registry.get_sample_value("fewstep_shed_total", {"reason": "overloaded"}) == 1
    await stand.gateway.stop()


async def test_the_next_look_counts_them_once() -> None:
    stand = await full()
    await stand.gateway.catalog.refresh()
    assert stand.gateway.catalog.waiting_s("shapes", "normal") == pytest.approx(0.05)
    await stand.gateway.stop()


async def test_what_is_answered_counts_no_more_before_the_next_look(stand: Stand) -> None:
    catalog, ticket = stand.gateway.catalog, await stand.gateway.submit(INTENT, WEB)
    assert catalog.waiting_s("shapes", "normal") > 0
    await answered(stand, OLD.version)
    await stand.gateway.answer(ticket)
    assert catalog.waiting_s("shapes", "normal") == 0
    assert catalog.view.published_by_s["shapes", "normal"] == {"web": pytest.approx(0.0)}


async def answered(stand: Stand, version: str) -> None:
    [claim] = await stand.worker.claim(["shapes"], 8, 0)
    result = GenerateResult(id=claim.request.id, status="succeeded", version=version, tier="medium", num_images=1)
    await stand.worker.finish(claim, result, [b"a picture"])


@pytest.mark.parametrize("ends", ["answer", "cancel", "expire_later"])
async def test_what_has_ended_or_is_not_waited_for_makes_no_other_look_more_urgent(stand: Stand, ends: str) -> None:
    """Those count as later than a request in a hurry that are known to wait still."""
    urgency, ticket = stand.gateway._dispatcher._urgency, await stand.gateway.submit(INTENT, WEB)
    assert urgency["shapes", "normal"].later_share(1e-6, 0.0) == 1
    if ends == "answer":
        await answered(stand, OLD.version)
        await stand.gateway.answer(ticket)
    elif ends == "cancel":
        await stand.gateway.cancel(ticket.id)
    else:
        stand.gateway.expire_later(ticket)
    assert urgency["shapes", "normal"].later_share(1e-6, 0.0) == 0


async def test_latency_is_told_of_versions_that_are_deployed_and_of_no_other(stand: Stand) -> None:
    """The series of a version go with it: one that came back with a late answer would stay for good."""

    def versions() -> set[str]:
        families = stand.metrics.registry.collect()
        [latency] = [family for family in families if family.name == "fewstep_request_seconds"]
        return {sample.labels["version"] for sample in latency.samples}

    for version in (NEW.version, OLD.version):
        ticket = await stand.gateway.submit(INTENT, WEB)
        await answered(stand, version)
        await stand.gateway.answer(ticket)
    assert versions() == {shown(OLD.version)}


async def test_high_requests_do_not_wait_for_normal_ones() -> None:
    stand = await full()
    await stand.gateway.submit(replace(INTENT, priority=5), WEB)
    await stand.gateway.stop()


async def test_without_a_worker_requests_are_accepted_for_as_long_as_a_restart_takes() -> None:
    stand = Stand(worker_grace_s=15)
    await stand.start(worker=False)
    await stand.gateway.submit(INTENT, WEB)
    stand.clock.now_s += 16
    with pytest.raises(Unavailable):
        await stand.gateway.submit(INTENT, WEB)
    await stand.gateway.stop()


async def test_a_request_that_nobody_answers_is_ended_by_the_gateway() -> None:
    stand = Stand()
    await stand.start()
    ticket = await stand.gateway.submit(replace(INTENT, timeout_ms=1), WEB)
    with pytest.raises(DeadlineExceeded):
        await stand.gateway.answer(ticket)
    status = await stand.broker.status(ticket.id)
    assert status is not None
    assert status.state == "expired"
    await stand.gateway.stop()


async def test_an_answer_whose_pictures_expired_is_gone_and_not_half_an_answer(stand: Stand) -> None:
    ticket = await stand.gateway.submit(replace(INTENT, n=2), WEB)
    claim = (await stand.worker.claim(["shapes"], 8, 0))[0]
    result = GenerateResult(id=ticket.id, status="succeeded", version=OLD.version, tier="medium", num_images=2)
    await stand.worker.finish(claim, result, [b"only one"])
    with pytest.raises(Gone):
        await stand.gateway.answer(ticket)


async def test_what_is_somebody_else_s_does_not_exist(stand: Stand) -> None:
    ticket = await stand.gateway.submit(INTENT, WEB)
    assert (await stand.gateway.status(ticket.id, WEB)).state == "queued"
    with pytest.raises(NotFound):
        await stand.gateway.status(ticket.id, Principal("other", frozenset({"generate"})))
    assert await stand.gateway.status(ticket.id, Principal("ops", frozenset({"admin"})))


async def test_budgets_are_capped(stand: Stand) -> None:
    await stand.gateway.submit(replace(INTENT, timeout_ms=10**9), WEB)
    assert stand.broker.published[0].budget_ms == 600_000
