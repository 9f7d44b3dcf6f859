"""Which students something refers to, and what: those may not be removed.

A student is held by the revisions of a deployment that serve or that somebody may go back to, by candidates that are
still tried, by jobs that go on (their versions are told by who knows jobs), and by every student made from it.
"""

from collections.abc import Iterable, Mapping

from engines.manifest import shown
from engines.registry._keyed import KeyedRegistry

References = dict[str, list[str]]
"""Full version -> what holds it, in words. Versions that nothing holds are not in it."""


def references(registry: KeyedRegistry, keep_revisions: int, jobs: Mapping[str, Iterable[str]]) -> References:
    """`keep_revisions`, 2 or more, are the newest of each deployment; `jobs` maps ids to the full versions they need.

    Raises:
        CorruptBlob: a file cannot be read, and so nobody knows what it refers to.
    """
    held: References = {}

    def hold(version: str, why: str) -> None:
        held.setdefault(version, []).append(why)

    for name in registry.store.children("deployments"):  # also those that have candidates only
        numbers = registry.history(name)
        for number in numbers[-keep_revisions:]:
            what = "serves" if number == numbers[-1] else "revision"
            for version in registry.revision(name, number).versions:
                hold(version, f"{what} {name}:{number}")
        for candidate in registry.pending(name):
            for version in candidate.versions:
                hold(version, f"candidate {candidate.swap_id} of {name}")
    for job, versions in jobs.items():
        for version in versions:
            hold(version, f"job {job}")
    return held


def bases(registry: KeyedRegistry, versions: Iterable[str]) -> References:
    """What these students, and those that they were made from in turn, were made from."""
    known, held = set(registry.students()), References()
    looked: set[str] = set()
    waiting = [version for version in versions if version in known]
    while waiting:
        version = waiting.pop()
        if version in looked:
            continue
        looked.add(version)
        manifest = registry.student(version)
        for origin in {manifest.base, *manifest.parents} & known:
            assert origin is not None
            held.setdefault(origin, []).append(f"base of {shown(version)}")
            waiting.append(origin)
    return held
