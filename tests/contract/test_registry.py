"""What every registry promises, and what the one on local files promises when writers race or die."""

import hashlib
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from engines.errors import (
    AlreadyEnded,
    AlreadyExists,
    CorruptBlob,
    InvalidRequest,
    NotFound,
    RevisionConflict,
    StoreUnsafe,
    StudentNotFound,
)
from engines.manifest import Component, Schedule, StudentManifest
from engines.registry._keyed import KeyedRegistry
from engines.registry._remote import RemoteStore
from engines.registry._store import LocalStore
from engines.registry.base import Outcome, Registry, Revision, TierTarget, open_registry
from engines.registry.files import FilesRegistry
from engines.registry.memory import MemoryRegistry
from tests.s3_server import S3Server

SPAWN = multiprocessing.get_context("spawn")


def manifest_of(registry: Registry, name: str = "shapes", text: str = "weights") -> StudentManifest:
    """A small manifest whose blobs are in the registry."""
    config = registry.put_blob(b"{}")
    parts = {
        part: Component(weights=registry.put_blob(f"{text} {part}".encode()), files={"config.json": config})
        for part in ("encoder", "denoiser", "decoder")
    }
    return StudentManifest(
        name=name,
        family="sd",
        kind="teacher",
        components=parts,
        schedules={1: Schedule(times=(1.0, 0.0)), 2: Schedule(times=(1.0, 0.5, 0.0))},
        resolutions=((64, 64),),
        latent_channels=4,
        downscale=8,
    )


def version_of(digit: str) -> str:
    return f"shapes@{digit * 64}"


def tier_map(version: str) -> dict[str, Any]:
    return {"tiers": {"low": TierTarget(student=version, steps=1)}, "default_tier": "low", "allowed": {version: [1]}}


def revision_of(number: int, version: str = version_of("a"), **changes: Any) -> Revision:
    fields = {"deployment": "shapes", "number": number, "created_at": "2026-01-01T00:00:00Z", **tier_map(version)}
    return Revision.model_validate(fields | changes)


def outcome_of(swap_id: str, **changes: Any) -> Outcome:
    fields = {"swap_id": swap_id, "state": "live", "revision": 1, "phases": {"staged": 0.1}, "at": "now"}
    return Outcome.model_validate(fields | changes)


class TestBlobs:
    def test_bytes_come_back_by_the_hash_of_their_content(self, registry: KeyedRegistry) -> None:
        sha = registry.put_blob(b"some weights")
        assert sha == hashlib.sha256(b"some weights").hexdigest()
        assert registry.has_blob(sha)
        assert registry.read_blob(sha) == b"some weights"
        assert registry.blob_path(sha).read_bytes() == b"some weights"

    def test_a_file_is_the_same_blob_as_its_bytes(self, registry: KeyedRegistry, tmp_path: Path) -> None:
        source = tmp_path / "weights.safetensors"
        source.write_bytes(b"some weights")
        assert registry.put_blob(source) == registry.put_blob(b"some weights")
        assert source.exists()

    def test_a_missing_blob_is_not_found(self, registry: KeyedRegistry) -> None:
        assert not registry.has_blob("0" * 64)
        with pytest.raises(NotFound, match="no blob"):
            registry.read_blob("0" * 64)
        with pytest.raises(NotFound, match="no blob"):
            registry.blob_path("0" * 64)

    def test_a_flipped_byte_is_a_corrupt_blob_until_the_right_one_is_put_again(self, registry: KeyedRegistry) -> None:
        sha = registry.put_blob(b"some weights")
        registry._store.replace(f"blobs/{sha}", b"some wEights")
        with pytest.raises(CorruptBlob, match=sha):
            registry.read_blob(sha)
        with pytest.raises(CorruptBlob, match=sha):
            registry.blob_path(sha)
        assert registry.put_blob(b"some weights") == sha
        assert registry.blob_path(sha).read_bytes() == b"some weights"

    def test_a_byte_flipped_after_the_first_check_is_noticed(self, tmp_path: Path) -> None:
        registry = FilesRegistry(tmp_path)
        path = registry.blob_path(registry.put_blob(b"some weights"))
        path.write_bytes(b"some wEights")
        with pytest.raises(CorruptBlob):
            registry.blob_path(path.name)


class TestStudents:
    def test_a_published_student_is_read_by_its_version(self, registry: KeyedRegistry) -> None:
        manifest = manifest_of(registry)
        assert registry.publish(manifest) == manifest.version
        assert registry.student(manifest.version) == manifest
        assert registry.students() == registry.students("shapes") == [manifest.version]
        assert registry.students("other") == []

    def test_publishing_again_changes_nothing(self, registry: KeyedRegistry) -> None:
        manifest = manifest_of(registry)
        assert registry.publish(manifest) == registry.publish(manifest)
        assert registry.students() == [manifest.version]

    def test_a_student_without_its_blobs_is_refused_by_name(self, registry: KeyedRegistry) -> None:
        manifest = manifest_of(MemoryRegistry())
        with pytest.raises(NotFound, match=manifest.components["encoder"].weights):
            registry.publish(manifest)
        assert registry.students() == []

    def test_twelve_digits_are_enough_with_and_without_the_name(self, registry: KeyedRegistry) -> None:
        manifest = manifest_of(registry)
        registry.publish(manifest)
        assert registry.student(f"shapes@{manifest.digest[:12]}") == manifest
        assert registry.student(manifest.digest[:12]) == manifest
        assert registry.student(manifest.digest) == manifest

    @pytest.mark.parametrize("version", ["shapes", "shapes@abc", "0123456789a", "../../etc", ""])
    def test_what_is_no_version_is_refused_with_what_to_write(self, registry: KeyedRegistry, version: str) -> None:
        with pytest.raises(StudentNotFound, match="at least 12 digits"):
            registry.student(version)

    @pytest.mark.parametrize("version", ["shapes@" + "0" * 64, "shapes@" + "0" * 12, "0" * 12])
    def test_an_unknown_version_is_not_found(self, registry: KeyedRegistry, version: str) -> None:
        with pytest.raises(StudentNotFound, match="no student"):
            registry.student(version)

    def test_an_ambiguous_prefix_names_its_candidates(self, registry: KeyedRegistry) -> None:
        twins = [f"shapes@{'0' * 13}{digit * 51}" for digit in "ab"]
        for twin in twins:
            registry._store.create(f"students/{twin.replace('@', '/')}/student.json", b"{}")
        with pytest.raises(StudentNotFound, match=f"ambiguous.*{twins[0]}, {twins[1]}"):
            registry.student(f"shapes@{'0' * 12}")

    def test_a_manifest_that_is_not_its_name_is_corrupt(self, registry: KeyedRegistry) -> None:
        registry._store.create(f"students/shapes/{'a' * 64}/student.json", manifest_of(registry).canonical())
        with pytest.raises(CorruptBlob):
            registry.student(version_of("a"))

    def test_reports_and_files_lie_beside_the_manifest_and_may_change(self, registry: KeyedRegistry) -> None:
        version = registry.publish(manifest_of(registry))
        assert registry.report(version) is None
        registry.put_report(version, {"fd": 1.5})
        registry.put_report(version, {"fd": 1.25})
        registry.put_file(version, "samples.png", b"png")
        assert registry.report(version) == {"fd": 1.25}
        assert registry.read_file(version[:-40], "samples.png") == b"png"
        assert registry.read_file(version, "README.md") is None
        assert registry.students() == [version]

    def test_files_neither_replace_the_manifest_nor_leave_the_folder(self, registry: KeyedRegistry) -> None:
        version = registry.publish(manifest_of(registry))
        for name in ("student.json", "../student.json", "a/b", ".."):
            with pytest.raises(InvalidRequest):
                registry.put_file(version, name, b"{}")
        with pytest.raises(StudentNotFound):
            registry.put_report(version_of("a"), {})


class TestDeployments:
    def test_the_highest_revision_is_current_and_the_folder_is_the_history(self, registry: KeyedRegistry) -> None:
        assert registry.current("shapes") is None
        assert registry.deployments() == []
        registry.commit(revision_of(1))
        registry.commit(revision_of(2, version_of("b")))
        assert registry.current("shapes") == revision_of(2, version_of("b"))
        assert registry.revision("shapes", 1) == revision_of(1)
        assert registry.history("shapes") == [1, 2]
        assert registry.deployments() == ["shapes"]
        with pytest.raises(NotFound):
            registry.revision("shapes", 3)

    @pytest.mark.parametrize("number", [1, 3])
    def test_only_the_next_number_can_be_written(self, registry: KeyedRegistry, number: int) -> None:
        registry.commit(revision_of(1))
        with pytest.raises(RevisionConflict, match="current one is 1"):
            registry.commit(revision_of(number, version_of("b")))
        assert registry.current("shapes") == revision_of(1)

    def test_a_tier_map_must_be_served_by_what_it_allows(self) -> None:
        with pytest.raises(ValueError, match="default_tier"):
            revision_of(1, default_tier="medium")
        with pytest.raises(ValueError, match="lacks its 1 steps"):
            revision_of(1, allowed={version_of("a"): [2, 4]})

    def test_a_candidate_is_pending_until_it_is_settled_once(self, registry: KeyedRegistry) -> None:
        candidate = registry.propose("shapes", **tier_map(version_of("a")), base_revision=0)
        assert registry.pending("shapes") == [candidate]
        assert registry.outcome("shapes", candidate.swap_id) is None
        assert registry.deployments() == []

        registry.commit(candidate.revision(1, created_at="now"))
        registry.settle("shapes", candidate.swap_id, outcome_of(candidate.swap_id))
        with pytest.raises(AlreadyEnded, match="has ended as live"):
            registry.settle("shapes", candidate.swap_id, outcome_of(candidate.swap_id, state="dropped"))

        assert registry.pending("shapes") == []
        assert registry.outcome("shapes", candidate.swap_id) == outcome_of(candidate.swap_id)
        current = registry.current("shapes")
        assert current is not None
        assert current.swap_id == candidate.swap_id

    def test_a_newer_candidate_supersedes_the_pending_older_one_only(self, registry: KeyedRegistry) -> None:
        first, second, third = (
            registry.propose("shapes", **tier_map(version_of(digit)), base_revision=0) for digit in "abc"
        )
        other = registry.propose("other", **tier_map(version_of("d")), base_revision=0)
        assert registry.pending("shapes") == [third]
        assert registry.pending("other") == [other]
        for older, newer in ((first, second), (second, third)):
            outcome = registry.outcome("shapes", older.swap_id)
            assert outcome is not None
            assert (outcome.state, outcome.reason) == ("superseded", f"overtaken by swap {newer.swap_id}")

    def test_an_unknown_candidate_cannot_be_settled(self, registry: KeyedRegistry) -> None:
        with pytest.raises(NotFound):
            registry.settle("shapes", "sw_none", outcome_of("sw_none"))


class TestJobFiles:
    def test_files_are_replaced_whole_or_created_once(self, registry: KeyedRegistry) -> None:
        registry.write_job_file("dj_1", "spec.json", b"1", exclusive=True)
        with pytest.raises(AlreadyExists):
            registry.write_job_file("dj_1", "spec.json", b"2", exclusive=True)
        registry.write_job_file("dj_1", "state.json", b"1")
        registry.write_job_file("dj_1", "state.json", b"2")
        assert registry.read_job_file("dj_1", "spec.json") == b"1"
        assert registry.read_job_file("dj_1", "state.json") == b"2"
        assert registry.read_job_file("dj_1", "missing") is None
        assert registry.job_ids() == ["dj_1"]

    def test_events_are_lines(self, registry: KeyedRegistry) -> None:
        registry.append_job_event("dj_1", "events.jsonl", b'{"step":1}')
        registry.append_job_event("dj_1", "events.jsonl", b'{"step":2}\n')
        assert registry.read_job_file("dj_1", "events.jsonl") == b'{"step":1}\n{"step":2}\n'

    def test_folders_are_allowed_and_escapes_are_not(self, registry: KeyedRegistry) -> None:
        registry.write_job_file("dj_1", "checkpoints/000100/state.json", b"1")
        registry.write_job_file("dj_1", "spec.json", b"1")
        assert registry.job_files("dj_1") == ["checkpoints/000100/state.json", "spec.json"]
        for name in ("../dj_2/spec.json", "/etc/passwd", "a//b", ""):
            with pytest.raises(InvalidRequest):
                registry.write_job_file("dj_1", name, b"1")

    def test_a_local_store_has_a_folder_for_the_trainer(self, tmp_path: Path) -> None:
        registry = FilesRegistry(tmp_path)
        folder = registry.job_path("dj_1")
        assert folder is not None
        (folder / "checkpoint.safetensors").write_bytes(b"1")
        assert registry.read_job_file("dj_1", "checkpoint.safetensors") == b"1"
        assert MemoryRegistry().job_path("dj_1") is None


def _commit_all(root: str, writer: int, rounds: int, barrier: Any, results: Any) -> None:
    registry = FilesRegistry(root)
    for number in range(1, rounds + 1):
        barrier.wait(30)
        try:
            registry.commit(revision_of(number, note=f"writer {writer}"))
            results.put((number, writer, "won"))
        except RevisionConflict:
            results.put((number, writer, "lost"))
        barrier.wait(30)


class TestWriters:
    @pytest.mark.parametrize("store", ["files", pytest.param("s3", marks=pytest.mark.s3)])
    def test_of_two_processes_that_race_for_a_revision_exactly_one_wins(
        self, store: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        place = str(tmp_path) if store == "files" else request.getfixturevalue("s3_server").url()
        rounds = 20
        barrier, results = SPAWN.Barrier(2), SPAWN.Queue()
        writers = [
            SPAWN.Process(target=_commit_all, args=(place, writer, rounds, barrier, results)) for writer in range(2)
        ]
        for process in writers:
            process.start()
        found = [results.get(timeout=60) for _ in range(2 * rounds)]
        for process in writers:
            process.join(10)

        registry = FilesRegistry(place)
        assert registry.history("shapes") == list(range(1, rounds + 1))
        for number in range(1, rounds + 1):
            verdicts = {writer: verdict for each, writer, verdict in found if each == number}
            assert sorted(verdicts.values()) == ["lost", "won"]
            winner = next(writer for writer, verdict in verdicts.items() if verdict == "won")
            assert registry.revision("shapes", number).note == f"writer {winner}"

    def test_a_publish_that_is_killed_leaves_nothing_to_see(self, tmp_path: Path) -> None:
        process = SPAWN.Process(target=_publish_and_die, args=(str(tmp_path),))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL

        registry = FilesRegistry(tmp_path)
        assert registry.students() == []
        assert list((tmp_path / "blobs").iterdir()), "the blobs had been put"
        manifest = manifest_of(registry)
        assert registry.publish(manifest) == manifest.version
        assert registry.student(manifest.version) == manifest

    def test_leftovers_of_killed_writers_are_swept_a_day_later(self, tmp_path: Path) -> None:
        FilesRegistry(tmp_path)
        old, fresh = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "fresh"
        for path in (old, fresh):
            path.write_bytes(b"half a file")
        os.utime(old, (0, 0))
        FilesRegistry(tmp_path)
        assert fresh.exists()
        assert not old.exists()


class _DiesAtManifest(LocalStore):
    """Kills its own process when the manifest is written but not yet named."""

    def _link(self, written: Path, target: Path) -> None:
        if target.name == "student.json":
            os.kill(os.getpid(), signal.SIGKILL)
        super()._link(written, target)


def _publish_and_die(root: str) -> None:
    registry = KeyedRegistry(_DiesAtManifest(Path(root)))
    registry.publish(manifest_of(registry))


class _LastWriterWins(RemoteStore):
    """A store that ignores `mode="create"`, as a bucket without conditional PUT does."""

    def create(self, name: str, data: bytes | Path) -> bool:
        self.replace(name, data)
        return True


class TestOpening:
    def test_a_store_without_exclusive_creation_is_refused(self) -> None:
        with pytest.raises(StoreUnsafe, match="3 writers created the same name"):
            _LastWriterWins("memory://unsafe")

    def test_a_url_that_nothing_reads_is_refused_with_what_to_install(self) -> None:
        with pytest.raises(InvalidRequest, match=r"registry nowhere://here: .*fewstep\[s3\]"):
            open_registry("nowhere://here")

    @pytest.mark.s3
    def test_keys_of_an_object_store_are_in_no_log(self, s3_server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG):
            FilesRegistry(s3_server.url()).put_blob(b"some weights")
        assert "botocore" in {record.name.partition(".")[0] for record in caplog.records}
        assert s3_server.secret not in caplog.text

    def test_the_url_chooses_the_store(self, tmp_path: Path) -> None:
        assert isinstance(open_registry("memory:"), MemoryRegistry)
        sha = open_registry(tmp_path / "here").put_blob(b"1")
        assert open_registry(f"file://{tmp_path}/here").has_blob(sha)
