"""Which version, tier and number of steps serves a request: pure, from a deployment's revisions and what is expected.

Precedence: `name@digest` > tier > steps > max_latency_ms. What has precedence decides; what stands
below it must agree, or the request is refused and both fields are named. Nothing is guessed: a count
that the student was not made for, or that its gate did not pass, is refused with those that are allowed.
Tier `auto` leaves the tier to the load: it gets a ladder of choices, the default tier's first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engines.errors import (
    ContradictoryFields,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    StepsNotAllowed,
)
from engines.manifest import StudentManifest, shown
from engines.registry.base import Revision, TierTarget
from server.menu import AUTO, UNTIERED, Choice, Menu, Wanted

MIN_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Expected:
    """What one request at a target takes: predicted on an idle worker, and expected at the present load."""

    alone_ms: float
    now_ms: float


Expect = Callable[[TierTarget], Expected | None]
"""None where nothing was measured yet."""


def resolve(
    wanted: Wanted, revisions: Sequence[Revision], manifests: Mapping[str, StudentManifest], *, expect: Expect
) -> tuple[Choice, ...]:
    """The version, tier and count that serves `wanted`; for tier `auto` also what may serve it under load, best first.

    `revisions` are the current revision of the deployment and, second, the previous one, which serves
    only those who name its version.

    Raises:
        InvalidRequest, ContradictoryFields, StepsNotAllowed, InvalidSize, ModelNotFound, Overloaded: see each message.
    """
    revision, pinned = _revision(wanted, revisions)
    menu = Menu(wanted, revision, pinned, manifests)
    if wanted.steps is not None or wanted.tier not in (None, AUTO):
        tier, target = _named(menu)
        _check_latency(wanted, target, expect)
        return (menu.choice(tier, target),)
    default = menu.default()
    if wanted.max_latency_ms is not None:
        return (menu.choice(*_by_latency(menu, wanted.max_latency_ms, expect), instead_of=default),)
    rungs = menu.rungs(default) if wanted.tier == AUTO else [default]
    return tuple(menu.choice(*rung, instead_of=default) for rung in rungs)


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


def _named(menu: Menu) -> tuple[str, TierTarget]:
    """What the tier or the count that a request names stands for."""
    wanted = menu.wanted
    if wanted.tier not in (None, AUTO):
        return wanted.tier or "", _by_tier(wanted, menu.revision, menu.pinned)
    return _by_steps(wanted, wanted.steps or 0, menu.revision, menu.pinned, menu.tiers())


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


def _by_latency(menu: Menu, limit_ms: int, expect: Expect) -> tuple[str, TierTarget]:
    """The best target that is expected to be in time; the cheapest where nothing is measured yet."""
    wanted = menu.wanted
    targets = menu.targets() or [menu.default()]
    targets = [one for one in targets if menu.serves(one[1])] or targets[:1]
    expected = [expect(target) for _, target in targets]
    fitting = [i for i, one in enumerate(expected) if one is not None and one.now_ms <= limit_ms]
    if fitting:
        return targets[fitting[-1]]
    tier, _ = targets[0]
    least = expected[0]
    if least is None:
        return targets[0]
    if least.alone_ms > limit_ms:
        raise InvalidRequest(
            f"{wanted.names.latency}={limit_ms} is too little for {wanted.model}: its fastest tier, {tier}, "
            f"takes about {least.alone_ms:.0f} ms",
            param=wanted.names.latency,
        )
    raise _too_slow_now(wanted, f"the fastest tier of {wanted.model}, {tier},", least, limit_ms)


def _check_latency(wanted: Wanted, target: TierTarget, expect: Expect) -> None:
    """That what the request names keeps the latency that it names too."""
    limit_ms = wanted.max_latency_ms
    expected = None if limit_ms is None else expect(target)
    if limit_ms is None or expected is None or max(expected.alone_ms, expected.now_ms) <= limit_ms:
        return
    names = wanted.names
    field, value = (names.steps, wanted.steps) if wanted.tier in (None, AUTO) else (names.tier, wanted.tier)
    if expected.alone_ms > limit_ms:
        raise ContradictoryFields(
            f"{field}={value} and {names.latency}={limit_ms} contradict each other: {target.steps} steps take about "
            f"{expected.alone_ms:.0f} ms; leave one of the two out",
            param=names.latency,
        )
    raise _too_slow_now(wanted, f"{field}={value}", expected, limit_ms)


def _too_slow_now(wanted: Wanted, what: str, expected: Expected, limit_ms: int) -> Overloaded:
    over_s = (expected.now_ms - limit_ms) / 1000
    return Overloaded(
        f"at the present load {what} takes about {expected.now_ms:.0f} ms and {wanted.names.latency}={limit_ms}: "
        f"try again in {over_s:.1f} s, or allow more",
        param=wanted.names.latency,
        retry_after_s=over_s,
    )
