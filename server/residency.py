"""Which students stay in a worker's memory: pure rules over bytes, time is an argument.

A component that several students share counts once. Room for a student is made by evicting the least recently used of
those that are idle, then those that have been here longest and are in use: they are given no more rows and go when
those that they have are done. What was loaded stays for a multiple of what its load took, so that two students that
alternate and do not both fit are loaded in turn, a batch of rows each, and not for every row.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from engines.errors import MemoryExceeded
from engines.manifest import shown

STAY = 4.0
"""How many times as long as its load took a student stays: loads in turn take at most a fifth of the time."""
LEAST_STAY_S, MOST_STAY_S = 0.25, 60.0
MIB = 2**20
Parts = Mapping[Any, int]
"""The components of a student, by what they share with others, and the bytes of each."""
State = Literal["loading", "resident", "leaving"]


@dataclass(frozen=True, slots=True, order=True)
class Tenant:
    """A version as one deployment serves it."""

    deployment: str
    version: str


@dataclass(slots=True)
class Resident:
    """`since_s`: when it could serve, or while it is loading when that began. `load_s`: how long that took."""

    parts: Parts
    since_s: float
    used_s: float
    load_s: float = 0.0
    state: State = "loading"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`fits`: there is room now. Otherwise these have to go, the idle ones at once and the busy ones when their rows
    are done; none of either means: ask again at `again_s`, or when something has changed."""

    fits: bool = False
    idle: tuple[Tenant, ...] = ()
    busy: tuple[Tenant, ...] = ()
    again_s: float = float("inf")


def stay_s(load_s: float) -> float:
    return min(MOST_STAY_S, max(LEAST_STAY_S, STAY * load_s))


@dataclass(slots=True)
class Residency:
    """The books of one worker. `pinned` never leave, `swapping` not while their deployment is being swapped."""

    limit_bytes: int
    residents: dict[Tenant, Resident] = field(default_factory=dict)
    pinned: dict[str, frozenset[Tenant]] = field(default_factory=dict)
    swapping: dict[str, frozenset[Tenant]] = field(default_factory=dict)
    _took_s: dict[str, float] = field(default_factory=dict)  # by version: its last load
    _loaded_bytes: int = 0  # of all loads, and what they took: the first load of a version is guessed from these
    _loaded_s: float = 0.0

    @property
    def used_bytes(self) -> int:
        return union_bytes(one.parts for one in list(self.residents.values()))

    def snapshot(self) -> "Residency":
        """As it is now, for another thread to ask."""
        return replace(self, residents=dict(self.residents), pinned=dict(self.pinned), swapping=dict(self.swapping))

    def check(self, wanted: Mapping[Tenant, Parts], beside: Collection[Tenant] = ()) -> None:
        """That these could ever be here together, and beside what is pinned and the residents in `beside`.

        Raises:
            MemoryExceeded: they cannot; it says all sizes.
        """
        names = ", ".join(shown(version) for version in sorted({tenant.version for tenant in wanted}))
        own_bytes = union_bytes(wanted.values())
        if own_bytes > self.limit_bytes:
            raise MemoryExceeded(
                f"{names} takes {_mib(own_bytes)} for weights and this worker may hold {_mib(self.limit_bytes)} in "
                "all: raise WORKER_RESIDENT_BYTES, or serve it elsewhere"
            )
        fixed = {tenant for tenant in self._pinned({*beside, *_all(self.pinned)}) if tenant not in wanted}
        all_bytes = union_bytes([*wanted.values(), *(self.residents[tenant].parts for tenant in fixed)])
        if all_bytes > self.limit_bytes:
            others = ", ".join(shown(version) for version in sorted({tenant.version for tenant in fixed}))
            raise MemoryExceeded(
                f"{names} takes {_mib(own_bytes)} for weights, with {others}, which has to stay meanwhile, "
                f"{_mib(all_bytes)}, and this worker may hold {_mib(self.limit_bytes)}: raise WORKER_RESIDENT_BYTES"
            )

    def verdict(self, wanted: Mapping[Tenant, Parts], now_s: float, busy: Callable[[Tenant], bool]) -> Verdict:
        """What has to go for these. Nothing does before all that has to can."""
        if self._room(wanted, ()) >= 0:
            return Verdict(fits=True)
        held = self._pinned({*_all(self.pinned), *_all(self.swapping)})
        able = {
            tenant: one
            for tenant, one in self.residents.items()
            if tenant not in held and tenant not in wanted and one.state != "loading"
        }
        later = [end for one in able.values() if one.state != "leaving" and (end := _end_s(one)) > now_s]
        gone: list[Tenant] = []
        for tenant in sorted((t for t, one in able.items() if _may_leave(one, now_s)), key=self._order(busy)):
            gone.append(tenant)
            if self._room(wanted, gone) >= 0:
                break
        else:
            return Verdict(again_s=min(later, default=float("inf")))
        for tenant in list(gone):  # what came before the last one may turn out not to be needed
            rest = [other for other in gone if other != tenant]
            if self._room(wanted, rest) >= 0:
                gone = rest
        idle, used = [t for t in gone if not busy(t)], [t for t in gone if busy(t)]
        return Verdict(idle=tuple(idle), busy=tuple(used))

    def reserve(self, wanted: Mapping[Tenant, Parts], now_s: float) -> frozenset[Tenant]:
        """The loads begin of those that are not here, which are returned."""
        new = frozenset(wanted.keys() - self.residents.keys())
        for tenant in new:
            self.residents[tenant] = Resident(wanted[tenant], now_s, now_s)
        return new

    def ready(self, tenant: Tenant, now_s: float) -> None:
        """Its load has ended."""
        one = self.residents[tenant]
        one.load_s, one.state = now_s - one.since_s, "resident"
        one.since_s = one.used_s = now_s
        self._took_s[tenant.version] = one.load_s
        self._loaded_s += one.load_s
        self._loaded_bytes += union_bytes([one.parts])

    def gone(self, tenant: Tenant) -> None:
        self.residents.pop(tenant, None)

    def used(self, tenant: Tenant, now_s: float) -> None:
        if tenant in self.residents:
            self.residents[tenant].used_s = now_s

    def resize(self, tenant: Tenant, parts: Parts) -> bool:
        """Its parts take other memory from now on, whoever shares them; False, and no change, without room for that."""
        one = self.residents.get(tenant)
        if one is None or self._room({tenant: parts}, ()) < 0:
            return False
        for each in self.residents.values():
            each.parts = {part: parts.get(part, size) for part, size in each.parts.items()}
        return True

    def stop(self, tenants: Iterable[Tenant]) -> None:
        """These are given no more rows."""
        for tenant in tenants:
            self.residents[tenant].state = "leaving"

    def resume(self) -> None:
        """Who was to leave and is still here may stay."""
        for one in self.residents.values():
            if one.state == "leaving":
                one.state = "resident"

    def expected_load_s(self, version: str, parts: Parts) -> float:
        """As long as its last load, or by what others took for their bytes; 0 before the first."""
        guess_s = self._loaded_s * union_bytes([parts]) / self._loaded_bytes if self._loaded_bytes else 0.0
        return self._took_s.get(version, guess_s)

    def forget(self, version: str) -> None:
        """Drops what is known of a version that nobody serves any more."""
        self._took_s.pop(version, None)

    def _room(self, wanted: Mapping[Tenant, Parts], without: Collection[Tenant]) -> int:
        """Bytes left with these and without those; negative where they do not fit."""
        kept = (one.parts for tenant, one in self.residents.items() if tenant not in without)
        return self.limit_bytes - union_bytes([*wanted.values(), *kept])

    def _pinned(self, tenants: Iterable[Tenant]) -> set[Tenant]:
        """Those of them that are here."""
        return {tenant for tenant in tenants if tenant in self.residents}

    def _order(self, busy: Callable[[Tenant], bool]) -> Callable[[Tenant], "tuple[bool, float]"]:
        def key(tenant: Tenant) -> tuple[bool, float]:
            one, in_use = self.residents[tenant], busy(tenant)
            return in_use, one.since_s if in_use else one.used_s

        return key


def union_bytes(several: Iterable[Parts]) -> int:
    """What they take together: a shared part once, as large as anybody knows it."""
    seen: dict[Any, int] = {}
    for parts in several:
        for part, size in parts.items():
            seen[part] = max(size, seen.get(part, 0))
    return sum(seen.values())


def _all(by_deployment: Mapping[str, frozenset[Tenant]]) -> Iterator[Tenant]:
    for tenants in by_deployment.values():
        yield from tenants


def _end_s(one: Resident) -> float:
    return one.since_s + stay_s(one.load_s)


def _may_leave(one: Resident, now_s: float) -> bool:
    return one.state == "leaving" or _end_s(one) <= now_s


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
