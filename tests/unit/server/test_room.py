"""Room in time: versions that do not fit together are loaded in turn, nobody starves, and nothing is ever too full."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import MemoryExceeded
from server import metrics
from server.residency import LEAST_STAY_S, STAY, Residency, Tenant, stay_s
from server.room import Room
from tests import virtual_time

LOAD_S, SERVICE_S = 0.5, 0.01


def tenant(name: str) -> Tenant:
    return Tenant("toys", name)


@dataclass
class Toy:
    """A worker of a limit, with versions by name and bytes, whose loads and rows take time and nothing else."""

    sizes: Mapping[str, int]
    limit: int
    load_s: float = LOAD_S
    rows: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    waits_s: dict[str, list[float]] = field(default_factory=dict)
    most_bytes: int = 0
    demands: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now_s = asyncio.get_running_loop().time
        self.room = Room(
            Residency(self.limit), metrics.make(), lambda name: bool(self.rows[name]), self._evict, now_s=now_s
        )
        self.now_s = now_s

    async def row(self, name: str) -> None:
        begun_s = self.now_s()
        while not self.room.may_serve(tenant(name)):
            task = self.demands.get(name)
            if task is None:
                task = self.demands[name] = asyncio.create_task(self._fetch(name))
            await asyncio.shield(task)
        self.waits_s.setdefault(name, []).append(self.now_s() - begun_s)
        self.rows[name] += 1
        self.room.residency.used(tenant(name), self.now_s())
        await asyncio.sleep(SERVICE_S)
        self.rows[name] -= 1
        self.room.residency.used(tenant(name), self.now_s())
        self.room.moved()

    async def _fetch(self, name: str) -> None:
        try:
            if await self.room.take({tenant(name): {name: self.sizes[name]}}):
                self.loads[name] += 1
                self.most_bytes = max(self.most_bytes, self.room.residency.used_bytes)
                await asyncio.sleep(self.load_s)
                self.room.ready(tenant(name))
        finally:
            del self.demands[name]

    async def _evict(self, gone: Tenant) -> bool:
        assert not self.rows[gone.version]
        assert gone not in self.room.residency.pinned.get("toys", ())
        await asyncio.sleep(0)
        self.room.gone(gone)
        return True


async def users(toy: Toy, name: str, count: int, for_s: float) -> None:
    """So many, each with one request after the other."""

    async def user() -> None:
        while toy.now_s() < for_s:
            await toy.row(name)

    await asyncio.gather(*(user() for _ in range(count)))


def test_two_versions_that_do_not_fit_together_are_loaded_in_turn_and_not_for_every_row() -> None:
    for_s = 40.0

    async def serve() -> Toy:
        toy = Toy({"a": 6, "b": 6}, limit=10)
        await asyncio.gather(users(toy, "a", 2, for_s), users(toy, "b", 2, for_s))
        return toy

    toy = virtual_time.run(serve())
    turn_s = LOAD_S * (1 + STAY) + SERVICE_S
    assert sum(toy.loads.values()) == pytest.approx(for_s / turn_s, abs=3)
    for name in "ab":
        assert len(toy.waits_s[name]) > 2 * 0.7 * for_s / 2 / SERVICE_S  # four fifths of the time are for rows
        assert max(toy.waits_s[name]) <= turn_s + LOAD_S + SERVICE_S
    assert toy.most_bytes == 6


def test_rows_of_what_is_in_memory_do_not_wait_for_a_load_of_another() -> None:
    async def serve() -> Toy:
        toy = Toy({"a": 4, "b": 4, "c": 4}, limit=8)
        await toy.row("a")
        await toy.row("b")
        await asyncio.sleep(60)
        await toy.row("b")
        load = asyncio.create_task(toy.row("c"))
        await asyncio.sleep(LOAD_S / 2)
        assert toy.room.residency.residents[tenant("c")].state == "loading"
        await toy.row("b")
        assert toy.waits_s["b"][-1] == 0.0
        assert not load.done()
        await load
        return toy

    toy = virtual_time.run(serve())
    assert toy.loads == {"a": 1, "b": 1, "c": 1}
    assert tenant("a") not in toy.room.residency.residents


def test_a_version_that_is_always_in_use_makes_room_when_its_stay_is_over() -> None:
    async def serve() -> Toy:
        toy = Toy({"hot": 6, "cold": 6}, limit=10)
        hot = asyncio.gather(users(toy, "hot", 8, 20.0))
        await asyncio.sleep(1.0)
        await toy.row("cold")
        await hot
        return toy

    toy = virtual_time.run(serve())
    assert toy.waits_s["cold"][0] <= LOAD_S * (1 + STAY) + 2 * SERVICE_S
    assert toy.loads == {"hot": 2, "cold": 1}


def test_who_is_told_when_a_version_is_ready_finds_it_ready_then() -> None:
    async def serve() -> None:
        toy = Toy({"a": 6, "b": 6}, limit=10)
        await toy.row("a")
        parts = {"b": 6}
        promised_s = toy.room.ready_in_s(tenant("b"), parts)
        begun_s = toy.now_s()
        asked = asyncio.create_task(toy.row("b"))
        await asyncio.sleep(LOAD_S * STAY)  # now it is being loaded
        assert toy.room.residency.residents[tenant("b")].state == "loading"
        assert begun_s + promised_s == pytest.approx(toy.now_s() + toy.room.ready_in_s(tenant("b"), parts))
        await asked
        assert toy.waits_s["b"] == [pytest.approx(promised_s)]
        assert toy.room.ready_in_s(tenant("b"), parts) == 0.0

    virtual_time.run(serve())


def test_who_stands_in_the_queue_is_told_of_those_before() -> None:
    async def serve() -> None:
        toy = Toy({"a": 6, "b": 6, "c": 6}, limit=10)
        await toy.row("a")
        b = asyncio.create_task(toy.row("b"))
        await asyncio.sleep(SERVICE_S)
        promised_s = toy.room.ready_in_s(tenant("c"), {"c": 6})
        c = asyncio.create_task(toy.row("c"))
        await asyncio.gather(b, c)
        assert toy.waits_s["c"] == [pytest.approx(promised_s, abs=2 * SERVICE_S)]

    virtual_time.run(serve())


def test_who_no_longer_waits_lets_those_stay_who_were_to_go() -> None:
    async def serve() -> None:
        toy = Toy({"a": 6, "b": 6}, limit=10)
        await toy.row("a")
        await asyncio.sleep(60)
        long = asyncio.create_task(toy.row("a"))
        await asyncio.sleep(0)
        waits = asyncio.create_task(toy.room.take({tenant("b"): {"b": 6}}))
        await asyncio.sleep(0)
        assert not toy.room.may_serve(tenant("a"))
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        assert toy.room.may_serve(tenant("a"))
        await long

    virtual_time.run(serve())


def test_a_swap_that_cannot_have_both_is_refused_at_once_and_one_that_can_waits_for_nobody_pinned() -> None:
    async def serve() -> None:
        toy = Toy({"a": 6, "b": 4}, limit=10)
        await toy.row("a")
        toy.room.residency.swapping["toys"] = frozenset({tenant("a")})
        with pytest.raises(MemoryExceeded):
            await toy.room.take({tenant("c"): {"c": 5}}, beside=[tenant("a")])
        await toy.row("b")
        await asyncio.sleep(60)
        assert await toy.room.take({tenant("c"): {"c": 4}}, beside=[tenant("a")]) == {tenant("c")}
        assert set(toy.room.residency.residents) == {tenant("a"), tenant("c")}

    virtual_time.run(serve())


def test_who_asked_first_is_loaded_first_though_there_is_room_for_the_other() -> None:
    async def serve() -> None:
        toy = Toy({"a": 6, "large": 10, "small": 4}, limit=10)
        await toy.row("a")
        await asyncio.gather(toy.row("large"), toy.row("small"))
        assert list(toy.loads) == ["a", "large", "small"]

    virtual_time.run(serve())


def test_what_is_free_is_taken_by_nobody_past_those_who_wait() -> None:
    async def serve() -> None:
        toy = Toy({"a": 6, "b": 6}, limit=10)
        assert toy.room.take_free(tenant("a"), {"a": 6})
        waits = asyncio.create_task(toy.row("b"))
        await asyncio.sleep(0.1)
        assert not toy.room.take_free(tenant("c"), {"c": 1})
        toy.room.gone(tenant("a"))
        await waits
        assert toy.room.take_free(tenant("c"), {"c": 1})

    virtual_time.run(serve())


ROWS = st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 3)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS,
    sizes=st.fixed_dictionaries(dict.fromkeys("abcd", st.integers(1, 6))),
    limit=st.integers(6, 12),
    pinned=st.sampled_from([None, "a"]),
)
def test_every_row_is_served_within_the_bound_and_the_limit(
    rows: list[tuple[str, float]], sizes: dict[str, int], limit: int, pinned: str | None
) -> None:
    """Each of the others may be loaded once before, and stay; each may then have rows left, which take a moment."""
    if pinned and sizes[pinned] + max(sizes.values()) > limit:
        pinned = None

    async def serve() -> Toy:
        toy = Toy(sizes, limit, load_s=0.2)
        if pinned:
            toy.room.residency.pinned["toys"] = frozenset({tenant(pinned)})

        async def later(name: str, at_s: float) -> None:
            await asyncio.sleep(at_s)
            await toy.row(name)

        await asyncio.gather(*(later(name, at_s) for name, at_s in rows))
        return toy

    toy = virtual_time.run(serve())
    assert toy.most_bytes <= limit
    assert sorted(Counter(name for name, _ in rows).items()) == sorted(
        (name, len(waits)) for name, waits in toy.waits_s.items()
    )
    bound_s = len(sizes) * (0.2 + stay_s(0.2) + SERVICE_S)
    assert max(wait_s for waits in toy.waits_s.values() for wait_s in waits) <= bound_s
    assert stay_s(0.2) > LEAST_STAY_S
