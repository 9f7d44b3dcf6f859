"""A registry copied while it is written to, and copied back: whatever the copy names, it has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_jobs.jobs import JobState
from distill_jobs.records import JobRecords
from engines.errors import Conflict
from engines.registry import copying
from engines.registry._keyed import KeyedRegistry
from engines.registry._store import DictStore, LocalStore
from engines.registry.files import FilesRegistry
from engines.registry.references import references
from tests.contract.test_registry import manifest_of, outcome_of, revision_of

SPEC = {"teacher": {"id": "shapes"}, "student": {"name": "fast", "steps": [1]}, "method": {"name": "optimal_steps"}}


@pytest.fixture(params=["files", "memory", "fsspec"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> KeyedRegistry:
    if request.param == "fsspec":
        return FilesRegistry(f"memory://copying-{tmp_path.name}", cache=tmp_path / "cache")
    return KeyedRegistry(DictStore() if request.param == "memory" else LocalStore(tmp_path / "source"))


@pytest.fixture
def copy(tmp_path: Path) -> FilesRegistry:
    return FilesRegistry(tmp_path / "copy")


def filled(registry: KeyedRegistry) -> str:
    """A student that serves, one swap that is over and one that goes on, a job with a checkpoint."""
    version = registry.publish(manifest_of(registry))
    registry.commit(revision_of(1, version))
    revision = revision_of(1, version)
    named: dict[str, Any] = {"default_tier": revision.default_tier, "allowed": revision.allowed, "base_revision": 1}
    first = registry.propose(revision.deployment, revision.tiers, **named)
    registry.settle(revision.deployment, first.swap_id, outcome_of(first.swap_id, state="dropped", revision=None))
    registry.propose(revision.deployment, revision.tiers, **named)
    job = JobRecords(registry).create(SPEC, idempotency_key="a")
    registry.write_job_file(job.id, "checkpoints/00-00000001-00000001/tensors.safetensors", b"1234567")
    return version


def content(registry: KeyedRegistry) -> dict[str, bytes]:
    """All of it but what it keeps for itself."""
    kinds = ("deployments", "jobs", "students", "blobs")
    names = [f"{kind}/{name}" for kind in kinds for name in registry.store.walk(kind)]
    return {name: data for name in names if (data := registry.store.read(name)) is not None}


def test_a_copy_has_all_of_it_and_copied_back_it_is_what_it_was(
    source: KeyedRegistry, copy: FilesRegistry, tmp_path: Path
) -> None:
    filled(source)
    done = copying.back_up(source, copy)
    assert content(copy) == content(source)
    assert done.bytes == sum(map(len, content(source).values()))
    again = FilesRegistry(tmp_path / "again")
    copying.restore(copy, again)
    assert content(again) == content(source)
    assert again.pending("shapes")[0].swap_id == source.pending("shapes")[0].swap_id


def test_blobs_that_no_student_has_are_not_copied(source: KeyedRegistry, copy: FilesRegistry) -> None:
    filled(source)
    sha = source.put_blob(b"of a job that has not published yet")
    copying.back_up(source, copy)
    assert not copy.has_blob(sha)


def test_a_second_copy_into_the_same_folder_copies_new_weights_alone(
    source: KeyedRegistry, copy: FilesRegistry
) -> None:
    filled(source)
    copying.back_up(source, copy)
    version = source.publish(manifest_of(source, name="second", text="other"))
    source.commit(revision_of(2, version))
    done = copying.back_up(source, copy)
    assert content(copy) == content(source)
    assert done.known_bytes > 0


class Meddled:
    """A store beside which something happens whenever a file is taken from it."""

    def __init__(self, store: Any, meddle: Callable[[str], None]) -> None:
        self._store, self._meddle = store, meddle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def local(self, name: str) -> Path | None:
        found: Path | None = self._store.local(name)
        self._meddle(name)
        return found


def test_a_copy_names_nothing_that_it_lacks_whatever_is_published_meanwhile(
    source: KeyedRegistry, copy: FilesRegistry
) -> None:
    """At every single file another student is published, proposed and deployed, and a job ends with one."""
    first = filled(source)
    records, made = JobRecords(source), [first]

    def publish(_: str) -> None:
        number = len(made) + 1
        if number > 30:  # by then it is at the blobs
            return
        made.append(source.publish(manifest_of(source, name=f"s{number}", text=str(number))))
        revision = revision_of(number, made[-1])
        named: dict[str, Any] = {"default_tier": "low", "allowed": revision.allowed, "base_revision": number - 1}
        candidate = source.propose("shapes", revision.tiers, **named)
        source.commit(revision)
        source.settle("shapes", candidate.swap_id, outcome_of(candidate.swap_id, revision=number))
        job = records.create(SPEC, idempotency_key=str(number))
        source.write_job_file(job.id, "result.json", made[-1].encode())
        records.move(job.id, JobState.CANCELED)

    copying.back_up(KeyedRegistry(Meddled(source.store, publish)), copy)
    assert len(made) > 10
    held = references(copy, 100, {})
    assert first in held
    assert held.keys() <= set(copy.students())
    for version in copy.students():
        assert all(copy.has_blob(sha) for sha in copy.student(version).blobs)
    for name in copy.store.walk("deployments"):
        swap_id = Path(name).name.removesuffix(".outcome.json")
        if name.endswith(".outcome.json") and (ended := copy.outcome("shapes", swap_id)) and ended.revision:
            assert copy.candidate("shapes", swap_id).swap_id == swap_id
            assert copy.revision("shapes", ended.revision).number == ended.revision
    for job in copy.job_ids():
        if JobRecords(copy).get(job).state is JobState.CANCELED:
            assert copy.read_job_file(job, "result.json") is not None


def test_what_was_removed_meanwhile_is_told(source: KeyedRegistry, copy: FilesRegistry) -> None:
    version = filled(source)
    sha = next(iter(source.student(version).blobs))

    def remove(name: str) -> None:
        if name.startswith("students/"):
            source.store.remove(f"blobs/{sha}")

    with pytest.raises(Conflict, match="copy once more"):
        copying.back_up(KeyedRegistry(Meddled(source.store, remove)), copy)


def test_a_checkpoint_that_is_replaced_meanwhile_leaves_the_newer_one(
    source: KeyedRegistry, copy: FilesRegistry
) -> None:
    filled(source)
    [job] = source.job_ids()
    old, new = (f"checkpoints/00-0000000{i}-00000001/tensors.safetensors" for i in (1, 2))

    def replace(name: str) -> None:
        if name.startswith("jobs/") and source.store.exists(f"jobs/{job}/{old}"):
            source.write_job_file(job, new, b"newer")
            source.store.remove(f"jobs/{job}/{old}")

    copying.back_up(KeyedRegistry(Meddled(source.store, replace)), copy)
    assert copy.read_job_file(job, new) == b"newer"


def test_a_checkpoint_that_has_gone_goes_from_the_next_copy_too(source: KeyedRegistry, copy: FilesRegistry) -> None:
    filled(source)
    copying.back_up(source, copy)
    [job] = source.job_ids()
    [old] = [name for name in source.job_files(job) if name.startswith("checkpoints/")]
    source.write_job_file(job, old.replace("00000001", "00000002"), b"newer")
    source.store.remove(f"jobs/{job}/{old}")
    copying.back_up(source, copy)
    assert copy.job_files(job) == source.job_files(job)


def test_nothing_is_restored_over_what_is_there(copy: FilesRegistry, tmp_path: Path) -> None:
    used = FilesRegistry(tmp_path / "used")
    filled(copy)
    used.put_blob(b"precious")
    with pytest.raises(Conflict, match="into an empty one"):
        copying.restore(copy, used)
    assert content(used).keys() == {f"blobs/{name}" for name in used.store.walk("blobs")}
