"""`fewstep gc` over a real registry of files: what it says, what it deletes, its exit codes."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill_jobs.jobs import JobState
from distill_jobs.records import JobRecords
from engines.cache import DiskCache
from engines.errors import Conflict, InvalidRequest
from engines.registry.files import FilesRegistry
from engines.registry.retention import Retention
from server.cli import app
from tests.contract.test_registry import manifest_of, revision_of

SPEC = {"teacher": {"id": "shapes"}, "student": {"name": "fast", "steps": [1]}, "method": {"name": "optimal_steps"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One student that serves, a blob that nobody has, a job that has ended and one that is paused."""
    registry = FilesRegistry(tmp_path / "registry")
    registry.commit(revision_of(1, registry.publish(manifest_of(registry))))
    registry.put_blob(b"12345")
    long_ago = JobRecords(registry, now=lambda: "2026-01-01T00:00:00Z")
    for key, state in (("a", JobState.CANCELED), ("b", JobState.PAUSED)):
        job = long_ago.create(SPEC, idempotency_key=key)
        registry.write_job_file(job.id, "checkpoints/00-00000001-00000001/tensors.safetensors", b"1234567")
        registry.write_job_file(job.id, "trained/result.json", b"{}")
        long_ago.move(job.id, state)
    for path in (tmp_path / "registry").rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))
    return tmp_path


def gc(root: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["gc", "--json", "--registry-url", str(root / "registry"), *options])
    if done.exception:
        raise done.exception
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def files(root: Path) -> set[str]:
    folder = root / "registry"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".")}


def test_what_a_dry_run_tells_is_what_goes(root: Path) -> None:
    before = files(root)
    told = gc(root, "--dry-run")
    assert files(root) == before
    assert told["bytes"] == 12
    done = gc(root)
    assert done == told | {"dry_run": False}
    gone = before - files(root)
    assert sorted(name.split("/")[0] for name in gone) == ["blobs", "jobs"]
    assert gc(root)["items"] == []


def test_a_job_that_may_go_on_keeps_its_checkpoints_and_one_that_has_ended_its_story(root: Path) -> None:
    gc(root)
    jobs = {job.state: job.id for job in JobRecords(FilesRegistry(root / "registry")).all()}
    left = files(root)
    checkpoint = "checkpoints/00-00000001-00000001/tensors.safetensors"
    assert f"jobs/{jobs[JobState.PAUSED]}/{checkpoint}" in left
    assert f"jobs/{jobs[JobState.CANCELED]}/{checkpoint}" not in left
    assert {f"jobs/{jobs[JobState.CANCELED]}/{name}" for name in ("spec.json", "trained/result.json")} <= left


def test_the_teacher_of_a_job_that_may_go_on_stays(root: Path) -> None:
    registry = FilesRegistry(root / "registry")
    other = registry.publish(manifest_of(registry, name="other"))
    JobRecords(registry).create(SPEC | {"teacher": {"id": other}})
    with pytest.raises(Conflict, match="job dj_"):
        gc(root, "--student", other)


def test_a_student_that_serves_is_refused_and_nothing_goes(root: Path) -> None:
    before = files(root)
    with pytest.raises(Conflict, match="serves shapes:1"):
        gc(root, "--student", FilesRegistry(root / "registry").students()[0])
    assert files(root) == before


def test_a_student_that_was_named_goes_and_its_blobs_with_it(root: Path) -> None:
    registry = FilesRegistry(root / "registry")
    manifest = manifest_of(registry, text="other")
    registry.publish(manifest)
    for sha in manifest.blobs:
        os.utime(root / "registry" / "blobs" / sha, (0, 0))
        (root / "registry" / ".fresh" / "blobs" / sha).unlink()
    gc(root, "--student", manifest.version)
    left = files(root)
    assert len(registry.students()) == 1
    assert manifest.version not in registry.students()
    shared = {sha for version in registry.students() for sha in registry.student(version).blobs}
    assert {name for name in left if name.startswith("blobs/")} == {f"blobs/{sha}" for sha in shared}


def write(folder: Path, size: int) -> None:
    (folder / "x").write_bytes(b"1" * size)


def test_cached_engines_go_down_to_the_limit_and_one_that_is_read_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GC_CACHE_BYTES", "10")
    cache = DiskCache(root / "engines")
    reading = cache.get("read", partial(write, size=6))
    cache.get("idle", partial(write, size=7))
    found = gc(root, "--dry-run", "--cache-dir", str(root / "engines"))["items"]
    assert [one for one in found if one["kind"] == "engine"] == [
        {"kind": "engine", "name": "idle", "bytes": 7, "why": "unused, and the cache is over its limit"}
    ]
    gc(root, "--cache-dir", str(root / "engines"))
    assert not (root / "engines" / "idle").exists()
    assert (reading / "x").exists()


def test_a_cache_that_is_not_there_is_refused_and_nothing_goes(root: Path) -> None:
    before = files(root)
    with pytest.raises(InvalidRequest, match="no engine cache"):
        gc(root, "--cache-dir", str(root / "nowhere"))
    assert files(root) == before
    assert not (root / "nowhere").exists()


def test_the_folder_of_a_whole_system_is_no_cache_to_empty(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GC_CACHE_BYTES", "0")
    serving = FilesRegistry(root / "registry").students()
    gc(root, "--cache-dir", str(root))
    assert FilesRegistry(root / "registry").students() == serving


def test_a_grace_in_which_no_import_ends_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GC_GRACE_S", "60")
    with pytest.raises(InvalidRequest, match="GC_GRACE_S"):
        gc(root)


def test_the_registry_is_told_as_to_every_other_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_REGISTRY_URL", str(root / "registry"))
    done = CliRunner().invoke(app, ["gc", "--dry-run", "--json"])
    assert json.loads(done.stdout)["bytes"] == 12


def test_half_written_weights_of_an_ended_job_go(root: Path) -> None:
    records = JobRecords(FilesRegistry(root / "registry"))
    job = next(job for job in records.all() if job.ended)
    records.registry.write_job_file(job.id, "trained/weights.partial", b"half")
    gc(root)
    assert f"jobs/{job.id}/trained/weights.partial" not in files(root)


def test_of_two_at_once_one_is_refused_and_what_would_go_can_be_told_beside_it(root: Path) -> None:
    before = files(root)
    with Retention(FilesRegistry(root / "registry"), grace_s=3600, keep_revisions=2).alone():
        assert gc(root, "--dry-run")["bytes"] == 12
        with pytest.raises(Conflict, match="another `fewstep gc`"):
            gc(root)
    assert files(root) == before


def test_a_dry_run_leaves_alone_what_a_killed_run_had_taken_aside(root: Path) -> None:
    store = FilesRegistry(root / "registry").store
    sha = hashlib.sha256(b"12345").hexdigest()
    store.move(f"blobs/{sha}", f".aside/blobs/{sha}")
    gc(root, "--dry-run")
    assert [one.name for one in store.held(".aside")] == [f"blobs/{sha}"]
    gc(root)
    assert store.held(".aside") == []


def test_people_get_a_table_and_a_sum(root: Path) -> None:
    done = CliRunner().invoke(app, ["gc", "--dry-run", "--registry-url", str(root / "registry")])
    assert done.exit_code == 0
    assert "would delete 1 blob, 1 checkpoint: 12 bytes" in done.stdout
