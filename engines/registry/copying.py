"""A registry copied while it is written to.

Nothing that is there changes its meaning, and whoever refers to something has put it there before. So what refers is
copied before what it refers to: whatever a copied revision, job or student names was there when that was copied, and
still is when its own turn comes. Only `fewstep gc` takes things away; what it took is told, not missed.
Back into an empty registry the way is the other one round, so that nothing refers to what is not there yet.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engines.errors import Conflict
from engines.manifest import shown
from engines.registry._keyed import KeyedRegistry
from engines.registry._names import job_folder, student_folder
from engines.registry.references import references

_OUTCOME, _CANDIDATES, _STATES = ".outcome.json", "/candidates/", "states/"
_TRIES = 5
_REFERRING_FIRST: tuple[Callable[[str], bool], ...] = (
    lambda name: name.endswith(_OUTCOME),  # which names the revision that a candidate became
    lambda name: _CANDIDATES in name and not name.endswith(_OUTCOME),
    lambda name: _CANDIDATES not in name,
)
"""Files of deployments."""


@dataclass(slots=True)
class Copied:
    """`bytes` of the `files` that were copied; `known_bytes` of blobs that the copy has had before."""

    files: int = 0
    bytes: int = 0
    known_bytes: int = 0


def back_up(source: KeyedRegistry, target: KeyedRegistry) -> Copied:
    """Adds all of `source` to `target`, an empty registry or an earlier copy, of which blobs are not copied again.

    A trainer that replaces its checkpoints faster than they are copied may leave none in the copy: its job begins anew.

    Raises:
        Conflict: something was removed meanwhile that the copy names: copy once more.
        StorageFull: there is no room.
    """
    copy = _Copy(source, target)
    copy.deployments(_REFERRING_FIRST)
    copy.jobs()
    copy.students()
    copy.blobs(target)
    _check_whole(target)
    return copy.done


def restore(source: KeyedRegistry, target: KeyedRegistry) -> Copied:
    """Copies a copy back.

    Raises:
        Conflict: `target` has something in it already.
        StorageFull: there is no room.
    """
    for kind in ("deployments", "jobs", "students", "blobs"):
        if target.store.children(kind):
            raise Conflict(f"the registry has {kind} already: a backup is restored into an empty one")
    copy = _Copy(source, target)
    copy.blobs(source)
    copy.students()
    copy.jobs()
    copy.deployments(reversed(_REFERRING_FIRST))
    return copy.done


def _check_whole(copied: KeyedRegistry) -> None:
    students = set(copied.students())
    for version, why in references(copied, 2, {}).items():
        if version not in students:
            raise Conflict(f"{shown(version)}, of which is {why[0]}, was removed while it was copied: copy once more")
    for version in students:
        for sha in copied.student(version).blobs:
            if not copied.has_blob(sha):
                raise Conflict(f"blob {sha[:12]} of {shown(version)} was removed while it was copied: copy once more")


class _Copy:
    def __init__(self, source: KeyedRegistry, target: KeyedRegistry) -> None:
        self._source, self._target = source, target
        self._from, self._to = source.store, target.store
        self.done = Copied()

    def deployments(self, kinds: Iterable[Callable[[str], bool]]) -> None:
        for kind in kinds:  # each is listed when its turn comes
            for name in filter(kind, sorted(self._from.walk("deployments"))):
                self._one(f"deployments/{name}")

    def jobs(self) -> None:
        for job in self._source.job_ids():
            for _ in range(_TRIES):  # a trainer replaces its oldest checkpoint by a newer one
                names = self._source.job_files(job)
                # What a job has reached is written after what it has made; and the newest checkpoint stays the longest.
                ordered = sorted(names, key=lambda name: (name.startswith(_STATES), name), reverse=True)
                if all([self._one(f"{job_folder(job)}/{name}") for name in ordered]):
                    for old in set(self._target.job_files(job)).difference(names):  # what an earlier copy had
                        self._to.remove(f"{job_folder(job)}/{old}")
                    break

    def students(self) -> None:
        for version in self._source.students():
            folder = student_folder(version)
            for name in self._from.walk(folder):
                self._one(f"{folder}/{name}")

    def blobs(self, of: KeyedRegistry) -> None:
        """Those of the students that `of` has."""
        for sha in sorted({sha for version in of.students() for sha in of.student(version).blobs}):
            self._one(f"blobs/{sha}", fixed=True)

    def _one(self, name: str, *, fixed: bool = False) -> bool:
        """Whether the file was there. `fixed` content is what its name says."""
        path = self._from.local(name)
        if path is None:
            return False
        try:
            size = path.stat().st_size
            if not fixed:
                self._to.replace(name, path)
            elif not self._to.create(name, path):
                self.done.known_bytes += size
                return True
        except FileNotFoundError:
            return False
        finally:
            self._from.forget(name)
        self.done.files += 1
        self.done.bytes += size
        return True
