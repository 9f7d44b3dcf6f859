"""The rules of a hot swap, as plain data: what becomes of a candidate, and which versions may go.

Whichever worker holds the lease `swap:<deployment>` asks these rules (`server.follower`); because everything they read
is in the registry and the broker, a successor decides as its predecessor would have.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engines.manifest import shown
from engines.registry.base import Candidate, Revision
from server.brokers.base import Phase

PHASES = ("staged", "building", "warming", "verifying", "ready")
"""What a worker goes through with a candidate; `rejected` ends it, `live`, `draining` and `drained` come after."""

AFTER_READY = frozenset({"ready", "live", "draining", "drained"})


@dataclass(frozen=True, slots=True)
class Decision:
    """commit: make it current · settle: it is current already, say so · drop, supersede: end it for `reason`."""

    kind: Literal["wait", "commit", "settle", "drop", "supersede"]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision is made from. `workers` are those of the deployment whose lease lives."""

    candidate: Candidate
    current: Revision | None
    workers: Sequence[str]
    phases: Mapping[str, Phase]
    waited_s: float
    timeout_s: float


def decide(now: Situation) -> Decision:
    """What the coordinator does with a pending candidate."""
    candidate, number = now.candidate, now.current.number if now.current else 0
    if now.current and now.current.swap_id == candidate.swap_id:
        return Decision("settle")
    if number != candidate.base_revision:
        return Decision("supersede", f"revision {number} became current after revision {candidate.base_revision}")
    for worker, phase in sorted(now.phases.items()):
        if phase.phase == "rejected":
            return Decision("drop", f"rejected by {worker}: {phase.reason}")
    lacking = [worker for worker in sorted(now.workers) if not _is_ready(now.phases.get(worker))]
    if now.workers and not lacking:
        return Decision("commit")
    if now.waited_s < now.timeout_s:
        return Decision("wait")
    where = ", ".join(f"{worker} is {_phase(now.phases.get(worker))}" for worker in lacking) or "no worker is live"
    return Decision("drop", f"not ready after {now.timeout_s:g} s: {where}")


def begun_ms(phases: Mapping[str, Phase], seen_ms: int) -> int:
    """When a swap began, by the broker's clock: a successor of the coordinator does not start the time anew."""
    return min((phase.at_ms - round(1000 * sum(phase.seconds.values())) for phase in phases.values()), default=seen_ms)


def phase_seconds(phases: Iterable[Phase]) -> dict[str, float]:
    """Seconds in each phase, of the slowest worker."""
    slowest: dict[str, float] = {}
    for phase in phases:
        for name, seconds in phase.seconds.items():
            slowest[name] = max(seconds, slowest.get(name, 0.0))
    return {name: round(slowest[name], 4) for name in PHASES if name in slowest}


@dataclass(frozen=True, slots=True)
class Holdings:
    """The versions on a worker and why they are there. `since_s`: for how long `current` has been current."""

    held: frozenset[str]
    current: frozenset[str]
    previous: frozenset[str]
    candidate: frozenset[str]
    since_s: float


def retirable(holdings: Holdings, keep_previous_s: float) -> list[str]:
    """Versions that may go once nothing pins them: all but those of the current revision, of a pending candidate
    and, for a while, of the previous revision."""
    kept = holdings.current | holdings.candidate
    if holdings.since_s < keep_previous_s:
        kept |= holdings.previous
    return sorted(holdings.held - kept)


def describe(candidate: Candidate) -> str:
    """For logs: `low shapes@3f2a91c0de11 x1, medium …`."""
    return ", ".join(f"{tier} {shown(to.student)} x{to.steps}" for tier, to in sorted(candidate.tiers.items()))


def _is_ready(phase: Phase | None) -> bool:
    return phase is not None and phase.phase in AFTER_READY


def _phase(phase: Phase | None) -> str:
    return phase.phase if phase else "silent"
