"""What a registry may lose, and taking it away beside any number of writers.

The danger is a writer who has seen that a blob (or a student) is there and is about to refer to it. Whoever refers to
something first marks it as counted on, then looks whether it is there, then refers to it (`put_blob`, `publish`,
`propose`). Whoever removes something first looks that nothing refers to it and that neither it nor its mark is younger
than the grace time, then takes it aside, then looks at the mark and the references again and puts it back if there is
one. So of the two, one always sees the other, as long as a writer refers to what it put within the grace time.
All ages are the store's own, compared with the time that it is for the store. One run at a time takes things away.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from engines.errors import Conflict
from engines.manifest import shown
from engines.registry._keyed import KeyedRegistry
from engines.registry._names import fresh, student_file, student_folder
from engines.registry.references import References, bases, references

NAMED = "named"
Kind = Literal["student", "blob", "checkpoint", "engine"]
_ASIDE = ".aside"
_TURNS = ".turns"
_TURN_S = 3600.0
_RECENT_S = 60.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that may go: `names` are its files in the store, the one that others look for first."""

    kind: Kind
    name: str
    bytes: int
    why: str
    names: tuple[str, ...] = ()


class Retention:
    """Finds what nothing refers to. `jobs` are asked again whenever a student is about to go."""

    def __init__(
        self, registry: KeyedRegistry, *, grace_s: float, keep_revisions: int, unused_students_s: float | None = None
    ) -> None:
        self._registry, self._store = registry, registry.store
        self._grace_s, self._keep, self._unused_s = grace_s, keep_revisions, unused_students_s

    def now_s(self) -> float:
        """What time it is for the store."""
        return self._store.now_s()

    @contextmanager
    def alone(self) -> Iterator[Callable[[], None]]:
        """While no other run takes anything away; what one that was killed had taken aside is back.

        Call what it yields before each removal: a turn that nobody renews ends by itself.

        Raises:
            Conflict: another run has its turn.
        """
        mine = f"{_TURNS}/{secrets.token_hex(8)}"

        def renew() -> None:
            if not self._store.exists(mine):
                raise _busy()  # it took this run for a dead one
            self._store.replace(mine, b"")

        self._store.replace(mine, b"")
        try:
            self._refuse_others(mine)
            self._recover()
            yield renew
        finally:
            self._store.remove(mine)

    def _refuse_others(self, mine: str) -> None:
        """Each says that it is there before it looks for others: of two that begin at once, none or one goes on."""
        for one in self._store.held(_TURNS):
            turn = f"{_TURNS}/{one.name}"
            if turn != mine and one.modified_s > self.now_s() - _TURN_S:
                raise _busy()
            if turn != mine:
                self._store.remove(turn)  # of a run that was killed

    def held(self, jobs: Mapping[str, Iterable[str]], going: Iterable[str] = ()) -> References:
        """Students that may not go, were those `going` gone."""
        direct = references(self._registry, self._keep, jobs)
        others = set(self._registry.students()) - set(going)
        made = bases(self._registry, others | direct.keys())
        return {version: direct.get(version, []) + made.get(version, []) for version in {*direct, *made}}

    def students(self, jobs: Mapping[str, Iterable[str]], named: Iterable[str] = ()) -> list[Garbage]:
        """Those `named`, and those that were used for nothing for so long; what is made from another comes before it.

        Raises:
            Conflict: something refers to a student that was named.
            CorruptBlob: a manifest cannot be read, and so nobody knows what it was made from.
            StudentNotFound: there is none of that name.
        """
        asked = {self._registry.student(version).version for version in named}
        aged = {version for version in self._registry.students() if self._unused(version)}
        held = self.held(jobs, going=asked | aged)
        for version in sorted(asked & held.keys()):
            raise Conflict(f"{shown(version)} is referred to by {', '.join(held[version])}: it stays")
        going = (asked | aged) - held.keys()
        ordered = sorted(going, key=lambda version: (-self._depth(version, going), version))
        return [self._student(version, NAMED if version in asked else "unused") for version in ordered]

    def _depth(self, version: str, among: set[str]) -> int:
        """How many of these follow each other up to this one, each made from the one before."""
        manifest = self._registry.student(version)
        origins = among & {manifest.base, *manifest.parents}
        return 1 + max((self._depth(origin, among) for origin in origins), default=0)

    def _unused(self, version: str) -> bool:
        if self._unused_s is None:
            return False
        return self._young_s(student_file(version)) < self.now_s() - max(self._unused_s, self._grace_s)

    def _student(self, version: str, why: str) -> Garbage:
        folder = student_folder(version)
        files = sorted(self._store.held(folder), key=lambda file: file.name != "student.json")
        return Garbage(
            "student", version, sum(file.bytes for file in files), why, tuple(f"{folder}/{one.name}" for one in files)
        )

    def blobs(self, going: Iterable[str] = ()) -> list[Garbage]:
        """Those that no student has, were those `going` gone.

        Raises:
            CorruptBlob: a manifest cannot be read, and so nobody knows what it has.
        """
        before = self.now_s() - self._grace_s
        held = sorted(self._store.held("blobs"))  # what is put later is no matter of ours
        kept = set(self._registry.students()) - set(going)
        used = {sha for version in kept for sha in self._registry.student(version).blobs}
        return [
            Garbage("blob", one.name, one.bytes, "no student has it", (f"blobs/{one.name}",))
            for one in held
            if one.name not in used and self._young_s(f"blobs/{one.name}") < before
        ]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file below."""
        return {one.name: one.bytes for one in self._store.held(folder)}

    def remove(self, garbage: Garbage, jobs: Mapping[str, Iterable[str]]) -> bool:
        """Takes it away; False if somebody counts on it by now."""
        first, *rest = garbage.names
        # One that was named goes although it is young, but not while somebody is about to refer to it.
        before = self.now_s() - (_RECENT_S if garbage.why == NAMED else self._grace_s)
        if self._counted_on(garbage, jobs, before) or not self._store.move(first, f"{_ASIDE}/{first}"):
            return False
        if self._counted_on(garbage, jobs, before):
            self._store.move(f"{_ASIDE}/{first}", first)
            return False
        for name in (f"{_ASIDE}/{first}", fresh(first), *rest):
            self._store.remove(name)
        return True

    def drop(self, garbage: Garbage) -> None:
        """Takes away what nobody will ever refer to. Unlike `remove` it needs no space."""
        for name in garbage.names:
            self._store.remove(name)

    def _counted_on(self, garbage: Garbage, jobs: Mapping[str, Iterable[str]], before: float) -> bool:
        if (self._store.modified_s(fresh(garbage.names[0])) or 0.0) >= before:
            return True
        return garbage.kind == "student" and garbage.name in self.held(jobs)

    def _young_s(self, name: str) -> float:
        """When it was written, or counted on, last."""
        return max(self._store.modified_s(name) or 0.0, self._store.modified_s(fresh(name)) or 0.0)

    def _recover(self) -> None:
        """What was taken aside goes this time if nothing speaks for it."""
        for one in self._store.held(_ASIDE):
            if not self._store.exists(one.name):
                self._store.move(f"{_ASIDE}/{one.name}", one.name)
            self._store.remove(f"{_ASIDE}/{one.name}")


def _busy() -> Conflict:
    return Conflict("another `fewstep gc` is at work in this registry, or was killed less than an hour ago: try later")
