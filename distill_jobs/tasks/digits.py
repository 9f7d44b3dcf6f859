"""Handwritten digits in coloured ink: real writing, few words."""

from pathlib import Path

from distill_jobs.tasks.base import Contract, Task
from distill_jobs.teachers.digits import data
from engines.manifest import Guidance

_FOLDER = Path(data.__file__).parent
_TEACHER = Contract(
    name="digits-teacher",
    steps=32,
    compared=(1, 2, 4, 8, 16),
    guidance=Guidance(mode="cfg", default=2.0, minimum=1.0, maximum=8.0),
    solver="dpmpp_2m",
    prompts=(
        "a large red seven on white paper",
        "a handwritten three in green",
        "the small digit eight in orange ink at the left on black paper",
        "a purple two on the top on yellow paper",
    ),
)

TASK = Task(
    name="digits",
    attributes=data.ATTRIBUTES,
    classes=data.CLASSES,
    words=data.WORDS,
    size_px=32,
    scenes=data.scenes,
    draw=data.draw,
    folder=_FOLDER,
    weights=_FOLDER / "metrics",
    teacher=_TEACHER,
)
