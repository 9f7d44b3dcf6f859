"""What a promotion proposes: the current tiers with those asked for replaced, and what each version may take.

A student serves only in the step counts that passed its gate: those its report names, those the current
revision allows already, and, for a student that was never judged (a teacher, an import), what it was made for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import GateFailed, InvalidRequest
from engines.manifest import StudentManifest, shown
from engines.registry.base import Registry, Revision, TierTarget

_PREFERRED = "medium"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tier map that could become a revision."""

    tiers: dict[str, TierTarget]
    default_tier: str
    allowed: dict[str, list[int]]

    @classmethod
    def of(cls, revision: Revision) -> "Proposal":
        return cls(dict(revision.tiers), revision.default_tier, dict(revision.allowed))


def merged(
    registry: Registry,
    name: str,
    current: Revision | None,
    targets: Mapping[str, tuple[str, int]],
    default_tier: str | None,
) -> Proposal:
    """
    Raises:
        StudentNotFound, StepsNotAllowed, GateFailed, InvalidRequest: what was asked for cannot serve.
    """
    tiers = dict(current.tiers) if current else {}
    allowed = {version: list(counts) for version, counts in current.allowed.items()} if current else {}
    for tier, (version, steps) in targets.items():
        manifest = registry.student(version)
        manifest.plan(steps)
        counts = passed(manifest, registry.report(manifest.version))
        if steps not in {*counts, *allowed.get(manifest.version, ())}:
            raise GateFailed(
                f"{shown(manifest.version)} did not pass its gate at steps={steps}: it passed at "
                f"{', '.join(map(str, sorted(counts))) or 'none'}",
                param=f"tiers.{tier}.steps",
            )
        tiers[tier] = TierTarget(student=manifest.version, steps=steps)
        allowed[manifest.version] = sorted({*counts, *allowed.get(manifest.version, ())})
    used = {target.student for target in tiers.values()}
    default = default_tier or _default(current, tiers)
    if default not in tiers:
        raise InvalidRequest(f"default_tier={default!r} is none of {name}'s tiers", param="default_tier")
    return Proposal(tiers, default, {version: counts for version, counts in allowed.items() if version in used})


def _default(current: Revision | None, tiers: Mapping[str, TierTarget]) -> str:
    """The default tier stays, but moves to `medium` when the first student brings one."""
    if _PREFERRED in tiers and (current is None or _PREFERRED not in current.tiers):
        return _PREFERRED
    return current.default_tier if current else min(tiers)


def passed(manifest: StudentManifest, report: Mapping[str, Any] | None) -> frozenset[int]:
    """The counts that may serve: those of the report's `gates.passed_steps`, all where nothing was judged."""
    gates = (report or {}).get("gates")
    counts = gates.get("passed_steps") if isinstance(gates, Mapping) else None
    if counts is None:
        return frozenset(manifest.schedules)
    return frozenset(int(count) for count in counts) & frozenset(manifest.schedules)
