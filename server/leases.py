"""What a worker says of itself in its lease: what it can serve and what that costs it, measured.

Gateways predict waits and choose tiers with it. Fields are only added; a gateway ignores what it does
not know and does without what is missing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from engines.manifest import StudentManifest


class StageCost(msgspec.Struct, frozen=True, kw_only=True):
    """Engine seconds: of one row alone, and per row in the largest batch."""

    alone_s: float = 0.0
    row_s: float = 0.0


class VersionCost(msgspec.Struct, frozen=True, kw_only=True):
    """One version on one worker. `step` is one network row; a guided step of an unguided network is two."""

    encode: StageCost = StageCost()
    step: StageCost = StageCost()
    decode: StageCost = StageCost()


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment whose current revision is being loaded: the phase it is in, and since when it is loading."""

    phase: str
    since_ms: int  # broker's clock


class WorkerLease(msgspec.Struct, frozen=True, kw_only=True):
    """`deployments` maps each deployment that the worker claims for to the full versions it can serve."""

    deployments: dict[str, list[str]] = {}
    loading: dict[str, Loading] = {}
    revisions: dict[str, int] = {}
    backend: str = ""
    precision: str = ""
    costs: dict[str, VersionCost] = {}
    batch_rows: int = 1  # network rows of its largest batch


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


def num_evaluations(manifest: StudentManifest, steps: int, guidance: float | None = None) -> int:
    """Network rows of one picture."""
    two_rows = manifest.guidance.mode == "cfg"
    return sum(2 if two_rows and step.w is not None else 1 for step in manifest.plan(steps, guidance))


def alone_s(costs: Iterable[VersionCost], evaluations: int) -> float | None:
    """Engine seconds of one picture on an idle worker, the slowest one; None where nothing was measured."""
    found = [cost.encode.alone_s + evaluations * cost.step.alone_s + cost.decode.alone_s for cost in costs]
    return max(found, default=None)


def queued_s(costs: Iterable[VersionCost], evaluations: int) -> float:
    """Engine seconds that one picture adds to a busy queue; 0 where nothing was measured."""
    found = [cost.encode.row_s + evaluations * cost.step.row_s + cost.decode.row_s for cost in costs]
    return max(found, default=0.0)


def lump_s(lease: WorkerLease, version: str, steps: int) -> float:
    """Engine seconds of a full batch of rows that take this many steps and end together."""
    cost = lease.costs.get(version, VersionCost())
    return lease.batch_rows * (cost.encode.row_s + steps * cost.step.row_s + cost.decode.row_s)
