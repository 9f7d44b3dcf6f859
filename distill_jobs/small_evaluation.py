"""The evaluation while training: a few hundred pictures of the student as it is, through the serving path on torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_jobs.assessment import SEED, sampler_of
from distill_jobs.evaluate.reference import Reference
from distill_jobs.evaluate.report import Metrics, evaluate
from distill_jobs.forgetting import Forget
from distill_jobs.tasks import base as tasks
from distill_jobs.teachers.diffusers import Teacher
from engines.denoiser import BaseDenoiser
from engines.manifest import Guidance, Schedule

_BATCH = 32
_REAL_PICTURES = 2_500  # where something is forgotten; the noise of a few hundred made ones is larger


class SmallEvaluation:
    """Callable as the trainer's `evaluate` hook. Of the teacher's answers in `features` the first n are read."""

    def __init__(
        self,
        teacher: Teacher,
        guidance: Guidance,
        n: int,
        features: Path | None,
        forget: Sequence[Forget] = (),
    ) -> None:
        self._teacher, self._guidance, self._n = teacher, guidance, n
        reference = Reference.load(features, task=tasks.of(teacher.manifest))
        self._reference = reference.forgetting(forget, pictures=_REAL_PICTURES)

    def __call__(self, iteration: int, student: BaseDenoiser, schedules: Mapping[int, Schedule]) -> Mapping[str, float]:
        """`fd` (the ratio to the teacher where there is one) and so on: means over the step counts, and each alone."""
        ask = sampler_of(self._teacher.student(student, schedules, self._guidance), batch=_BATCH)
        seen = {
            k: evaluate(ask, n=self._n, seed=SEED, steps=k, reference=self._reference, batch=_BATCH, rounds=0)
            for k in sorted(schedules)
        }
        return _figures(seen)


def baked(w: float) -> Guidance:
    """The guidance of a student that learnt from the teacher guided by `w`."""
    return Guidance() if w == 1.0 else Guidance(mode="baked", default=w, minimum=w, maximum=w)


def learnt(w: float, weights: tuple[float, float] | None) -> Guidance:
    """The same of a student that learnt all of `weights`, where there are some: `w` is its default."""
    return Guidance(mode="embedded", default=w, minimum=weights[0], maximum=weights[1]) if weights else baked(w)


def _figures(seen: Mapping[int, Metrics]) -> dict[str, float]:
    named = {
        "fd": {k: m.fd if m.fd_ratio is None else m.fd_ratio for k, m in seen.items()},
        "alignment": {k: m.alignment for k, m in seen.items()},
        "diversity": {k: m.diversity for k, m in seen.items()},
        "grain": {k: m.grain for k, m in seen.items()},
    }
    forgotten = {k: m.alignment_forgotten for k, m in seen.items() if m.alignment_forgotten is not None}
    named |= {"alignment_forgotten": forgotten} if forgotten else {}
    found = {f"{name}@{k}": value for name, values in named.items() for k, value in values.items()}
    # Ratios are averaged as ratios: 2 and 1/2 make 1.
    found["fd"] = math.exp(sum(math.log(max(value, 1e-9)) for value in named["fd"].values()) / len(seen))
    return found | {name: sum(values.values()) / len(seen) for name, values in named.items() if name != "fd"}
