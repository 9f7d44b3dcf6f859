"""`fewstep gc` as a process, over a registry in a real object store."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill_jobs.jobs import JobState
from distill_jobs.records import JobRecords
from engines.registry.files import FilesRegistry
from tests.contract.test_registry import manifest_of, revision_of
from tests.s3_server import S3Server

SPEC = {"teacher": {"id": "shapes"}, "student": {"name": "fast", "steps": [1]}, "method": {"name": "optimal_steps"}}
CHECKPOINT = "checkpoints/00-00000001-00000001/tensors.safetensors"


def gc(url: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "server.cli", "gc", "--json", "--registry-url", url, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.s3
def test_what_nobody_needs_goes_from_an_object_store_and_what_serves_stays(s3_server: S3Server, tmp_path: Path) -> None:
    url = s3_server.url()
    registry = FilesRegistry(url, cache=tmp_path / "mine")
    live, unused = manifest_of(registry), manifest_of(registry, text="other")
    registry.commit(revision_of(1, registry.publish(live)))
    registry.publish(unused)
    stray = registry.put_blob(b"12345")
    records = JobRecords(registry, now=lambda: "2026-01-01T00:00:00Z")
    job = records.create(SPEC)
    registry.write_job_file(job.id, CHECKPOINT, b"1234567")
    records.move(job.id, JobState.CANCELED)

    told = gc(url, "--dry-run", "--student", unused.version)
    assert registry.has_blob(stray)
    done = gc(url, "--student", unused.version)
    again = gc(url)

    kinds = {one["kind"]: one["name"] for one in done["items"]}
    assert done == told | {"dry_run": False}
    assert kinds == {"checkpoint": job.id, "student": unused.version}
    assert again["items"] == []
    other = FilesRegistry(url, cache=tmp_path / "theirs")  # with nothing kept from before
    assert other.students() == [live.version]
    assert all(other.has_blob(sha) and other.read_blob(sha) for sha in live.blobs)
    assert all(other.has_blob(sha) for sha in {stray, *unused.blobs})  # not yet: they are an hour young
    assert other.read_job_file(job.id, CHECKPOINT) is None
    assert other.read_job_file(job.id, "spec.json") is not None
