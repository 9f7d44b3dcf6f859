"""What a gateway decides under load, from a catalog that looks only when told to."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from engines.errors import InvalidRequest, Overloaded
from engines.manifest import Judge
from engines.refine import Refinement
from server import leases
from server.brokers.base import QueueState
from server.dispatcher import Dispatcher
from server.intent import Decision, Intent
from server.latencies import Latencies, Work
from server.menu import AUTO, Wanted
from server.messages import TierSteps
from server.metrics import make
from server.settings import GatewaySettings
from tests.gateway_stack import COST
from tests.unit.server.manifests import CFG, manifest, revision
from tests.unit.server.test_gateway import Stand

STUDENT = manifest("shapes-fast", 1, 2, 4, mark=1)
NOW = revision(1, {"low": (STUDENT, 1), "medium": (STUDENT, 4)})
AUTO_INTENT = Intent(Wanted("shapes", tier=AUTO), "x")
DEFAULT = TierSteps(tier="medium", steps=4)


class Desk:
    """A dispatcher over one worker; `wait` sets what is queued before the next request."""

    def __init__(self, stand: Stand, **settings: float) -> None:
        self.catalog, self.clock = stand.gateway.catalog, stand.clock
        self.latencies, self.metrics = Latencies(self.clock), make()
        self.wanted: list[tuple[str, str]] = []
        chosen = stand.gateway.settings.model_copy(update={"poll_s": 0.5, **settings})
        self.dispatcher = Dispatcher(chosen, self.catalog, self.latencies, self.metrics, self.clock, self._hear)

    def _hear(self, deployment: str, version: str) -> None:
        self.wanted.append((deployment, version))

    def wait(self, seconds: float, request_class: str = "normal") -> None:
        self.catalog.view.published_s[("shapes", request_class)] = seconds

    def decide(self, intent: Intent = AUTO_INTENT, budget_s: float = 60.0, owner: str = "") -> Decision:
        return self.dispatcher.decide(intent, budget_s, owner)


@pytest.fixture
async def desk() -> AsyncIterator[Callable[..., Desk]]:
    stand = Stand(students=(STUDENT,), current=NOW)
    lease = leases.WorkerLease(deployments={"shapes": [STUDENT.version]}, costs={STUDENT.version: COST})
    await stand.worker.renew_lease(leases.write(lease))
    await stand.gateway.start()
    yield lambda **settings: Desk(stand, **settings)
    await stand.gateway.stop()


def steps(desk: Desk, **wanted: object) -> int:
    return desk.decide(replace(AUTO_INTENT, wanted=Wanted("shapes", **wanted))).choice.steps  # type: ignore[arg-type]


async def test_a_format_of_videos_is_written_where_every_worker_writes_it(desk: Callable[..., Desk]) -> None:
    here = desk().catalog
    workers = here.view.workers
    assert here.written("nowhere") == frozenset()
    for name, formats in (("w1", ["webp", "mp4"]), ("w2", ["webp", "mp4"])):
        workers[name] = leases.WorkerLease(deployments={"videos": []}, video_formats=formats)
    workers["other"] = leases.WorkerLease(deployments={"pictures": []})
    assert here.written("videos") == {"webp", "mp4"}
    workers["w2"] = leases.WorkerLease(deployments={"videos": []}, video_formats=["webp"])
    assert here.written("videos") == {"webp"}


async def test_who_may_not_wait_for_a_load_is_told_so_and_the_load_is_asked_for(desk: Callable[..., Desk]) -> None:
    here = desk()
    state = leases.VersionState(state="on_demand", ready_in_s=5.0)
    here.catalog.view.workers["w"] = leases.WorkerLease(
        deployments={"shapes": [STUDENT.version]},
        costs={STUDENT.version: COST},
        versions={"shapes": {STUDENT.version: state}},
    )
    with pytest.raises(Overloaded, match=r"in memory in 5\.0 s and it may wait 1\.98 s|may wait 2\.0 s") as caught:
        here.decide(Intent(Wanted("shapes", tier="medium"), "x"), budget_s=2.022)
    assert caught.value.retry_after_s == pytest.approx(5.0 - 2.0 + 0.5)
    assert here.wanted == [("shapes", STUDENT.version)]
    assert here.decide(Intent(Wanted("shapes", tier="medium"), "x"), budget_s=6.0).wait_s == 5.0
    with pytest.raises(Overloaded):  # a longest latency counts the load too
        here.decide(Intent(Wanted("shapes", max_latency_ms=4000.0), "x"))


async def test_auto_takes_fewer_steps_the_longer_the_queue_and_says_instead_of_what(desk: Callable[..., Desk]) -> None:
    here = desk()
    found = []
    for wait_s in (0.0, 0.9, 1.0, 2.0):
        here.wait(wait_s)
        choice = here.decide().choice
        found.append((choice.tier, choice.steps, choice.downgraded_from))
    assert found == [("medium", 4, None), ("medium", 4, None), ("low", 2, DEFAULT), ("low", 1, DEFAULT)]


async def test_who_names_tier_or_steps_gets_them_under_any_load(desk: Callable[..., Desk]) -> None:
    here = desk()
    here.wait(30.0)
    assert steps(here, tier="medium") == 4
    assert steps(here, steps=4) == 4
    assert steps(here, steps=4, tier=AUTO) == 4
    assert steps(here) == 4
    assert steps(here, tier=AUTO) == 1


async def test_auto_comes_back_when_nobody_asks(desk: Callable[..., Desk]) -> None:
    here = desk()
    labels = {"model": "shapes", "class": "normal"}
    here.wait(1.0)
    assert here.decide().choice.steps == 2
    assert here.metrics.registry.get_sample_value("fewstep_degraded", labels) == 1
    here.wait(0.0)
    for _ in range(6):
        here.clock.now_s += 1.0
        here.dispatcher.look()
    assert here.metrics.registry.get_sample_value("fewstep_degraded", labels) == 0
    assert here.decide().choice.steps == 4


async def test_a_class_is_degraded_by_what_stands_before_it_alone(desk: Callable[..., Desk]) -> None:
    here = desk()
    here.wait(30.0, "low")
    assert here.decide().choice.steps == 4
    assert here.decide(replace(AUTO_INTENT, priority=-10)).choice.steps == 1


async def test_auto_takes_what_leaves_it_time_to_wait_before_it_is_refused(desk: Callable[..., Desk]) -> None:
    """Alone, four steps take 22 ms, two 12 ms and one 7 ms; 20 ms are queued."""
    here = desk()
    here.wait(0.020)
    assert [here.decide(budget_s=budget_s).choice.steps for budget_s in (0.043, 0.033, 0.028)] == [4, 2, 1]
    with pytest.raises(Overloaded):
        here.decide(replace(AUTO_INTENT, wanted=Wanted("shapes", tier="medium")), budget_s=0.033)
    with pytest.raises(Overloaded) as caught:
        here.decide(budget_s=0.020)
    # 7 ms too many, a batch of 10 ms for one row of four steps, 10 ms of who was refused before, and the next look
    assert caught.value.retry_after_s == pytest.approx(0.007 + 0.010 + 0.010 + 0.5)
    assert here.metrics.registry.get_sample_value("fewstep_shed_total", {"reason": "overloaded"}) == 2


async def test_who_is_refused_later_is_told_to_come_later(desk: Callable[..., Desk]) -> None:
    here = desk(max_wait_s=1.0)
    here.decide()  # a batch of four steps, 10 ms, is under way
    here.wait(2.0)
    named = replace(AUTO_INTENT, wanted=Wanted("shapes", tier="medium"))
    told = []
    for _ in range(3):
        with pytest.raises(Overloaded) as caught:
            here.decide(named)
        told.append(caught.value.retry_after_s)
    assert told == pytest.approx([1.51, 1.52, 1.53])
    here.clock.now_s += 1.52
    with pytest.raises(Overloaded) as caught:
        here.decide(named)
    assert caught.value.retry_after_s == pytest.approx(1.52)  # the third has yet to come


async def test_what_was_under_way_counts_until_the_queue_was_empty(desk: Callable[..., Desk]) -> None:
    here = desk(max_wait_s=1.0)
    here.decide()
    here.wait(0.0)
    here.dispatcher.look()
    here.wait(2.0)
    with pytest.raises(Overloaded) as caught:
        here.decide(replace(AUTO_INTENT, wanted=Wanted("shapes", tier="medium")))
    assert caught.value.retry_after_s == pytest.approx(1.5)


async def test_a_latency_limit_reads_what_was_measured_at_such_a_load(desk: Callable[..., Desk]) -> None:
    here = desk()
    work = here.decide(replace(AUTO_INTENT, wanted=Wanted("shapes", steps=4))).work
    assert work == Work("shapes", STUDENT.version, 4, (32, 32))
    assert steps(here, max_latency_ms=30) == 4
    for _ in range(8):
        here.latencies.add(work, 0.0, 31.0)
    assert steps(here, max_latency_ms=30) == 2
    here.wait(0.5)
    assert steps(here, max_latency_ms=523) == 4  # nothing measured there: 500 ms of queue and 22 ms alone
    assert steps(here, max_latency_ms=521) == 2


async def test_more_pictures_take_longer_and_are_not_measured_as_one(desk: Callable[..., Desk]) -> None:
    here = desk()
    intent = replace(AUTO_INTENT, wanted=Wanted("shapes", max_latency_ms=30))
    assert here.decide(intent).choice.steps == 4
    four = here.decide(replace(intent, n=2))  # 22 ms alone, and 10 ms a picture more
    assert (four.choice.steps, four.work) == (2, None)


def test_the_thresholds_are_settings() -> None:
    settings = GatewaySettings(redis_url="memory:", registry_url="memory:")
    assert (settings.degrade_wait_s, settings.degrade_hold_s) == (1.0, 5.0)


def flooded(desk: Callable[..., Desk], **owed_s: float) -> Desk:
    here = desk(max_wait_s=2.0)
    here.catalog.view.queues["shapes"] = QueueState(
        waiting={"high": 0, "normal": 9, "low": 0},
        running=0,
        cost_s={"high": 0.0, "normal": sum(owed_s.values()), "low": 0.0},
        owed_s={"normal": owed_s},
    )
    return here


async def test_a_flood_of_one_key_is_a_wait_for_that_key_alone(desk: Callable[..., Desk]) -> None:
    here = flooded(desk, flood=100.0, calm=0.5)
    with pytest.raises(Overloaded, match=r"the queue is 100\.5 s long"):
        here.decide(owner="flood")
    assert here.decide(owner="calm").wait_s == pytest.approx(
        1.0, abs=0.05
    )  # its own half second, and as much of others
    assert here.decide(owner="new").wait_s < 0.1


async def test_what_this_gateway_has_published_since_it_looked_counts_for_its_key(desk: Callable[..., Desk]) -> None:
    here = flooded(desk, flood=100.0)
    here.catalog.published("shapes", "normal", 5.0, "calm")
    with pytest.raises(Overloaded, match=r"the queue is 10\.0 s long"):
        here.decide(owner="calm")
    assert here.decide(owner="new").wait_s < 0.1


async def test_what_has_ended_since_this_gateway_looked_is_no_wait_any_more(desk: Callable[..., Desk]) -> None:
    here = flooded(desk, calm=1.5)
    with pytest.raises(Overloaded, match=r"the queue is 1\.5 s long"):
        here.decide(budget_s=1.0, owner="calm")
    here.catalog.ended("shapes", "normal", 1.0, "calm")
    assert here.decide(budget_s=1.0, owner="calm").wait_s == pytest.approx(0.5)
    here.catalog.ended("shapes", "normal", 1.0, "calm")  # a look that came between an end and word of it
    assert here.decide(owner="calm").wait_s == 0


async def test_what_may_take_longer_keeps_no_urgent_request_out(desk: Callable[..., Desk]) -> None:
    here = desk()
    patient = here.decide(Intent(Wanted("shapes", steps=4), "x", n=4))
    here.dispatcher.joined(patient, "patient", 60.0)
    here.wait(5.0)
    assert here.decide(budget_s=0.1, owner="").wait_s == 0
    with pytest.raises(Overloaded, match=r"the queue is 5\.0 s long and this request may wait"):
        here.decide(Intent(Wanted("shapes", steps=4), "x", n=4), budget_s=4.0)
    here.dispatcher.ended("patient")
    with pytest.raises(Overloaded):  # it is somebody else's then, of whom nothing is known
        here.decide(budget_s=0.1)


async def test_what_is_above_its_class_comes_first_however_long_it_may_take(desk: Callable[..., Desk]) -> None:
    here = desk()
    here.dispatcher.joined(here.decide(Intent(Wanted("shapes", steps=4), "x", n=4)), "patient", 60.0)
    here.wait(5.0, "high")
    with pytest.raises(Overloaded):
        here.decide(budget_s=0.1)


async def test_where_nobody_says_whose_it_is_all_of_it_comes_first(desk: Callable[..., Desk]) -> None:
    here = flooded(desk, flood=100.0)
    here.catalog.view.queues["shapes"].owed_s.clear()
    with pytest.raises(Overloaded, match=r"the queue is 100\.0 s long"):
        here.decide(owner="calm")


async def test_what_is_above_its_class_comes_first_whosever_it_is(desk: Callable[..., Desk]) -> None:
    here = flooded(desk, flood=100.0)
    with pytest.raises(Overloaded, match=r"the queue is 100\.0 s long"):
        here.decide(replace(AUTO_INTENT, priority=-5), owner="calm")


async def test_admission_counts_the_share_that_is_redone_and_the_latency_of_one_that_is() -> None:
    teacher = manifest("shapes", 8, guidance=CFG)
    student = manifest("shapes-fast", 1, mark=1, base=teacher).judged(Judge(steps=8, doubts={1: (1.0,) * 10}))
    stand = Stand(students=(teacher, student), current=revision(1, {"medium": (student, 1), "high": (teacher, 8)}))
    costs = {student.version: COST, teacher.version: COST}
    lease = leases.WorkerLease(deployments={"shapes": sorted(costs)}, costs=costs)
    await stand.worker.renew_lease(leases.write(lease))
    await stand.gateway.start()
    here = Desk(stand)

    def cost_s(share: float) -> float:
        return here.decide(Intent(Wanted("shapes", refinement=Refinement("redo", share)), "x", n=2)).cost_s

    fixed_s, row_s = COST.encode.row_s + COST.decode.row_s, COST.step.row_s
    assert cost_s(0.25) == pytest.approx(2 * (fixed_s + (1 + 2 + 0.25 * 6) * row_s))
    assert cost_s(0.5) == pytest.approx(2 * (fixed_s + (1 + 2 + 0.5 * 6) * row_s))
    alone_ms = 1000 * (COST.encode.alone_s + 9 * COST.step.alone_s + COST.decode.alone_s)
    wanted = Wanted("shapes", refinement=Refinement("redo", 0.05), max_latency_ms=int(alone_ms) - 1)
    with pytest.raises(InvalidRequest, match="too little"):
        here.decide(Intent(wanted, "x"))
    await stand.gateway.stop()
