"""`fewstep students calibrate`: a student learns which of its pictures its teacher should redo (`refine: redo`)."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from engines.errors import InvalidRequest
from engines.manifest import StudentManifest, shown
from engines.refine import REDO
from engines.registry.base import Registry, open_registry
from server.commands.students import DEFAULT_REGISTRY, RegistryUrl, Version, known
from server.commands.terminal import out

if TYPE_CHECKING:
    from engines.calibration import Calibration


def calibrate(
    version: Version,
    prompts: Annotated[Path, typer.Option(help="A file of prompts like those to come, one a line; 200 or more.")],
    registry_url: RegistryUrl = DEFAULT_REGISTRY,
    teacher_steps: Annotated[
        int, typer.Option(help="Of the teacher's schedule; it redoes pictures by the second half of it.")
    ] = 16,
    backend: Annotated[str, typer.Option(help="The engine to ask; auto is what a worker takes.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto.")] = "auto",
) -> None:
    """Publish a student again with a judge, which says what its teacher doubts enough to redo. Promote it then.

    Example: fewstep students calibrate shapes-fast@3f2a91c0de11 --prompts prompts.txt
    """
    known(registry_url)
    from engines.backends.base import Profile, choose, device_of
    from engines.calibration import calibrate as calibrated
    from engines.loader import load_student

    registry = open_registry(registry_url)
    student = registry.student(version)
    if student.base is None:
        raise InvalidRequest(f"{shown(student.version)} has no teacher that could redo its pictures", param="version")
    texts = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    choice = choose(backend, precision)
    profile = Profile((1, 8), choice.precision, device=device_of(choice.backend))
    with tempfile.TemporaryDirectory() as cache:
        asked, teacher = (
            load_student(registry, one, choice=choice, profile=profile, cache=Path(cache))
            for one in (student, registry.student(student.base))
        )
        found = calibrated(asked, teacher, teacher_steps, texts)
    made = _published(registry, student, found, len(texts))
    out.print(_table(found))
    out.print(f"{made}: promote it, and requests of its tiers may say refine=redo", highlight=False, soft_wrap=True)


def _published(registry: Registry, student: StudentManifest, found: "Calibration", num_prompts: int) -> str:
    """The student with its judge. What was measured of its own pictures still holds, so its report comes along."""
    made = registry.publish(student.judged(found.judge))
    told = {"prompts": num_prompts, "correlation": {str(steps): value for steps, value in found.correlation.items()}}
    registry.put_report(made, (registry.report(student.version) or {}) | {"student": made, "judge": told})
    samples = registry.read_file(student.version, "samples.png")
    if samples is not None:
        registry.put_file(made, "samples.png", samples)
    return made


def _table(found: "Calibration") -> Table:
    table = Table("steps", f"redone beyond, at {REDO.share:.0%}", "rank correlation with what the teacher changes")
    for steps, correlation in found.correlation.items():
        table.add_row(str(steps), f"{found.judge.threshold(steps, REDO.share):.4g}", f"{correlation:.2f}")
    return table
