"""What every registry may lose, and what it keeps while others write."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.errors import Conflict, CorruptBlob, NotFound, StudentNotFound
from engines.manifest import StudentManifest
from engines.registry._keyed import KeyedRegistry
from engines.registry._names import fresh, student_file
from engines.registry._store import DictStore, LocalStore
from engines.registry.retention import Garbage, Retention
from tests.contract.test_registry import manifest_of, outcome_of, revision_of, tier_map

DAY_S = 24 * 3600.0


class Later(Retention):
    """Of two days later, by the store's clock: what is not written in the test's future is older than the grace."""

    def now_s(self) -> float:
        return super().now_s() + 2 * DAY_S


def later(registry: KeyedRegistry, *, unused_s: float | None = None, keep: int = 2) -> Retention:
    return Later(registry, grace_s=DAY_S, keep_revisions=keep, unused_students_s=unused_s)


def student(registry: KeyedRegistry, text: str, **changes: object) -> StudentManifest:
    manifest = manifest_of(registry, text=text).model_copy(update=changes)
    registry.publish(manifest)
    return manifest


class Watched(DictStore):
    """Remembers what was moved."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[str] = []

    def move(self, name: str, to: str) -> bool:
        self.moved.append(name)
        return super().move(name, to)


class Taken(LocalStore):
    """From which a file goes as soon as somebody has seen it."""

    def local(self, name: str) -> Path | None:
        path = super().local(name)
        self.remove(name)
        return path


def names(found: list[Garbage]) -> list[str]:
    return [one.name for one in found]


class TestBlobs:
    def test_one_that_no_student_has_goes_with_its_bytes_told(self, registry: KeyedRegistry) -> None:
        manifest = student(registry, "kept")
        sha = registry.put_blob(b"12345")
        retention = later(registry)
        (garbage,) = retention.blobs()
        assert (garbage.name, garbage.bytes) == (sha, 5)
        assert retention.remove(garbage, {})
        assert not registry.has_blob(sha)
        assert all(registry.has_blob(one) for one in manifest.blobs)

    def test_one_that_is_young_stays(self, registry: KeyedRegistry) -> None:
        registry.put_blob(b"12345")
        assert Retention(registry, grace_s=DAY_S, keep_revisions=2).blobs() == []

    def test_one_that_is_put_again_after_it_was_found_stays(self, registry: KeyedRegistry) -> None:
        sha = registry.put_blob(b"12345")
        (garbage,) = later(registry).blobs()
        registry.put_blob(b"12345")  # a writer who is about to refer to what is there
        assert not Retention(registry, grace_s=DAY_S, keep_revisions=2).remove(garbage, {})
        assert registry.read_blob(sha) == b"12345"

    def test_one_that_a_publication_counts_on_is_young_again(self, registry: KeyedRegistry) -> None:
        manifest = manifest_of(registry)
        found = later(registry).blobs()
        registry.publish(manifest)
        retention = Retention(registry, grace_s=DAY_S, keep_revisions=2)
        assert [retention.remove(one, {}) for one in found] == [False] * len(found)
        assert all(registry.has_blob(sha) for sha in manifest.blobs)

    def test_a_publication_after_the_removal_is_refused_and_can_put_the_blob_again(
        self, registry: KeyedRegistry
    ) -> None:
        manifest = manifest_of(registry)
        retention = later(registry)
        for garbage in retention.blobs():
            assert retention.remove(garbage, {})
        with pytest.raises(NotFound, match="not put"):
            registry.publish(manifest)
        assert registry.publish(manifest_of(registry)) == manifest.version

    def test_a_manifest_that_cannot_be_read_keeps_every_blob(self, registry: KeyedRegistry) -> None:
        registry.put_blob(b"12345")
        registry.store.create(f"students/shapes/{'a' * 64}/student.json", b"{}")
        with pytest.raises(CorruptBlob):
            later(registry).blobs()

    def test_what_a_killed_run_had_taken_aside_comes_back(self, registry: KeyedRegistry) -> None:
        sha = registry.put_blob(b"12345")
        registry.store.move(f"blobs/{sha}", f".aside/blobs/{sha}")
        with later(registry).alone():
            pass
        assert registry.read_blob(sha) == b"12345"
        assert registry.store.held(".aside") == []

    def test_one_that_goes_while_it_is_looked_at_is_written_again(self, tmp_path: Path) -> None:
        registry = KeyedRegistry(Taken(tmp_path))
        sha = registry.put_blob(b"12345")
        assert registry.put_blob(b"12345") == sha
        assert registry.read_blob(sha) == b"12345"
        with pytest.raises(NotFound, match="no blob"):
            registry.blob_path(sha)


def serves(registry: KeyedRegistry, version: str) -> None:
    registry.commit(revision_of(1, version))


def was_before(registry: KeyedRegistry, version: str) -> None:
    registry.commit(revision_of(1, version))
    registry.commit(revision_of(2, student(registry, "newer").version))


def is_tried(registry: KeyedRegistry, version: str) -> None:
    registry.propose("shapes", **tier_map(version), base_revision=0)


def is_a_base(registry: KeyedRegistry, version: str) -> None:
    student(registry, "derived", base=version)


class TestStudents:
    @pytest.mark.parametrize(
        ("refer", "said"),
        [
            (serves, "serves shapes:1"),
            (was_before, "revision shapes:1"),
            (is_tried, "candidate sw_"),
            (is_a_base, "base of shapes@"),
        ],
    )
    def test_one_that_is_referred_to_cannot_be_removed(
        self, registry: KeyedRegistry, refer: Callable[[KeyedRegistry, str], None], said: str
    ) -> None:
        version = student(registry, "one").version
        refer(registry, version)
        with pytest.raises(Conflict, match=said):
            later(registry).students({}, named=[version])
        aged = names(later(registry, unused_s=0).students({}))
        assert version not in aged or refer is is_a_base  # then both have aged, and go together

    def test_one_that_a_job_needs_cannot_be_removed(self, registry: KeyedRegistry) -> None:
        version = student(registry, "one").version
        with pytest.raises(Conflict, match="job dj_1"):
            later(registry).students({"dj_1": [version]}, named=[version])

    def test_one_that_is_referred_to_by_its_base_alone_takes_it_along(self, registry: KeyedRegistry) -> None:
        base = student(registry, "base", name="a")
        derived = student(registry, "derived", name="b", base=base.version)
        retention = later(registry)
        found = retention.students({}, named=[base.version, derived.version])
        assert names(found) == [derived.version, base.version]
        assert all(retention.remove(one, {}) for one in found)
        assert registry.students() == []
        assert set(names(retention.blobs())) == set(base.blobs | derived.blobs)

    def test_the_base_of_one_that_is_kept_after_all_stays_too(self, registry: KeyedRegistry) -> None:
        base = student(registry, "base").version
        derived = student(registry, "derived", base=base).version
        retention = Retention(registry, grace_s=DAY_S, keep_revisions=2)
        found = retention.students({}, named=[base, derived])
        registry.store.remove(fresh(student_file(base)))  # it was made from it long ago
        registry.store.replace(fresh(student_file(derived)), b"")  # what `propose` does first
        assert [retention.remove(one, {}) for one in found] == [False, False]
        assert registry.students() == sorted([base, derived])

    def test_one_that_cannot_be_read_is_found_before_any_goes(self, registry: KeyedRegistry) -> None:
        student(registry, "one")
        registry.store.create(f"students/shapes/{'a' * 64}/student.json", b"{}")
        with pytest.raises(CorruptBlob):
            later(registry, unused_s=0).students({})

    def test_one_that_is_counted_on_is_there_all_the_time(self) -> None:
        store = Watched()
        registry = KeyedRegistry(store)
        version = student(registry, "one").version
        (garbage,) = later(registry).students({}, named=[version])
        serves(registry, version)
        assert not later(registry).remove(garbage, {})
        assert store.moved == []

    def test_older_revisions_and_ended_candidates_hold_nothing(self, registry: KeyedRegistry) -> None:
        old, dropped = student(registry, "old").version, student(registry, "dropped").version
        for number, version in enumerate([old, student(registry, "b").version, student(registry, "c").version], 1):
            registry.commit(revision_of(number, version))
        candidate = registry.propose("shapes", **tier_map(dropped), base_revision=3)
        registry.settle("shapes", candidate.swap_id, outcome_of(candidate.swap_id, state="dropped"))
        assert names(later(registry, unused_s=0).students({})) == sorted([old, dropped])
        assert names(later(registry, unused_s=0, keep=3).students({})) == [dropped]

    def test_without_a_limit_only_those_named_go(self, registry: KeyedRegistry) -> None:
        student(registry, "one")
        assert later(registry).students({}) == []

    def test_one_that_somebody_refers_to_after_it_was_found_stays(self, registry: KeyedRegistry) -> None:
        version = student(registry, "one").version
        retention = later(registry)
        (garbage,) = retention.students({}, named=[version])
        serves(registry, version)
        assert not retention.remove(garbage, {})
        registry.student(version)
        assert registry.store.exists(student_file(version))

    def test_one_that_is_about_to_be_proposed_stays(self, registry: KeyedRegistry) -> None:
        version = student(registry, "one").version
        (garbage,) = later(registry, unused_s=0).students({})
        registry.store.replace(fresh(student_file(version)), b"")  # what `propose` does first
        assert not Retention(registry, grace_s=DAY_S, keep_revisions=2).remove(garbage, {})
        assert registry.students() == [version]

    def test_one_that_is_gone_is_not_proposed_from_memory(self, registry: KeyedRegistry) -> None:
        version = student(registry, "one").version
        registry.student(version)
        retention = later(registry)
        (garbage,) = retention.students({}, named=[version])
        assert retention.remove(garbage, {})
        with pytest.raises(StudentNotFound, match="removed"):
            registry.propose("shapes", **tier_map(version), base_revision=0)
        assert registry.pending("shapes") == []
        with pytest.raises(StudentNotFound):
            registry.student(version)


class TestTurns:
    def test_of_two_runs_one_takes_things_away(self, registry: KeyedRegistry) -> None:
        first, second = (Retention(registry, grace_s=DAY_S, keep_revisions=2) for _ in range(2))
        sha = registry.put_blob(b"12345")
        with first.alone() as renew:
            registry.store.move(f"blobs/{sha}", f".aside/blobs/{sha}")
            with pytest.raises(Conflict, match="another `fewstep gc`"), second.alone():
                pass
            renew()
            assert not registry.has_blob(sha)  # nobody gave back what the first is about to look at
            registry.store.remove(f".aside/blobs/{sha}")
        with second.alone():
            pass

    def test_the_turn_of_a_run_that_seems_dead_ends(self, registry: KeyedRegistry) -> None:
        with Retention(registry, grace_s=DAY_S, keep_revisions=2).alone() as renew, later(registry).alone() as other:
            with pytest.raises(Conflict):
                renew()
            other()
        with later(registry).alone():
            pass
