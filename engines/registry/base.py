"""The registry: students, deployments and job files, the only thing that serving and distillation share.

Files are the truth and every name that exists is complete. Layout under the registry's URL:

    blobs/<sha256>                                     bytes by content
    students/<name>/<digest>/student.json              the canonical manifest, written last
    students/<name>/<digest>/report.json samples.png … replaceable, no part of the version
    deployments/<name>/<revision:08d>.json             created exclusively; the highest is current
    deployments/<name>/candidates/<swap_id>.json       a proposed revision
    deployments/<name>/candidates/<swap_id>.outcome.json   how it ended, written once
    jobs/<id>/…                                        spec, state log, events, checkpoints

Synchronous and torch-free: the gateway, workers and the distiller poll it from threads. `current` and
`pending` cost one listing each, because what a name holds never changes and is remembered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.manifest import StudentManifest

Version = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}@[0-9a-f]{64}$", description="name@<64 digits>")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TierTarget(_Record):
    """Which student answers a tier, in how many steps."""

    student: Version
    steps: int = Field(ge=1)


class _TierMap(_Record):
    deployment: str
    tiers: dict[str, TierTarget] = Field(min_length=1)
    default_tier: str
    allowed: dict[str, list[int]] = Field(description="full version -> step counts that passed its gate")
    created_at: str = Field(description="RFC 3339, UTC")

    @model_validator(mode="after")
    def _served(self) -> "_TierMap":
        if self.default_tier not in self.tiers:
            raise ValueError(f"default_tier {self.default_tier!r} is none of the tiers {', '.join(sorted(self.tiers))}")
        for tier, target in self.tiers.items():
            if target.steps not in self.allowed.get(target.student, ()):
                raise ValueError(f"tier {tier!r}: allowed[{target.student}] lacks its {target.steps} steps")
        return self

    @property
    def versions(self) -> frozenset[str]:
        """Every full version that a worker of this map must be able to serve."""
        return frozenset(self.allowed) | {target.student for target in self.tiers.values()}


class Revision(_TierMap):
    """What a deployment serves from the moment that this file exists."""

    number: int = Field(ge=1)
    swap_id: str | None = None
    note: str = ""


class Candidate(_TierMap):
    """A proposed revision that the workers try before it becomes one. Ids sort by time."""

    swap_id: str
    base_revision: int = Field(ge=0, description="the revision it was made from; 0: there was none")
    note: str = ""
    traceparent: str | None = Field(None, description="whose trace the swap belongs to, where it is traced")

    def revision(self, number: int, *, created_at: str) -> Revision:
        """The revision that this candidate becomes."""
        return Revision(
            deployment=self.deployment,
            number=number,
            tiers=self.tiers,
            default_tier=self.default_tier,
            allowed=self.allowed,
            created_at=created_at,
            swap_id=self.swap_id,
            note=self.note,
        )


class Outcome(_Record):
    """How a candidate ended: `phases` are the seconds spent in each phase, `at` is RFC 3339."""

    swap_id: str
    state: Literal["live", "dropped", "superseded"]
    reason: str | None = None
    revision: int | None = None
    phases: dict[str, float] = {}
    at: str


class Registry(Protocol):
    """Where students, deployments and jobs are kept. Thread-safe; safe with any number of other processes."""

    # --- blobs -----------------------------------------------------------------------------------

    def put_blob(self, data: bytes | Path) -> str:
        """Stores bytes, or the content of a local file, under their sha256, which is returned."""

    def has_blob(self, sha: str) -> bool: ...

    def read_blob(self, sha: str) -> bytes:
        """The bytes, checked against their name.

        Raises:
            NotFound: there is none of this name.
            CorruptBlob: what is stored is something else.
        """

    def blob_path(self, sha: str) -> Path:
        """A local file with these bytes, checked whenever the file has changed since the last check. Read it only.

        Raises:
            NotFound, CorruptBlob: as `read_blob`.
        """

    # --- students --------------------------------------------------------------------------------

    def publish(self, manifest: StudentManifest) -> str:
        """Makes a student visible and returns its full version; publishing it again changes nothing.

        Raises:
            NotFound: one of its blobs has not been put.
        """

    def student(self, version: str) -> StudentManifest:
        """The manifest of `name@digest`, of `name@` and at least 12 digits, or of at least 12 digits.

        Raises:
            StudentNotFound: none, or several begin like this.
            CorruptBlob: `student.json` is not the manifest of its name.
        """

    def students(self, name: str | None = None) -> list[str]:
        """Full versions, sorted; of one name or of all."""

    def put_report(self, version: str, report: Mapping[str, Any]) -> None:
        """Writes or replaces the student's `report.json`."""

    def report(self, version: str) -> dict[str, Any] | None: ...

    def put_file(self, version: str, name: str, data: bytes) -> None:
        """Writes or replaces a file beside the manifest, such as `samples.png`."""

    def read_file(self, version: str, name: str) -> bytes | None: ...

    # --- deployments -----------------------------------------------------------------------------

    def deployments(self) -> list[str]: ...

    def current(self, name: str) -> Revision | None:
        """The highest revision; None if nothing was ever deployed under this name."""

    def revision(self, name: str, number: int) -> Revision:
        """Raises `NotFound`."""

    def history(self, name: str) -> list[int]:
        """All revision numbers, rising."""

    def commit(self, revision: Revision) -> None:
        """Makes `revision` current. Exactly one of several writers of a number succeeds.

        Raises:
            RevisionConflict: its number is not the one after the current; reread and decide again.
        """

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
        """Creates a candidate; candidates of this deployment that are older and pending end as superseded.

        Whoever proposes also announces it (`Broker.announce`), so that workers look at once.
        """

    def pending(self, name: str) -> list[Candidate]:
        """Candidates without an outcome, oldest first; the last one is the one to work on."""

    def candidate(self, name: str, swap_id: str) -> Candidate:
        """Raises `NotFound`."""

    def settle(self, deployment: str, swap_id: str, outcome: Outcome) -> None:
        """Ends a candidate, once.

        Of a candidate that won, commit the revision first: a revision stands, even if `AlreadyEnded`
        then says that a newer candidate has overtaken this one.

        Raises:
            AlreadyEnded: it has an outcome.
            NotFound: there is no such candidate.
        """

    def outcome(self, deployment: str, swap_id: str) -> Outcome | None: ...

    # --- jobs ------------------------------------------------------------------------------------

    def job_ids(self) -> list[str]: ...

    def job_files(self, job_id: str) -> list[str]:
        """Names of all files of a job, sorted, as `read_job_file` takes them."""

    def write_job_file(self, job_id: str, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """Writes a whole file, replacing it unless `exclusive`. `name` may have folders in it.

        Raises:
            AlreadyExists: `exclusive`, and it is there.
        """

    def append_job_event(self, job_id: str, name: str, line: bytes) -> None:
        """Adds one line (its newline is added here) to a log that one process at a time writes."""

    def read_job_file(self, job_id: str, name: str) -> bytes | None: ...

    def job_path(self, job_id: str) -> Path | None:
        """The job's folder, made if missing, where the store is a local one; None elsewhere."""


def open_registry(url: str | Path) -> Registry:
    """The registry at a path, a `file://` URL, any other fsspec URL, or `memory:` for one of this process alone.

    Raises:
        StoreUnsafe: the store lets two writers create one name.
    """
    if str(url) in ("memory:", "memory://"):
        from engines.registry.memory import MemoryRegistry

        return MemoryRegistry()
    from engines.registry.files import FilesRegistry

    return FilesRegistry(url)
