"""Which version, tier and number of steps serves a request: pure, from a deployment's revisions and measured costs.

Precedence: `name@digest` > tier > steps > max_latency_ms. What has precedence decides; what stands
below it must agree, or the request is refused and both fields are named. Nothing is guessed: a count
that the student was not made for, or that its gate did not pass, is refused with those that are allowed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engines.errors import ContradictoryFields, InvalidRequest, InvalidSize, ModelNotFound, StepsNotAllowed
from engines.manifest import StudentManifest, shown
from engines.registry.base import Revision, TierTarget
from server.leases import num_evaluations

MIN_DIGITS = 12
UNTIERED = "custom"  # the tier of a version that no tier names


@dataclass(frozen=True, slots=True)
class Names:
    """What the fields are called in the dialect of the request: errors speak its language."""

    tier: str = "tier"
    steps: str = "steps"
    latency: str = "max_latency_ms"
    size: str = "size"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request says about how it is to be made. `model` is a deployment or `name@digest`."""

    model: str
    tier: str | None = None
    steps: int | None = None
    max_latency_ms: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    names: Names = Names()


@dataclass(frozen=True, slots=True)
class Choice:
    """What the request is pinned to. `downgraded_from` is the default tier where the latency asked for forbade it."""

    deployment: str
    version: str
    tier: str
    steps: int
    width: int
    height: int
    downgraded_from: str | None = None


Latency = Callable[[TierTarget], float | None]
"""Predicted milliseconds of one request at a target, None where nothing was measured yet."""


def resolve(
    wanted: Wanted, revisions: Sequence[Revision], manifests: Mapping[str, StudentManifest], *, latency_ms: Latency
) -> Choice:
    """The one version, tier and count that serves `wanted`.

    `revisions` are the current revision of the deployment and, second, the previous one, which serves
    only those who name its version.

    Raises:
        InvalidRequest, ContradictoryFields, StepsNotAllowed, InvalidSize, ModelNotFound: see each message.
    """
    revision, pinned = _revision(wanted, revisions)
    candidates = _candidates(revision, pinned, manifests)
    tier, target = _target(wanted, revision, pinned, candidates, latency_ms)
    manifest = manifests[target.student]
    manifest.plan(target.steps, wanted.guidance)
    if wanted.max_latency_ms is not None and (wanted.tier is not None or wanted.steps is not None):
        _check_latency(wanted, target, latency_ms)
    width, height = _size(wanted, manifest)
    default = (
        revision.default_tier if wanted.max_latency_ms is not None and not wanted.tier and not wanted.steps else None
    )
    lower = default in candidates and list(candidates).index(tier) < list(candidates).index(default)
    return Choice(
        revision.deployment,
        target.student,
        tier,
        target.steps,
        width,
        height,
        downgraded_from=default if lower else None,
    )


def find_version(revision: Revision, name: str, digest: str) -> str | None:
    """The full version of `name@digest` in a revision; the name may be the student's or the deployment's."""
    if len(digest) < MIN_DIGITS:
        return None
    for version in sorted(revision.versions):
        student, _, full = version.partition("@")
        if name in (student, revision.deployment) and full.startswith(digest):
            return version
    return None


def _revision(wanted: Wanted, revisions: Sequence[Revision]) -> tuple[Revision, str | None]:
    """The revision to look in, and the version that the request named, if it named one."""
    name, at, digest = wanted.model.partition("@")
    if not at:
        return revisions[0], None
    for revision in revisions:
        version = find_version(revision, name, digest)
        if version is not None:
            return revision, version
    served = ", ".join(sorted({shown(version) for revision in revisions for version in revision.versions}))
    raise ModelNotFound(
        f"{wanted.model} does not serve in deployment {revisions[0].deployment}: it has {served}", param="model"
    )


def _candidates(
    revision: Revision, pinned: str | None, manifests: Mapping[str, StudentManifest]
) -> dict[str, TierTarget]:
    """The tiers in question, cheapest first."""
    tiers = {name: target for name, target in revision.tiers.items() if pinned is None or target.student == pinned}
    return dict(
        sorted(tiers.items(), key=lambda item: (num_evaluations(manifests[item[1].student], item[1].steps), item[0]))
    )


def _target(
    wanted: Wanted, revision: Revision, pinned: str | None, candidates: dict[str, TierTarget], latency_ms: Latency
) -> tuple[str, TierTarget]:
    if wanted.tier is not None:
        return wanted.tier, _by_tier(wanted, revision, pinned)
    if wanted.steps is not None:
        return _by_steps(wanted, wanted.steps, revision, pinned, candidates)
    if not candidates:  # pinned to a version that no tier names: its best is what it was made for
        steps = max(revision.allowed[pinned or ""])
        return UNTIERED, TierTarget(student=pinned or "", steps=steps)
    if wanted.max_latency_ms is not None:
        return _by_latency(wanted, wanted.max_latency_ms, candidates, latency_ms)
    tier = revision.default_tier if revision.default_tier in candidates else list(candidates)[-1]
    return tier, candidates[tier]


def _by_tier(wanted: Wanted, revision: Revision, pinned: str | None) -> TierTarget:
    names = wanted.names
    target = revision.tiers.get(wanted.tier or "")
    if target is None:
        has = ", ".join(revision.tiers)
        raise InvalidRequest(
            f"{names.tier}={wanted.tier!r} is not a tier of {revision.deployment}: choose from {has}", param=names.tier
        )
    if pinned is not None and target.student != pinned:
        raise ContradictoryFields(
            f"model={wanted.model} and {names.tier}={wanted.tier} contradict each other: that tier is "
            f"{shown(target.student)}; leave one of the two out",
            param=names.tier,
        )
    if wanted.steps is not None and wanted.steps != target.steps:
        raise ContradictoryFields(
            f"{names.tier}={wanted.tier} and {names.steps}={wanted.steps} contradict each other: that tier takes "
            f"{target.steps}; leave one of the two out",
            param=names.steps,
        )
    return target


def _by_steps(
    wanted: Wanted, steps: int, revision: Revision, pinned: str | None, candidates: dict[str, TierTarget]
) -> tuple[str, TierTarget]:
    """The cheapest tier whose version allows the count."""
    for tier, target in candidates.items():
        if steps in revision.allowed.get(target.student, ()):
            return tier, TierTarget(student=target.student, steps=steps)
    versions = {pinned} if pinned else {target.student for target in candidates.values()}
    if pinned and steps in revision.allowed[pinned]:
        return UNTIERED, TierTarget(student=pinned, steps=steps)
    allowed = sorted({count for version in versions for count in revision.allowed.get(version, ())})
    raise StepsNotAllowed(
        f"{wanted.names.steps}={steps} is not allowed for {wanted.model}: choose from {', '.join(map(str, allowed))}",
        param=wanted.names.steps,
    )


def _by_latency(
    wanted: Wanted, max_latency_ms: int, candidates: dict[str, TierTarget], latency_ms: Latency
) -> tuple[str, TierTarget]:
    """The best tier predicted to be in time; the cheapest where nothing is measured yet."""
    measured = {tier: latency_ms(target) for tier, target in candidates.items()}
    fitting = [tier for tier, ms in measured.items() if ms is not None and ms <= max_latency_ms]
    if fitting:
        return fitting[-1], candidates[fitting[-1]]
    cheapest = next(iter(candidates))
    least = measured[cheapest]
    if least is None:
        return cheapest, candidates[cheapest]
    raise InvalidRequest(
        f"{wanted.names.latency}={max_latency_ms} is too little for {wanted.model}: its fastest tier, {cheapest}, "
        f"takes about {least:.0f} ms",
        param=wanted.names.latency,
    )


def _check_latency(wanted: Wanted, target: TierTarget, latency_ms: Latency) -> None:
    predicted = latency_ms(target)
    limit = wanted.max_latency_ms
    if predicted is None or limit is None or predicted <= limit:
        return
    names = wanted.names
    field, value = (names.tier, wanted.tier) if wanted.tier is not None else (names.steps, wanted.steps)
    raise ContradictoryFields(
        f"{field}={value} and {names.latency}={limit} contradict each other: {target.steps} steps take about "
        f"{predicted:.0f} ms; leave one of the two out",
        param=names.latency,
    )


def _size(wanted: Wanted, manifest: StudentManifest) -> tuple[int, int]:
    if wanted.size is None:
        return manifest.resolutions[0]
    if wanted.size not in manifest.resolutions:
        has = ", ".join(f"{width}x{height}" for width, height in manifest.resolutions)
        width, height = wanted.size
        raise InvalidSize(
            f"size {width}x{height} is not one that {shown(manifest.version)} makes: choose from {has} or 'auto'",
            param=wanted.names.size,
        )
    return wanted.size
