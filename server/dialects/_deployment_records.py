"""Students, deployments and swaps as the API shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from engines.errors import InvalidRequest
from engines.manifest import StudentManifest, shown
from engines.registry.base import Candidate, Outcome, Revision, TierTarget
from server.brokers.base import Phase
from server.leases import VersionState, WorkerLease

_DEFAULT_LIMIT, _MAX_LIMIT = 20, 100


class StudentRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "student"
    name: str
    version: str
    kind: str
    base: str | None
    steps: list[int]
    manifest: dict[str, Any]
    report: dict[str, Any] | None
    samples_url: str


class StudentList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[StudentRecord]
    has_more: bool
    first_id: str | None
    last_id: str | None


class TierRecord(msgspec.Struct, frozen=True, kw_only=True):
    student: str
    steps: int


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A live worker of this deployment.

    `residency` says of each version whether it is in memory; `resident_bytes` are of all that the worker holds.
    """

    id: str
    backend: str
    precision: str
    revision: int | None
    versions: list[str]
    residency: dict[str, VersionState]
    resident_bytes: int
    resident_limit_bytes: int


class DeploymentRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "deployment"
    name: str
    revision: int
    tiers: dict[str, TierRecord]
    default_tier: str
    allowed: dict[str, list[int]]
    created_at: str
    note: str
    previous: int | None
    history: list[int]
    pending_swap: str | None
    workers: list[WorkerRecord]


class DeploymentList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[DeploymentRecord]
    has_more: bool
    first_id: str | None
    last_id: str | None


class SwapStarted(msgspec.Struct, frozen=True, kw_only=True):
    swap_id: str
    object: str = "swap"
    deployment: str
    state: str = "pending"


class WorkerPhase(msgspec.Struct, frozen=True, kw_only=True):
    phase: str
    reason: str | None
    seconds: dict[str, float]


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """pending, until it is live, dropped with its reason, or superseded by a newer one."""

    swap_id: str
    object: str = "swap"
    deployment: str
    state: str
    reason: str | None
    revision: int | None
    base_revision: int
    tiers: dict[str, TierRecord]
    created_at: str
    ended_at: str | None
    phases: dict[str, float]
    workers: dict[str, WorkerPhase]


def student_record(manifest: StudentManifest, report: dict[str, Any] | None) -> StudentRecord:
    return StudentRecord(
        id=manifest.version,
        name=manifest.name,
        version=manifest.version,
        kind=manifest.kind,
        base=manifest.base,
        steps=sorted(manifest.schedules),
        manifest=manifest.model_dump(mode="json"),
        report=report,
        samples_url=f"/v1/students/{shown(manifest.version)}/samples.png",
    )


def deployment_record(
    current: Revision, history: Sequence[int], pending: Sequence[Candidate], workers: Mapping[str, WorkerLease]
) -> DeploymentRecord:
    earlier = [number for number in history if number < current.number]
    return DeploymentRecord(
        id=current.deployment,
        name=current.deployment,
        revision=current.number,
        tiers=_tiers(current.tiers),
        default_tier=current.default_tier,
        allowed=current.allowed,
        created_at=current.created_at,
        note=current.note,
        previous=earlier[-1] if earlier else None,
        history=list(history),
        pending_swap=pending[-1].swap_id if pending else None,
        workers=[
            WorkerRecord(
                id=worker,
                backend=lease.backend,
                precision=lease.precision,
                revision=lease.revisions.get(current.deployment),
                versions=lease.deployments[current.deployment],
                residency=lease.versions.get(current.deployment, {}),
                resident_bytes=lease.resident_bytes,
                resident_limit_bytes=lease.resident_limit_bytes,
            )
            for worker, lease in sorted(workers.items())
            if current.deployment in lease.deployments
        ],
    )


def swap_record(candidate: Candidate, outcome: Outcome | None, phases: Mapping[str, Phase]) -> Swap:
    return Swap(
        swap_id=candidate.swap_id,
        deployment=candidate.deployment,
        state=outcome.state if outcome else "pending",
        reason=outcome.reason if outcome else None,
        revision=outcome.revision if outcome else None,
        base_revision=candidate.base_revision,
        tiers=_tiers(candidate.tiers),
        created_at=candidate.created_at,
        ended_at=outcome.at if outcome else None,
        phases=outcome.phases if outcome else {},
        workers={
            worker: WorkerPhase(phase=phase.phase, reason=phase.reason, seconds=dict(phase.seconds))
            for worker, phase in sorted(phases.items())
        },
    )


def page(ids: Sequence[str], request: Request) -> tuple[list[str], bool]:
    """The ids that `limit` and `after` ask for, and whether more follow.

    Raises:
        InvalidRequest: `limit` is no number of 1 to 100, or `after` no id of this list.
    """
    text, after = request.query_params.get("limit", str(_DEFAULT_LIMIT)), request.query_params.get("after")
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= _MAX_LIMIT):
        raise InvalidRequest(f"limit={text!r} is not a number of 1 to {_MAX_LIMIT}", param="limit")
    if after is not None and after not in ids:
        raise InvalidRequest(f"after={after!r} is not in this list: use a last_id as it came", param="after")
    start = ids.index(after) + 1 if after is not None else 0
    found = list(ids[start : start + int(text)])
    return found, start + len(found) < len(ids)


def _tiers(tiers: Mapping[str, TierTarget]) -> dict[str, TierRecord]:
    return {tier: TierRecord(student=target.student, steps=target.steps) for tier, target in tiers.items()}
