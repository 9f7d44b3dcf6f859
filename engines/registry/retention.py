"""What a registry may lose, and taking it away beside any number of writers.

The danger is a writer who has seen that a blob (or a student) is there and is about to refer to it. Whoever refers to
something first marks it as counted on, then looks whether it is there, then refers to it (`put_blob`, `publish`,
`propose`). Whoever removes something first looks that nothing refers to it and that neither it nor its mark is younger
than the grace time, then takes it aside, then looks at the mark and the references again and puts it back if there is
one. So of the two, one always sees the other, as long as a writer refers to what it put within the grace time.
All ages are the store's own, compared with the time that the store itself gives to a file written now.
"""

from collections.abc import Iterable, Mapping
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
_CLOCK = ".clock"
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
        self._recover()

    def now_s(self) -> float:
        """What time it is for the store."""
        self._store.replace(_CLOCK, b"")
        return self._store.modified_s(_CLOCK) or 0.0

    def held(self, jobs: Mapping[str, Iterable[str]], going: Iterable[str] = ()) -> References:
        """Students that may not go, were those `going` gone."""
        direct = references(self._registry, self._keep, jobs)
        others = set(self._registry.students()) - set(going)
        made = bases(self._registry, others | direct.keys())
        return {version: direct.get(version, []) + made.get(version, []) for version in {*direct, *made}}

    def students(self, jobs: Mapping[str, Iterable[str]], named: Iterable[str] = ()) -> list[Garbage]:
        """Those `named`, and those that were used for nothing for so long; with what is made from them, or not at all.

        Raises:
            Conflict: something refers to a student that was named.
            StudentNotFound: there is none of that name.
        """
        asked = {self._registry.student(version).version for version in named}
        aged = {version for version in self._registry.students() if self._unused(version)}
        held = self.held(jobs, going=asked | aged)
        for version in sorted(asked & held.keys()):
            raise Conflict(f"{shown(version)} is referred to by {', '.join(held[version])}: it stays")
        found = [self._student(version, NAMED if version in asked else "unused") for version in asked | aged]
        return sorted((one for one in found if one.name not in held), key=lambda one: one.name)

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

    def remove(self, garbage: Garbage, jobs: Mapping[str, Iterable[str]]) -> bool:
        """Takes it away; False if somebody counts on it by now."""
        first, *rest = garbage.names
        # One that was named goes although it is young, but not while somebody is about to refer to it.
        before = self.now_s() - (_RECENT_S if garbage.why == NAMED else self._grace_s)
        if not self._store.move(first, f"{_ASIDE}/{first}"):
            return False
        if self._counted_on(garbage, jobs, before):
            self._store.move(f"{_ASIDE}/{first}", first)
            return False
        for name in (f"{_ASIDE}/{first}", fresh(first), *rest):
            self._store.remove(name)
        return True

    def _counted_on(self, garbage: Garbage, jobs: Mapping[str, Iterable[str]], before: float) -> bool:
        if (self._store.modified_s(fresh(garbage.names[0])) or 0.0) >= before:
            return True
        return garbage.kind == "student" and garbage.name in references(self._registry, self._keep, jobs)

    def _young_s(self, name: str) -> float:
        """When it was written, or counted on, last."""
        return max(self._store.modified_s(name) or 0.0, self._store.modified_s(fresh(name)) or 0.0)

    def _recover(self) -> None:
        """Puts back what a run that was killed had taken aside; it goes this time if nothing speaks for it."""
        for one in self._store.held(_ASIDE):
            if not self._store.exists(one.name):
                self._store.move(f"{_ASIDE}/{one.name}", one.name)
            self._store.remove(f"{_ASIDE}/{one.name}")
