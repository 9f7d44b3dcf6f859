"""What a request wants, what a deployment's revision has for it, and what it is pinned to: pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from engines import refine
from engines.errors import ContradictoryFields, InvalidRequest, InvalidSize
from engines.manifest import StudentManifest, shown
from engines.refine import Refinement
from engines.registry.base import Revision, TierTarget
from server import leases, media
from server.media import AS_IT_IS, PNG, Form, Media
from server.messages import TierSteps

AUTO = "auto"
UNTIERED = "custom"  # the tier of a version that no tier names
_SAVES = 1 / 3  # of network rows: what a rung of the ladder at least saves over the one above


@dataclass(frozen=True, slots=True)
class Names:
    """What the fields are called in the dialect of the request: errors speak its language."""

    tier: str = "tier"
    steps: str = "steps"
    latency: str = "max_latency_ms"
    size: str = "size"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request says about how it is to be made. `model` is a deployment or `name@digest`.

    `strength` is that of one that changes a picture: the share of the steps that is taken.
    """

    model: str
    tier: str | None = None
    steps: int | None = None
    max_latency_ms: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    media: Media = AS_IT_IS
    refinement: Refinement | None = None
    strength: float | None = None
    names: Names = Names()


@dataclass(frozen=True, slots=True)
class Choice:
    """What the request is pinned to. `downgraded_from` is the default tier where latency or load forbade it.

    `teacher` is the version that adds what `refinement` says; `edits_from` the step at which a picture that is changed
    comes in.
    """

    deployment: str
    version: str
    tier: str
    steps: int
    width: int
    height: int
    form: Form = PNG
    downgraded_from: TierSteps | None = None
    teacher: str | None = None
    refinement: Refinement | None = None
    edits_from: int | None = None


@dataclass(frozen=True, slots=True)
class Menu:
    """What a revision has for a request. `pinned` is the version that it named, if it named one."""

    wanted: Wanted
    revision: Revision
    pinned: str | None
    manifests: Mapping[str, StudentManifest]

    def tiers(self) -> dict[str, TierTarget]:
        """The tiers in question, cheapest first."""
        found = [
            (tier, target) for tier, target in self.revision.tiers.items() if self.pinned in (None, target.student)
        ]
        return dict(sorted(found, key=lambda item: (self.rows(item[1]), item[0])))

    def default(self) -> tuple[str, TierTarget]:
        """What serves where the request does not say; a picture is not changed in so few steps that none is left."""
        tiers = self.tiers()
        if not tiers:  # pinned to a version that no tier names: its best is what it was made for
            version = self.pinned or ""
            return UNTIERED, TierTarget(student=version, steps=max(self.revision.allowed[version]))
        tier = self.revision.default_tier if self.revision.default_tier in tiers else list(tiers)[-1]
        usual = tier, tiers[tier]
        if self.wanted.strength is None or self.serves(usual[1]):
            return usual
        return next((one for one in self.targets() if self.serves(one[1])), usual)

    def targets(self) -> list[tuple[str, TierTarget]]:
        """What may serve a request that leaves the count open, cheapest first.

        Each tier's own count, and the smaller ones that its student passed at, as the cheapest tier of that student. A
        teacher takes no fewer steps than its tier says: it can, and blurs.
        """
        tiers = self.tiers()
        found = {target: tier for tier, target in reversed(tiers.items())}
        for tier, target in tiers.items():
            if self.manifests[target.student].kind != "teacher":
                most = max(other.steps for other in tiers.values() if other.student == target.student)
                for steps in self.revision.allowed[target.student]:
                    if steps < most:
                        found.setdefault(TierTarget(student=target.student, steps=steps), tier)
        return sorted(((tier, target) for target, tier in found.items()), key=lambda one: (self.rows(one[1]), one[0]))

    def rungs(self, top: tuple[str, TierTarget]) -> list[tuple[str, TierTarget]]:
        """`top`, then what serves instead of it under more and more load: each saves a third of the rows or more."""
        rungs = [top]
        for tier, target in reversed(self.targets()):
            if self.rows(target) <= (1 - _SAVES) * self.rows(rungs[-1][1]) and self.serves(target):
                rungs.append((tier, target))
        return rungs

    def rows(self, target: TierTarget) -> int:
        return leases.evaluations(self.manifests[target.student], target.steps).most

    def serves(self, target: TierTarget) -> bool:
        """Whether its student was made for the guidance, strength, size and form that the request wants."""
        try:
            self.choice(UNTIERED, target)
        except InvalidRequest:
            return False
        return True

    def choice(self, tier: str, target: TierTarget, *, instead_of: tuple[str, TierTarget] | None = None) -> Choice:
        """Raises what is wrong with the guidance, strength, size or form that the request wants."""
        manifest = self.manifests[target.student]
        asked, guidance = self.wanted.refinement, self.wanted.guidance
        edits_from = self._edits_from(manifest, target.steps)
        teacher = self.teacher(manifest, asked) if asked else None
        if teacher is None or asked is None:
            manifest.plan(target.steps, guidance)
        else:
            refine.plan(manifest, teacher, target.steps, guidance, asked)
        width, height = _size(self.wanted, manifest)
        above = instead_of if instead_of and self.rows(target) < self.rows(instead_of[1]) else None
        return Choice(
            self.revision.deployment,
            target.student,
            tier,
            target.steps,
            width,
            height,
            media.form(self.wanted.media, manifest),
            downgraded_from=TierSteps(tier=above[0], steps=above[1].steps) if above else None,
            teacher=teacher.version if teacher else None,
            refinement=asked,
            edits_from=edits_from,
        )

    def _edits_from(self, manifest: StudentManifest, steps: int) -> int | None:
        """The step at which a picture comes in; None where none is changed. Raises what is wrong with the strength."""
        if self.wanted.strength is None:
            return None
        if self.wanted.refinement:
            raise ContradictoryFields(
                f"refine={self.wanted.refinement.how} is of pictures from noise, not of changed ones: leave it out",
                param="refine",
            )
        if manifest.frames:
            raise InvalidRequest(
                f"{shown(manifest.version)} makes videos, and changes no pictures: send no picture", param="image"
            )
        return manifest.first_step(steps, self.wanted.strength)

    def teacher(self, student: StudentManifest, asked: Refinement) -> StudentManifest:
        """Raises `InvalidRequest` where the teacher of a student does not serve beside it."""
        version = refine.teacher_of(student, self.revision.versions)
        if version is None:
            raise InvalidRequest(
                f"refine={asked.how} needs the teacher of {shown(student.version)} in a tier of "
                f"{self.revision.deployment}: leave refine out, or promote it too",
                param="refine",
            )
        return self.manifests[version]


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
