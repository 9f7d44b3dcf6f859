"""What a worker says of itself in its lease: what it can serve and what that costs it, measured.

Gateways predict waits and choose tiers with it. Fields are only added; a gateway ignores what it does
not know and does without what is missing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from engines import refine
from engines.manifest import Step, StudentManifest
from engines.refine import Refinement


class StageCost(msgspec.Struct, frozen=True, kw_only=True):
    """Engine seconds: of one row alone, and per row where largest batches are computed, as many as at once can be."""

    alone_s: float = 0.0
    row_s: float = 0.0


class VersionCost(msgspec.Struct, frozen=True, kw_only=True):
    """One version on one worker. `step` is one network row; a guided step of an unguided network is two."""

    encode: StageCost = StageCost()
    step: StageCost = StageCost()
    decode: StageCost = StageCost()


class VersionState(msgspec.Struct, frozen=True, kw_only=True):
    """A version on one worker. `weight_bytes` counts what it shares with others too.

    `ready_in_s`: when it could serve a row that comes now; 0 where it is resident.
    """

    state: str = "resident"  # or loading, or on_demand: loaded when a row asks for it
    weight_bytes: int = 0
    ready_in_s: float = 0.0


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment whose current revision is being loaded: the phase it is in, and since when it is loading."""

    phase: str
    since_ms: int  # broker's clock


class WorkerLease(msgspec.Struct, frozen=True, kw_only=True):
    """`deployments` maps each deployment that the worker claims for to the full versions it can serve.

    `versions` says of each of these whether it is in memory.
    """

    deployments: dict[str, list[str]] = {}
    loading: dict[str, Loading] = {}
    revisions: dict[str, int] = {}
    backend: str = ""
    precision: str = ""
    costs: dict[str, VersionCost] = {}
    batch_rows: int = 1  # network rows of the largest batches that it computes at once
    versions: dict[str, dict[str, VersionState]] = {}
    resident_bytes: int = 0
    resident_limit_bytes: int = 0
    video_formats: list[str] = []  # that it writes


_LEAST_LEFT_S, _MOST_LEFT_S = 0.1, 2.0


def elsewhere_ms(mine: WorkerLease, others: Iterable[WorkerLease]) -> dict[str, int]:
    """Versions that this worker would have to load and another has in memory, or is loading, and for how many
    milliseconds after they came it leaves their requests to that one.

    As long as it would take here: so where the other one is too busy, a request waits at most twice as long as if this
    worker had begun to load at once.
    """
    states = [each for lease in others for each in lease.versions.values()]
    held = {version for each in states for version, state in each.items() if state.state != "on_demand"}
    return {
        version: round(1000 * min(_MOST_LEFT_S, max(_LEAST_LEFT_S, state.ready_in_s)))
        for each in mine.versions.values()
        for version, state in each.items()
        if state.state == "on_demand" and version in held
    }


_WANTED = "wanted"


def wanted(deployment: str, version: str) -> str:
    """The announcement that somebody was sent away while a version is on demand, and will come again."""
    return f"{_WANTED}/{deployment}/{version}"


def read_wanted(topic: str) -> tuple[str, str] | None:
    """Deployment and version of such an announcement; None of any other."""
    kind, _, rest = topic.partition("/")
    deployment, _, version = rest.partition("/")
    return (deployment, version) if kind == _WANTED else None


def read(info: Mapping[str, Any]) -> WorkerLease:
    """A lease from its record; one that cannot be read says nothing rather than stop the gateway."""
    try:
        return msgspec.convert(info, WorkerLease)
    except msgspec.ValidationError:
        return WorkerLease()


def write(lease: WorkerLease) -> dict[str, Any]:
    """The record that goes into the lease."""
    record: dict[str, Any] = msgspec.to_builtins(lease)
    return record


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Network rows of one picture: `most` where it takes every step of its plan, `expected` where a share does."""

    most: int
    expected: float


def evaluations(
    manifest: StudentManifest,
    steps: int,
    guidance: float | None = None,
    teacher: StudentManifest | None = None,
    refinement: Refinement | None = None,
    *,
    first: int = 0,
) -> Evaluations:
    """Of one picture, with what `teacher` adds to it; `first` steps are left out."""
    if teacher is None or refinement is None:
        plan, by = manifest.plan(steps, guidance)[first:], manifest
    else:
        plan, by = refine.plan(manifest, teacher, steps, guidance, refinement), teacher
    rows = [_rows(by if step.by_teacher else manifest, step) for step in plan]
    return Evaluations(sum(rows), sum(count * step.share for count, step in zip(rows, plan, strict=True)))


def _rows(manifest: StudentManifest, step: Step) -> int:
    return 2 if manifest.guidance.mode == "cfg" and step.w is not None else 1


def alone_s(costs: Iterable[VersionCost], rows: int) -> float | None:
    """Engine seconds of one picture on an idle worker, the slowest one; None where nothing was measured."""
    found = [cost.encode.alone_s + rows * cost.step.alone_s + cost.decode.alone_s for cost in costs]
    return max(found, default=None)


def queued_s(costs: Iterable[VersionCost], rows: float) -> float:
    """Engine seconds that one picture adds to a busy queue; 0 where nothing was measured."""
    found = [cost.encode.row_s + rows * cost.step.row_s + cost.decode.row_s for cost in costs]
    return max(found, default=0.0)


def lump_s(lease: WorkerLease, version: str, steps: int) -> float:
    """Engine seconds of a full batch of rows that take this many steps and end together."""
    cost = lease.costs.get(version, VersionCost())
    return lease.batch_rows * (cost.encode.row_s + steps * cost.step.row_s + cost.decode.row_s)
