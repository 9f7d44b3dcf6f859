"""All rules of the registry, over any store of named bytes.

What a name holds never changes once it is there (except reports and job files), so manifests,
revisions, candidates and outcomes are read once and remembered: polling costs one listing.
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from engines.errors import (
    AlreadyEnded,
    AlreadyExists,
    CorruptBlob,
    InvalidRequest,
    NotFound,
    RevisionConflict,
    StudentNotFound,
)
from engines.manifest import VERSION, StudentManifest, parse, shown
from engines.registry._names import candidate_file, fresh, job_file, job_folder, plain, student_file, student_folder
from engines.registry._store import Store
from engines.registry.base import Candidate, Outcome, Revision, TierTarget

_DIGEST = re.compile(r"^[0-9a-f]{12,64}$")
_REVISION = re.compile(r"^(\d{8})\.json$")
_OUTCOME = ".outcome.json"
_CHUNK_BYTES = 1 << 20
Record = TypeVar("Record", bound=BaseModel)
_Stamp = tuple[int, int, int]


class KeyedRegistry:
    """`Registry` over a `Store`. Thread-safe: its memories only gain equal entries, and lose removed students."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._checked: dict[str, _Stamp] = {}
        self._manifests: dict[str, StudentManifest] = {}
        self._records: dict[str, BaseModel] = {}

    @property
    def store(self) -> Store:
        return self._store

    # --- blobs -----------------------------------------------------------------------------------

    def put_blob(self, data: bytes | Path) -> str:
        sha = _sha256(data)
        if not self._store.create(f"blobs/{sha}", data):
            self._repair(sha, data)
        return sha

    def _repair(self, sha: str, data: bytes | Path) -> None:
        self._count_on(f"blobs/{sha}")
        try:
            self.blob_path(sha)
        except (CorruptBlob, NotFound):
            self._store.replace(f"blobs/{sha}", data)

    def _count_on(self, name: str) -> bool:
        """Keeps retention from what is about to be referred to; False if there is none.

        The mark is made before the look, and retention takes a thing away before it looks for the mark: whatever their
        order, one of them sees the other.
        """
        self._store.replace(fresh(name), b"")
        return self._store.exists(name)

    def has_blob(self, sha: str) -> bool:
        return self._store.exists(f"blobs/{plain(sha)}")

    def read_blob(self, sha: str) -> bytes:
        data = self._store.read(f"blobs/{plain(sha)}")
        if data is None:
            raise _no_blob(sha)
        _check(sha, hashlib.sha256(data).hexdigest())
        return data

    def blob_path(self, sha: str) -> Path:
        path = self._store.local(f"blobs/{plain(sha)}")
        if path is None:
            raise _no_blob(sha)
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if self._checked.get(sha) != stamp:
                found = _sha256(path)
                if found != sha:
                    self._store.forget(f"blobs/{sha}")
                _check(sha, found)
                self._checked[sha] = stamp
        except FileNotFoundError:  # retention has taken it since it was there
            raise _no_blob(sha) from None
        return path

    # --- students --------------------------------------------------------------------------------

    def publish(self, manifest: StudentManifest) -> str:
        for version in filter(None, (manifest.base, *manifest.parents)):
            self._count_on_student(version)
        missing = sorted(sha for sha in manifest.blobs if not self._count_on(f"blobs/{sha}"))
        if missing:
            raise NotFound(f"{shown(manifest.version)} names blobs that were not put: {', '.join(missing)}")
        self._store.create(student_file(manifest.version), manifest.canonical())
        return manifest.version

    def _count_on_student(self, version: str) -> None:
        """Of one that was read before; who never was is for those to refuse who will read it."""
        match = VERSION.match(version)
        if match is None or len(match["digest"]) < 64:  # a base may be anything that has a name
            return
        if not self._count_on(student_file(version)) and self._manifests.pop(version, None) is not None:
            raise StudentNotFound(f"{shown(version)} was removed a moment ago: import it again", param="student")

    def student(self, version: str) -> StudentManifest:
        full = self._resolve(version)
        if full not in self._manifests:
            data = self._store.read(student_file(full))
            if data is None:
                raise StudentNotFound(f"there is no student {version!r}", param="student")
            _check(full.partition("@")[2], hashlib.sha256(data).hexdigest())
            self._manifests[full] = parse(data)
        return self._manifests[full]

    def _resolve(self, version: str) -> str:
        """The one full version meant."""
        match = VERSION.match(version)
        if match is None and not _DIGEST.match(version):
            raise StudentNotFound(
                f"{version!r} is no version: write name@digest with at least 12 digits of it", param="student"
            )
        name, prefix = (match["name"], match["digest"]) if match else (None, version)
        if name is not None and len(prefix) == 64:
            return version
        found = [full for full in self.students(name) if full.partition("@")[2].startswith(prefix)]
        if len(found) > 1:
            raise StudentNotFound(f"{version!r} is ambiguous: it begins {', '.join(found)}", param="student")
        if not found:
            raise StudentNotFound(f"there is no student {version!r}", param="student")
        return found[0]

    def students(self, name: str | None = None) -> list[str]:
        names = [plain(name)] if name is not None else self._store.children("students")
        found = [f"{each}@{digest}" for each in names for digest in self._store.children(f"students/{each}")]
        return sorted(full for full in found if self._published(full))

    def _published(self, full: str) -> bool:
        return self._store.exists(student_file(full))

    def put_report(self, version: str, report: Mapping[str, Any]) -> None:
        self._store.replace(self._beside(version, "report.json"), json.dumps(report, indent=1).encode())

    def report(self, version: str) -> dict[str, Any] | None:
        data = self.read_file(version, "report.json")
        if data is None:
            return None
        report: dict[str, Any] = json.loads(data)
        return report

    def put_file(self, version: str, name: str, data: bytes) -> None:
        if name == "student.json":
            raise InvalidRequest("student.json is written by publish and never changes")
        self._store.replace(self._beside(version, name), data)

    def read_file(self, version: str, name: str) -> bytes | None:
        return self._store.read(self._beside(version, name))

    def _beside(self, version: str, name: str) -> str:
        full = self._resolve(version)
        if not self._published(full):
            raise StudentNotFound(f"there is no student {version!r}", param="student")
        return f"{student_folder(full)}/{plain(name)}"

    # --- deployments -----------------------------------------------------------------------------

    def deployments(self) -> list[str]:
        return sorted(name for name in self._store.children("deployments") if self.history(name))

    def current(self, name: str) -> Revision | None:
        numbers = self.history(name)
        return self.revision(name, numbers[-1]) if numbers else None

    def revision(self, name: str, number: int) -> Revision:
        return self._record(f"deployments/{plain(name)}/{number:08d}.json", Revision)

    def history(self, name: str) -> list[int]:
        matches = map(_REVISION.match, self._store.children(f"deployments/{plain(name)}"))
        return sorted(int(match[1]) for match in matches if match)

    def commit(self, revision: Revision) -> None:
        name = plain(revision.deployment)
        last = max(self.history(name), default=0)
        data = revision.model_dump_json().encode()
        path = f"deployments/{name}/{revision.number:08d}.json"
        if revision.number != last + 1 or not self._store.create(path, data):
            last = max(self.history(name), default=0)
            raise RevisionConflict(
                f"revision {revision.number} of {name!r} cannot be written: the current one is {last}; decide again"
            )

    def propose(
        self,
        name: str,
        tiers: Mapping[str, TierTarget],
        *,
        default_tier: str,
        allowed: Mapping[str, list[int]],
        base_revision: int,
        note: str = "",
        traceparent: str | None = None,
    ) -> Candidate:
        for version in {*allowed, *(target.student for target in tiers.values())}:
            self._count_on_student(version)
        candidate = Candidate(
            deployment=plain(name),
            tiers=dict(tiers),
            default_tier=default_tier,
            allowed=dict(allowed),
            created_at=_now(),
            swap_id=f"sw_{time.time_ns():016x}{secrets.token_hex(2)}",
            base_revision=base_revision,
            note=note,
            traceparent=traceparent,
        )
        # Without what is None: workers of the release before refuse fields that they do not know.
        data = candidate.model_dump_json(exclude_none=True).encode()
        self._store.create(candidate_file(name, candidate.swap_id), data)
        for older in self.pending(name):
            if older.swap_id < candidate.swap_id:
                self._supersede(older, candidate)
        return candidate

    def _supersede(self, older: Candidate, newer: Candidate) -> None:
        outcome = Outcome(
            swap_id=older.swap_id, state="superseded", reason=f"overtaken by swap {newer.swap_id}", at=_now()
        )
        with suppress(AlreadyEnded):
            self.settle(older.deployment, older.swap_id, outcome)

    def pending(self, name: str) -> list[Candidate]:
        files = set(self._store.children(f"deployments/{plain(name)}/candidates"))
        swaps = (file.removesuffix(".json") for file in files if not file.endswith(_OUTCOME))
        return [self.candidate(name, swap) for swap in sorted(swaps) if f"{swap}{_OUTCOME}" not in files]

    def candidate(self, name: str, swap_id: str) -> Candidate:
        return self._record(candidate_file(name, swap_id), Candidate)

    def settle(self, deployment: str, swap_id: str, outcome: Outcome) -> None:
        self.candidate(deployment, swap_id)
        path = candidate_file(deployment, swap_id).removesuffix(".json") + _OUTCOME
        if not self._store.create(path, outcome.model_dump_json().encode()):
            ended = self._record(path, Outcome)
            raise AlreadyEnded(f"swap {swap_id} of {deployment!r} has ended as {ended.state}")

    def outcome(self, deployment: str, swap_id: str) -> Outcome | None:
        try:
            return self._record(candidate_file(deployment, swap_id).removesuffix(".json") + _OUTCOME, Outcome)
        except NotFound:
            return None

    def _record(self, path: str, kind: type[Record]) -> Record:
        known = self._records.get(path)
        if isinstance(known, kind):
            return known
        data = self._store.read(path)
        if data is None:
            raise NotFound(f"the registry has no {path}")
        try:
            record = kind.model_validate_json(data)
        except ValueError as error:
            raise CorruptBlob(f"{path} is no {kind.__name__}: {error}") from error
        self._records[path] = record
        return record

    # --- jobs ------------------------------------------------------------------------------------

    def job_ids(self) -> list[str]:
        return sorted(self._store.children("jobs"))

    def job_files(self, job_id: str) -> list[str]:
        return sorted(self._store.walk(job_folder(job_id)))

    def write_job_file(self, job_id: str, name: str, data: bytes, *, exclusive: bool = False) -> None:
        path = job_file(job_id, name)
        if not exclusive:
            self._store.replace(path, data)
        elif not self._store.create(path, data):
            raise AlreadyExists(f"job {job_id} has a file {name!r}")

    def append_job_event(self, job_id: str, name: str, line: bytes) -> None:
        self._store.append(job_file(job_id, name), line.rstrip(b"\n") + b"\n")

    def read_job_file(self, job_id: str, name: str) -> bytes | None:
        return self._store.read(job_file(job_id, name))

    def job_path(self, job_id: str) -> Path | None:
        return self._store.folder(job_folder(job_id))


def _sha256(data: bytes | Path) -> str:
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    with data.open("rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _check(name: str, found: str) -> None:
    if found != name:
        raise CorruptBlob(f"blob {name} is corrupt: its content has sha256 {found}")


def _no_blob(sha: str) -> NotFound:
    return NotFound(f"the registry has no blob {sha}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
