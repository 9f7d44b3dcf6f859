"""Flat coloured shapes on plain grounds, drawn without end: what can be checked exactly."""

from pathlib import Path

from distill_jobs.tasks.base import Contract, Task
from distill_jobs.teachers.shapes import data
from engines.manifest import Guidance

_TEACHER = Contract(
    name="shapes-teacher",
    steps=32,
    compared=(1, 2, 4, 8, 16),
    guidance=Guidance(mode="cfg", default=2.0, minimum=1.0, maximum=8.0),
    solver="dpmpp_2m",
    prompts=(
        "a small red circle above a large blue square on a white background",
        "a large green ring",
        "a yellow triangle left of a purple cross on a black background",
        "a pink square on a grey background",
    ),
)

TASK = Task(
    name="shapes",
    attributes=data.ATTRIBUTES,
    classes=data.CLASSES,
    words=data.WORDS,
    size_px=64,
    scenes=data.scenes,
    draw=data.draw,
    folder=Path(data.__file__).parent,
    weights=Path(__file__).parents[1] / "evaluate" / "weights",
    teacher=_TEACHER,
)
