"""Disks that really are full: a tmpfs of a megabyte or two, which only root can mount."""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import redis
import torch
from typer.testing import CliRunner

from distill_jobs import checkpoint
from distill_jobs.checkpoint import Checkpoint
from distill_jobs.events import EventLog
from distill_jobs.jobs import JobState
from distill_jobs.plan import Plan, StagePlan
from distill_jobs.records import JobRecords
from engines.cache import DiskCache
from engines.errors import StorageFull, Unavailable
from engines.registry.files import FilesRegistry
from server.brokers.redis import RedisBroker
from server.cli import app
from tests.contract.conftest import Hub
from tests.contract.test_broker import done, ids, request_of
from tests.contract.test_registry import manifest_of, revision_of
from tests.eventually import eventually
from tests.redis_server import RedisServer
from tests.unit.distill_jobs.test_keeper import Trainer

MIB = 2**20
PLAN = Plan((StagePlan("kd", 1, seconds=1.0),), eval_every=1, bf16=False)


def no_disk(why: str) -> NoReturn:
    """Only where nobody counts on these tests may they be passed over."""
    if "CI" in os.environ:
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes in at most 500 files."""
    if os.geteuid():
        no_disk("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=500", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        no_disk(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Takes all but `leave` bytes."""
    path = disk / "filler"
    with path.open("wb") as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(b"\1" * max(free - leave, 0))
    return path


def fill_names(disk: Path) -> None:
    """Makes every file that can still be made."""
    with suppress(OSError):
        for number in itertools.count():
            (disk / f"empty-{number}").touch()


def used(disk: Path) -> set[str]:
    return {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()}


class TestRegistry:
    def test_a_publication_is_refused_and_what_was_published_serves_on(self, disk: Path) -> None:
        registry = FilesRegistry(disk)
        version = registry.publish(manifest_of(registry))
        registry.commit(revision_of(1, version))
        before = used(disk)
        with pytest.raises(StorageFull, match="no space is left for"):
            registry.put_blob(os.urandom(3 * MIB))
        assert used(disk) == before, "what filled the disk has gone again"
        fill(disk)
        with pytest.raises(StorageFull):
            registry.commit(revision_of(2, version))
        with pytest.raises(StorageFull):
            registry.publish(manifest_of(registry, text="other"))
        again = FilesRegistry(disk)
        assert again.current("shapes") == revision_of(1, version)
        assert all(again.read_blob(sha) for sha in again.student(version).blobs)
        (disk / "filler").unlink()
        registry.commit(revision_of(2, version))
        registry.publish(manifest_of(registry, text="other"))

    def test_events_stay_whole_lines(self, disk: Path) -> None:
        records = JobRecords(FilesRegistry(disk))
        job = records.create({"a": 1})
        fill(disk)
        said = 1
        with pytest.raises(StorageFull):  # noqa: PT012 - the page that the file has is filled first
            while True:
                records.event(job.id, "note", message="x" * 1000)
                said += 1
        (disk / "filler").unlink()
        records.event(job.id, "note", message="after")
        events = records.events(job.id)
        assert len(events) == said + 1
        assert events[-1]["message"] == "after"

    def test_so_do_those_of_a_trainer(self, disk: Path) -> None:
        log, said = EventLog(disk, PLAN), 0
        fill(disk, leave=6 * 1024)
        with pytest.raises(StorageFull):  # noqa: PT012 - the pages that are left are filled first
            while True:
                log.write("note", message="x" * 1000)
                said += 1
        (disk / "filler").unlink()
        log.write("note", message="after")
        events = [json.loads(line) for line in (disk / "events.jsonl").read_text().splitlines()]
        assert [event["message"][:5] for event in events] == ["xxxxx"] * said + ["after"]


class TestCheckpoints:
    def test_one_that_has_no_room_leaves_the_one_before(self, disk: Path) -> None:
        small, large = torch.ones(1000), torch.ones(MIB)
        checkpoint.write(disk, Checkpoint({"x": small}, {"stage": 0, "iteration": 1}))
        before = used(disk)
        with pytest.raises(StorageFull, match="no space is left"):
            checkpoint.write(disk, Checkpoint({"x": large}, {"stage": 0, "iteration": 2}))
        assert used(disk) == before
        found = checkpoint.load_latest(disk)
        assert found is not None
        assert found.meta["iteration"] == 1
        assert torch.equal(found.tensors["x"], small)


class TestCollection:
    def test_it_makes_room_where_not_even_an_empty_file_can_be_made(self, disk: Path) -> None:
        registry = FilesRegistry(disk)
        version = registry.publish(manifest_of(registry))
        registry.commit(revision_of(1, version))
        orphan = registry.put_blob(b"12345")
        long_ago = JobRecords(registry, now=lambda: "2026-01-01T00:00:00Z")
        job = long_ago.create({"a": 1})
        for number in range(8):
            registry.write_job_file(job.id, f"checkpoints/{number}/tensors.safetensors", b"1")
        long_ago.move(job.id, JobState.CANCELED)
        for path in disk.rglob("*"):
            os.utime(path, (0, 0))
        fill(disk)
        fill_names(disk)
        with pytest.raises(StorageFull):
            registry.put_blob(b"more")
        done = CliRunner().invoke(app, ["gc", "--json", "--registry-url", str(disk)])
        assert done.exit_code == 0, done.exception
        assert [one["kind"] for one in json.loads(done.stdout)["items"]] == ["checkpoint", "blob"]
        assert not registry.has_blob(orphan)
        assert all(registry.read_blob(sha) for sha in registry.student(version).blobs)


class TestTrainer:
    def test_one_that_ends_on_a_full_disk_is_not_tried_again_whatever_its_code(self, disk: Path) -> None:
        fills = "import sys; open(sys.argv[1] + '/filler', 'wb').write(bytes(4 * 2**20))"
        trainer = Trainer(disk, fills)
        with pytest.raises(StorageFull):
            trainer.keeper.run("train", lambda: False)
        assert trainer.lives == 1
        assert trainer.records.read(trainer.job.id, "tries.json") is None


class TestEngineCache:
    def test_what_nobody_reads_makes_room(self, disk: Path) -> None:
        cache = DiskCache(disk)
        cache.get("idle", lambda folder: _built(folder, MIB))
        folder = cache.get("new", lambda folder: _built(folder, MIB + MIB // 2))
        assert folder.parent == disk
        assert not (disk / "idle").exists()

    def test_an_engine_is_made_elsewhere_where_there_is_no_room_at_all(self, disk: Path) -> None:
        cache = DiskCache(disk)
        reading = cache.get("read", lambda folder: _built(folder, MIB))
        fill(disk)
        folder = cache.get("new", lambda folder: _built(folder, MIB))
        assert (folder / "engine").stat().st_size == MIB
        assert disk not in folder.parents
        assert (reading / "engine").exists()
        assert cache.get("read", lambda _: pytest.fail("it is there")) == reading
        made = Path(folder)
        del folder
        assert not made.exists()


def _built(folder: Path, size: int) -> None:
    (folder / "engine").write_bytes(b"\1" * size)


class TestRedis:
    async def test_what_it_cannot_write_is_refused_as_such_and_taken_again_when_there_is_room(self, disk: Path) -> None:
        server = RedisServer(aof=True, args=("--dir", str(disk))).start()
        hub = Hub(lambda identity, options: RedisBroker(server.url, identity, **options))
        try:
            gateway, worker, leaving = [await hub(name) for name in ("gateway", "worker", "leaving")]
            await gateway.publish(request_of("held"))
            claims = await worker.claim(["shapes"], 1, None)
            with leaving.keep_lease(dict):
                filler = fill(disk)
                eventually(lambda: refuses(server), 10)
            with pytest.raises(Unavailable, match="cannot write its file"):
                await gateway.publish(request_of("refused"))
            with pytest.raises(Unavailable, match="cannot write its file"):
                await worker.finish(claims[0], done(claims[0]), [b"picture"])
            with suppress(Unavailable):
                await worker.claim(["shapes"], 1, 0.2)
            with pytest.raises(Unavailable, match="takes no lease"), worker.keep_lease(dict):
                pass
            filler.unlink()
            eventually(lambda: not refuses(server), 10)
            assert await worker.finish(claims[0], done(claims[0]), [b"picture"])
            await gateway.publish(request_of("taken"))
            assert ids(await worker.claim(["shapes"], 1, None)) == ["taken"]
        finally:
            await hub.close()
            server.close()


def refuses(server: RedisServer) -> bool:
    """Whether it fails to write its file. A failed write is one in which something was to be written."""
    with server.client() as client:
        try:
            client.set("room", "0" * 10_000)
        except redis.ResponseError as error:
            return str(error).startswith("MISCONF")
        return False
