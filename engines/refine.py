"""What a teacher adds to the sampling of its student, as plans of both. Torch-free: the gateway validates with it.

`first_step`: the teacher takes the first step of the student's schedule, the student the others. What a picture will be
is settled at the first step, where a few-step student varies less than its teacher.
After "Distilling Diversity and Control in Diffusion Models", which calls it diversity distillation. What is built: one
evaluation of the teacher, guided as it is by itself, along its flow (eta 0) from the first time of the student's
schedule to the second. No gate judges such pictures.
"""

from collections.abc import Collection
from typing import Literal

from engines.errors import InvalidRequest
from engines.manifest import Schedule, Step, StudentManifest, shown

Refine = Literal["first_step"]
_SHARED = ("process", "prediction", "latent_channels", "downscale")
_OWN_STEPS = ("dx", "linear")  # solvers whose steps were learnt for the student's own predictions


def teacher_of(student: StudentManifest, versions: Collection[str]) -> str | None:
    """The teacher that a student was made from, if it is one of these versions."""
    return student.base if student.base in versions else None


def first_step(
    student: StudentManifest, teacher: StudentManifest, steps: int, guidance: float | None = None
) -> tuple[Step, ...]:
    """The student's plan, its first step made the teacher's: that one's network is asked. `guidance` is the student's.

    Raises:
        InvalidRequest: there is no step left for the student, or the two do not share what a state is.
        StepsNotAllowed: as `StudentManifest.plan`.
    """
    plan = student.plan(steps, guidance)
    if steps < 2:
        raise _refused(
            student, "takes one step: with the first the teacher's, none is left for it; ask for two or more"
        )
    if teacher.version != student.base:
        raise _refused(student, f"was not made from {shown(teacher.version)}")
    for name in _SHARED:
        if getattr(student, name) != getattr(teacher, name):
            raise _refused(student, f"and its teacher {shown(teacher.version)} differ in {name}")
    if student.components["encoder"].weights != teacher.components["encoder"].weights:
        raise _refused(student, f"reads prompts by another encoder than its teacher {shown(teacher.version)}")
    if student.solver_for(steps) in _OWN_STEPS:
        raise _refused(student, f"has steps of its own (solver {student.solver_for(steps)}) that no other network fits")
    one = Schedule(times=(plan[0].t, plan[0].s))
    return (*one.expand(teacher.weight(), teacher.guidance.interval, "denoiser"), *plan[1:])


def _refused(student: StudentManifest, why: str) -> InvalidRequest:
    return InvalidRequest(f"refine=first_step cannot be had: {shown(student.version)} {why}", param="refine")
