"""What a teacher adds to the sampling of its student, as plans of both. Torch-free: the gateway validates with it.

`first_step`: the teacher takes the first step of the student's schedule, the student the others. What a picture will be
is settled at the first step, where a few-step student varies less than its teacher.
After "Distilling Diversity and Control in Diffusion Models", which calls it diversity distillation. What is built: one
evaluation of the teacher, guided as it is by itself, along its flow (eta 0) from the first time of the student's
schedule to the second.

`correction`: after each of the first half of its steps, the student's estimate is moved towards the teacher's; see
`engines.corrected`, which says what that is.

`redo`: pictures of the student that its teacher doubts most are finished again by the teacher, at most the asked share
of them; see `engines.redone`. What is doubted enough, the student's manifest says (`judge`).

No gate judges such pictures.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from engines.errors import ContradictoryFields, InvalidRequest
from engines.manifest import Judge, Schedule, Step, StudentManifest, shown

Refine = Literal["first_step", "correction", "redo"]
_SHARED = ("process", "prediction", "latent_channels", "downscale", "frames")
_OWN_STEPS = ("dx", "linear")  # solvers whose steps were learnt for the student's own predictions
_MEMORY = ("ab2", "dpmpp_2m", "unipc")  # solvers that go on from what they estimated before


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a request asks of the teacher. `share`: of the pictures that may be redone, where `how` is that."""

    how: Refine
    share: float = 0.0


FIRST_STEP = Refinement("first_step")
CORRECTION = Refinement("correction")
REDO = Refinement("redo", share=0.25)
ALL = (FIRST_STEP, CORRECTION, REDO)


def asked(how: Refine | None, share: float | None) -> Refinement | None:
    """What the fields `refine` and `redo_share` of a request mean together.

    Raises:
        ContradictoryFields: a share is given and nothing is to be redone.
    """
    if how == "redo":
        return REDO if share is None else Refinement(how, share)
    if share is not None:
        raise ContradictoryFields(f"redo_share={share:g} goes with refine=redo alone: leave it out", param="redo_share")
    return None if how is None else Refinement(how)


def teacher_of(student: StudentManifest, versions: Collection[str]) -> str | None:
    """The teacher that a student was made from, if it is one of these versions."""
    return student.base if student.base in versions else None


def plan(
    student: StudentManifest, teacher: StudentManifest, steps: int, guidance: float | None, refinement: Refinement
) -> tuple[Step, ...]:
    """The evaluations of one row, of both networks. `guidance` is the student's, and the teacher is guided as it is by
    itself.

    Raises:
        InvalidRequest: the two cannot work together so.
        StepsNotAllowed: as `StudentManifest.plan`.
    """
    own = student.plan(steps, guidance)
    why = _unfit(student, teacher, steps, refinement)
    if why is not None:
        raise InvalidRequest(f"refine={refinement.how} cannot be had: {shown(student.version)} {why}", param="refine")
    if refinement.how == "first_step":
        return (_asked(teacher, own[0].t, own[0].s), *own[1:])
    if student.judge is not None and refinement.how == "redo":
        return _redone(own, teacher, student.judge, refinement.share)
    early, late = own[: steps // 2], own[steps // 2 :]
    return (*(part for step in early for part in (step, _estimate(teacher, step.s))), *late)


def _unfit(student: StudentManifest, teacher: StudentManifest, steps: int, refinement: Refinement) -> str | None:
    """Why these two cannot work together at this count."""
    shown_teacher, solver = shown(teacher.version), student.solver_for(steps)
    if steps < 2 and refinement.how != "redo":
        return "takes one step, and none of its own would follow the teacher's; ask for two or more"
    if teacher.version != student.base:
        return f"was not made from {shown_teacher}"
    for name in _SHARED:
        if getattr(student, name) != getattr(teacher, name):
            return f"and its teacher {shown_teacher} differ in {name}"
    if student.components["encoder"].weights != teacher.components["encoder"].weights:
        return f"reads prompts by another encoder than its teacher {shown_teacher}"
    if refinement.how == "redo":
        return _unjudged(student, teacher, steps)
    if solver in _OWN_STEPS:
        return f"has steps of its own (solver {solver}) that no other network fits"
    if refinement.how == "correction" and solver in _MEMORY:
        return f"goes on from its earlier estimates (solver {solver}), which a correction would contradict"
    return None


def _unjudged(student: StudentManifest, teacher: StudentManifest, steps: int) -> str | None:
    judge = student.judge
    if judge is None or steps not in judge.doubts:
        return f"has no judge for its {steps} steps: `fewstep students calibrate` gives it one"
    if judge.steps not in teacher.schedules:
        return f"is judged at {judge.steps} steps of its teacher, which takes {sorted(teacher.schedules)}"
    return None


def _redone(own: tuple[Step, ...], teacher: StudentManifest, judge: Judge, share: float) -> tuple[Step, ...]:
    """The student's steps, the last of which noises its picture again; then the second half of the teacher's."""
    theirs = teacher.plan(judge.steps)[judge.steps // 2 :]
    *before, last = own
    noised = replace(last, s=theirs[0].t, eta=1 - last.s / theirs[0].t)
    rest = (replace(step, by_teacher=True, share=share) for step in theirs[1:])
    return (*before, noised, replace(theirs[0], by_teacher=True), *rest)


def _asked(teacher: StudentManifest, t: float, s: float) -> Step:
    """One evaluation of the teacher along its flow."""
    (step,) = Schedule(times=(t, s)).expand(teacher.weight(), teacher.guidance.interval, "denoiser")
    return replace(step, by_teacher=True)


def _estimate(teacher: StudentManifest, t: float) -> Step:
    """One evaluation of the teacher that moves no time."""
    return replace(_asked(teacher, t, 0.0), s=t)
