"""How a worker's students are specialised beside traffic: once, and behind every load."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pytest

from engines.errors import GoldenMismatch, MemoryExceeded, StudentNotFound
from engines.slot import Piece, Staging
from server import metrics
from server.residency import Residency, Resident, Tenant
from server.residents import OnGone, Residents, is_pinned
from server.room import Room
from tests.eventually import aeventually

V1, V2, V3 = ("toy@" + digit * 64 for digit in "123")


class Engine:
    """Does at once what it is given."""

    def background(self, work: Callable[[], object]) -> "Future[object]":
        future: Future[object] = Future()
        future.set_result(work())
        return future

    def landed(self) -> "Future[object]":
        return self.background(_none)


def _none() -> None: ...


class Slot:
    """`during` is called by the first piece of every specialisation, `between` before the last piece of a load."""

    def __init__(self, during: Callable[[], None], between: Callable[[], None] = _none) -> None:
        self.versions = {V1}
        self.during, self.between = during, between
        self.undone: list[list[str]] = []
        self.staged: list[Staging] = []
        self.asked: list[list[str]] = []
        self.sizes: dict[str, int] = {}
        self.measured_on: list[str] = []

    def stage(self, versions: list[str]) -> Staging:
        self.asked.append(versions)
        return Staging(tuple(versions), self._loading(versions), lambda: self.undone.append(versions))

    def _loading(self, versions: list[str]) -> Iterator[Piece]:
        yield Piece("building", _none, False)
        self.between()
        yield Piece("verifying", lambda: self.versions.update(versions), True)

    serving: frozenset[str] = frozenset()

    def evict(self, version: str) -> Callable[[], frozenset[str]]:
        self.versions.remove(version)
        return lambda: frozenset({f"blob of {version}"})

    def family(self, version: str) -> str:
        if version not in self.versions:
            raise StudentNotFound(version)
        return "student"

    def switch(self, versions: frozenset[str]) -> None:
        self.serving = versions

    def weight_bytes(self, version: str) -> dict[str, int]:
        return {f"blob of {version}": self.sizes.get(version, 1)}

    def specialising_bytes(self, version: str) -> dict[str, dict[str, int]]:
        return {"cuda": {"made": 2, "measured": 4}, "cpu": {"made": 2}}

    def specialise(self, version: str, measure_on: str) -> Staging:
        self.measured_on.append(measure_on)
        self.staged.append(Staging((version,), self._pieces(), _none))
        return self.staged[-1]

    def _pieces(self) -> Iterator[Piece]:
        yield Piece("specialising", self.during, False)
        yield Piece("verifying", _none, True)


def residents(
    slot: Slot, gone: OnGone = lambda version, blobs: None, *, limit: int = 10, pinned: Sequence[str] = ()
) -> Residents:
    async def evict(tenant: Tenant) -> bool:
        return await made.evict(tenant.version)

    room = Room(Residency(limit), metrics.make(), evict=evict)
    for version in slot.versions:
        one = Resident(slot.weight_bytes(version), -9e9, -9e9, 0.0, "resident")
        room.residency.residents[Tenant("toys", version)] = one
    made = Residents("toys", slot, Engine(), room, gone, pinned=pinned)  # type: ignore[arg-type]
    return made


async def test_a_version_is_specialised_once() -> None:
    slot = Slot(_none)
    made = residents(slot)
    for _ in range(2):
        await made.specialise([V1])
    assert [one.phase for one in slot.staged] == ["ready"]


async def test_specialising_gives_way_to_a_load_and_is_done_later() -> None:
    loop = asyncio.get_running_loop()
    loads: list[asyncio.Future[None]] = []

    def asks() -> None:
        if not loads:
            loads.append(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(made.load([V2]), loop), loop=loop))
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)

    slot = Slot(asks)
    made = residents(slot)
    await made.specialise([V1])
    assert [one.phase for one in slot.staged] == ["rejected"]
    await loads[0]
    assert slot.versions == {V1, V2}
    await made.specialise([V1])
    assert [one.phase for one in slot.staged] == ["rejected", "ready"]


async def test_specialising_gives_way_to_a_retirement_too() -> None:
    """It waits for the same lock, and a follower that waits for it hears of no load that would be given way to."""
    loop = asyncio.get_running_loop()
    retirements: list[asyncio.Future[bool]] = []

    def retires() -> None:
        if not retirements:
            asked = asyncio.run_coroutine_threadsafe(made.unload(V2), loop)
            retirements.append(asyncio.wrap_future(asked, loop=loop))
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)

    slot = Slot(retires)
    slot.versions.add(V2)
    made = residents(slot)
    await made.specialise([V1])
    assert [one.phase for one in slot.staged] == ["rejected"]
    assert await retirements[0]
    assert slot.versions == {V1}


async def test_a_load_that_is_canceled_while_it_tells_its_phase_lets_go_of_what_it_loaded() -> None:
    slot = Slot(_none)
    telling: list[str] = []

    async def phase(name: str) -> None:
        telling.append(name)
        if name == "verifying":
            await asyncio.Event().wait()

    task = asyncio.create_task(residents(slot).load([V2], phase, beside=True))
    await aeventually(lambda: asyncio.sleep(0, "verifying" in telling))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slot.undone == [[V2]]
    assert slot.versions == {V1}


async def test_a_load_that_is_canceled_between_its_pieces_lets_go_when_that_has_ended() -> None:
    reached, released = threading.Event(), threading.Event()

    def between() -> None:
        reached.set()
        assert released.wait(10)

    slot = Slot(_none, between)
    task = asyncio.create_task(residents(slot).load([V2]))
    await asyncio.to_thread(reached.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slot.undone == []
    released.set()
    await aeventually(lambda: asyncio.sleep(0, slot.undone == [[V2]]))


class OfALibrary(Exception):
    """ONNX Runtime's errors have no other parent."""


@pytest.mark.parametrize(
    "error", [GoldenMismatch("does not reproduce sample 0"), OfALibrary("no kernel"), MemoryError()]
)
async def test_what_cannot_be_specialised_is_said_once_and_serves_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise error

    slot = Slot(fails)
    made = residents(slot)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await made.specialise([V1])
    assert [one.phase for one in slot.staged] == ["rejected"]
    assert [record.message for record in caplog.records] == ["serves with weights set"]
    assert made.held == {V1}


async def test_what_is_unloaded_is_told_with_the_blobs_that_went_with_it() -> None:
    told: list[tuple[str, frozenset[str]]] = []
    made = residents(Slot(_none), lambda version, blobs: told.append((version, blobs)))
    assert await made.unload(V1)
    assert told == [(V1, frozenset({f"blob of {V1}"}))]


async def test_a_version_that_would_not_fit_specialised_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    slot = Slot(_none)
    made = residents(slot, limit=1)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            await made.specialise([V1])
    assert slot.staged == []
    assert [record.message for record in caplog.records] == ["no room to specialise"]


@pytest.mark.parametrize(("limit", "device", "most_bytes"), [(7, "cuda", 7), (6, "cpu", 3), (3, "cpu", 3)])
async def test_what_is_made_and_measured_has_room_of_its_own_while_it_is_specialised(
    limit: int, device: str, most_bytes: int
) -> None:
    seen: list[int] = []
    slot = Slot(lambda: seen.append(made._room.residency.used_bytes))
    made = residents(slot, limit=limit)
    await made.specialise([V1])
    assert (slot.measured_on, seen) == ([device], [most_bytes])
    assert made._room.residency.used_bytes == 1


async def test_after_a_rejection_the_books_are_as_before_though_specialised_it_would_be_smaller() -> None:
    taken: list[bool] = []

    def rejects() -> None:
        taken.append(made._room.take_free(Tenant("others", V2), {"other": 1}))
        raise GoldenMismatch("does not reproduce sample 0")

    slot = Slot(rejects)
    slot.sizes[V1] = 4
    made = residents(slot, limit=10)
    await made.specialise([V1])
    assert taken == [False]
    assert made._room.residency.used_bytes == 4


async def test_what_has_become_smaller_is_booked_so_and_what_has_become_larger_too() -> None:
    slot = Slot(lambda: slot.sizes.update({V1: 2}))
    slot.sizes[V1] = 4
    made = residents(slot, limit=10)
    await made.specialise([V1])
    assert made._room.residency.used_bytes == 2
    slot = Slot(lambda: slot.sizes.update({V1: 3}))
    made = residents(slot, limit=3)
    await made.specialise([V1])
    assert made._room.residency.used_bytes == 3


async def test_specialising_gives_way_to_who_waits_for_room_elsewhere_and_is_no_reason_to_refuse_it() -> None:
    loop = asyncio.get_running_loop()
    taken: list[asyncio.Future[frozenset[Tenant]]] = []
    other = Tenant("others", V2)

    def asks() -> None:
        if not taken:
            asked = asyncio.run_coroutine_threadsafe(made._room.take({other: {"other": 4}}), loop)
            taken.append(asyncio.wrap_future(asked, loop=loop))
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)

    slot = Slot(asks)
    made = residents(slot, limit=7, pinned=["toys"])
    await made.preload([V1])
    made.serve([V1])
    await made.specialise([V1])
    assert [one.phase for one in slot.staged] == ["rejected"]
    assert await taken[0] == {other}
    made._room.gone(other)
    await made.specialise([V1])
    assert [one.phase for one in slot.staged] == ["rejected", "ready"]


async def test_room_is_given_back_by_a_load_that_fails() -> None:
    def fails() -> None:
        raise GoldenMismatch("does not reproduce sample 0")

    made = residents(Slot(_none, fails), limit=2)
    for _ in range(2):
        with pytest.raises(GoldenMismatch):
            await made.load([V2])
    assert made.known == {V1}
    with pytest.raises(GoldenMismatch):
        await made.fetch([V2, V3])
    assert made._room.residency.used_bytes == 0


async def test_nothing_is_loaded_of_versions_of_which_one_can_never_be() -> None:
    slot = Slot(_none)
    slot.sizes[V3] = 11
    with pytest.raises(MemoryExceeded):
        await residents(slot).load([V2, V3])
    assert slot.asked == []


async def test_two_who_want_the_same_version_load_it_once() -> None:
    slot = Slot(_none)
    made = residents(slot)
    await asyncio.gather(made.load([V2]), made.fetch([V2]), made.fetch([V2, V3]))
    assert slot.versions == {V1, V2, V3}
    assert sorted(slot.asked) == [[V2], [V3]]


async def test_a_version_that_is_served_is_evicted_and_not_unloaded() -> None:
    slot = Slot(_none)
    made = residents(slot)
    await made.preload([V1])
    made.serve([V1])
    assert made.student(V1) == "student"
    made._room.residency.stop([Tenant("toys", V1)])
    assert made.student(V1) is None  # it makes room for another
    made._room.residency.resume()
    assert not await made.unload(V1)
    assert await made.evict(V1)
    assert made.student(V1) is None
    assert (made.held, made.known) == (frozenset(), {V1})
    assert made.states()[V1].state == "on_demand"
    await made.fetch([V1])
    assert made.states()[V1].state == "resident"
    made.serve([V2])
    assert await made.unload(V1)
    assert made.known == {V2}


async def test_what_is_served_is_loaded_as_far_as_there_is_room_and_the_first_before_the_others() -> None:
    slot = Slot(_none)
    slot.versions.clear()
    made = residents(slot, limit=2)
    await made.preload([V3, V1, V2])
    assert slot.versions == {V3, V1}


async def test_a_pinned_version_is_loaded_though_others_have_to_go() -> None:
    slot = Slot(_none)
    made = residents(slot, limit=1, pinned=["toys"])
    await made.preload([V2])
    assert slot.versions == {V2}
    assert is_pinned(V1, [V1[:16]])
    assert not is_pinned(V1, [V1[:15], "toys"])


async def test_a_version_that_is_not_here_is_left_alone() -> None:
    slot = Slot(_none)
    await residents(slot).specialise([V2])
    assert slot.staged == []
