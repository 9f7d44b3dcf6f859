"""Putting a student behind a deployment: the current tiers with its own replaced, proposed, then seen live or refused.

The distiller only proposes. Workers try the candidate and one of them writes the revision; what they decided is
read from the registry.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engines.errors import NotFound, RevisionConflict, SwapRejected
from engines.registry.base import Candidate, Outcome, Registry, Revision, TierTarget

log = logging.getLogger(__name__)

_PREFERRED = "medium"
_RETRIES = 5


@dataclass(frozen=True, slots=True)
class TierMap:
    tiers: dict[str, TierTarget]
    default_tier: str
    allowed: dict[str, list[int]]


def tier_map(current: Revision, version: str, tiers: Mapping[str, int], counts: Sequence[int]) -> TierMap:
    """The current map with these tiers answered by `version`, which may be asked for any of `counts` (pure).

    The default tier moves to `medium` when the first student brings one; a version that no tier names any more
    is allowed nothing.
    """
    new = {**current.tiers, **{tier: TierTarget(student=version, steps=steps) for tier, steps in tiers.items()}}
    used = {target.student for target in new.values()}
    allowed = {**current.allowed, version: sorted({*counts, *tiers.values()})}
    becomes_default = _PREFERRED in tiers and _PREFERRED not in current.tiers
    default = _PREFERRED if becomes_default else current.default_tier
    return TierMap(new, default, {name: steps for name, steps in allowed.items() if name in used})


def is_live(current: Revision | None, version: str, tiers: Mapping[str, int]) -> bool:
    if current is None:
        return False
    wanted = {tier: TierTarget(student=version, steps=steps) for tier, steps in tiers.items()}
    return wanted.items() <= current.tiers.items()


def promote(
    registry: Registry,
    deployment: str,
    version: str,
    tiers: Mapping[str, int],
    counts: Sequence[int],
    *,
    note: str,
    traceparent: str | None = None,
    announce: Callable[[str], None],
    pause: Callable[[], None],
    timeout_s: float,
) -> Outcome:
    """Proposes until the student is live or refused; `pause` is called while waiting and may raise.

    Raises:
        SwapRejected: a worker refused it, or nobody decided in time.
        NotFound: the deployment has no revision to start from.
    """
    deadline = time.monotonic() + timeout_s
    for _ in range(_RETRIES):
        current = registry.current(deployment)
        if current is None:
            raise NotFound(f"deployment {deployment!r} does not exist: promote its teacher first")
        try:
            candidate = _proposed(registry, current, tier_map(current, version, tiers, counts), note, traceparent)
        except RevisionConflict:
            continue  # another revision became current in between
        announce(deployment)
        outcome = _awaited(registry, candidate, pause, deadline)
        if outcome.state == "live":
            return outcome
        if outcome.state == "dropped":
            raise SwapRejected(f"{deployment} did not take {version[:80]}: {outcome.reason or 'no reason was given'}")
        log.info("a newer candidate overtook ours; proposing again", extra={"swap_id": candidate.swap_id})
    raise SwapRejected(f"{deployment}: other candidates kept overtaking {version[:80]}; promote it by hand")


def _proposed(registry: Registry, current: Revision, wanted: TierMap, note: str, traceparent: str | None) -> Candidate:
    return registry.propose(
        current.deployment,
        wanted.tiers,
        default_tier=wanted.default_tier,
        allowed=wanted.allowed,
        base_revision=current.number,
        note=note,
        traceparent=traceparent,
    )


def _awaited(registry: Registry, candidate: Candidate, pause: Callable[[], None], deadline: float) -> Outcome:
    while (outcome := registry.outcome(candidate.deployment, candidate.swap_id)) is None:
        if time.monotonic() > deadline:
            raise SwapRejected(
                f"swap {candidate.swap_id} of {candidate.deployment} was not decided in time: is a worker running?"
            )
        pause()
    return outcome
