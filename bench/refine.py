"""What a teacher adds to its student and what it costs: `python -m bench.refine --registry URL --student V`.

The student alone, `refine: first_step`, `correction` and `redo` answer the same questions; a redone share is compared
with as many pictures at random, with all, and with redoing from noise instead of from the student's picture. A student
without a judge gets one from further questions. Cost is counted: network rows of a picture, and the engine's
milliseconds for them, by the quickest of several calls of a full batch. The registry has to hold the teacher too.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.machine import described
from distill_jobs.assessment import BATCH, SEED, Assessor, TeacherAs, as_json, chosen, sampler_of
from distill_jobs.evaluate.pixels import Pixels
from distill_jobs.evaluate.questions import Questions, questions
from distill_jobs.evaluate.reference import Reference
from distill_jobs.evaluate.report import evaluate
from engines.backends.base import Profile, device_of
from engines.calibration import calibrate
from engines.errors import InvalidRequest
from engines.loader import load_student
from engines.manifest import REDO_SHARES, Judge
from engines.refine import ALL, REDO
from engines.registry.base import open_registry
from engines.student import Aid, LoadedStudent
from server import leases
from server.dialects.capabilities import fits
from server.leases import StageCost, VersionCost

_REPEATS = 15
_HELD_OUT = 1  # the seed of the questions that the judge is made from
_OUT = Path(__file__).parent / "refine.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", required=True, help="a folder with the student and its teacher")
    parser.add_argument("--student", required=True, help="name@digest")
    parser.add_argument("--n", type=int, default=2000, help="pictures of each evaluation")
    parser.add_argument("--held-out", type=int, default=400, help="pictures that the judge is made from")
    parser.add_argument("--teacher-steps", type=int, default=16, help="of the schedule whose second half redoes")
    parser.add_argument("--rounds", type=int, default=100, help="of the bootstrap; 0 leaves the intervals out")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--work", type=Path, default=Path(".fewstep/bench-refine"))
    parser.add_argument("--out", type=Path, default=_OUT, help="entries of other students in it are kept")
    options = parser.parse_args()
    found = measured(options)
    known = json.loads(options.out.read_text())["students"] if options.out.exists() else {}
    report = described("bench.refine") | {"students": known | {found["student"]: found}}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table(found), highlight=False, soft_wrap=True)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    registry = open_registry(options.registry)
    manifest = registry.student(options.student)
    if manifest.base is None:
        raise InvalidRequest(f"{options.student} has no teacher that could add anything")
    choice, cache = chosen(options.backend, "auto"), options.work / "engines"
    assessor = Assessor(registry, choice=choice, cache=cache, answers=options.work / "answers", threads=options.threads)
    asked = TeacherAs.of(registry.student(manifest.base))
    profile = Profile((1, 8, 16), choice.precision, options.threads, device=device_of(choice.backend))
    student, teacher = (
        load_student(registry, one, choice=choice, profile=profile, cache=cache)
        for one in (manifest, registry.student(manifest.base))
    )
    captions = questions(options.held_out, _HELD_OUT, asked.task).captions
    found = calibrate(student, teacher, options.teacher_steps, captions)
    judged = _with(student, found.judge)
    judging = Judging(questions(options.n, SEED, asked.task), assessor.reference(asked, options.n), options.rounds)
    stand = Stand(judged, teacher, judging)
    return {
        "student": manifest.version,
        "teacher": asked.version,
        "engine": choice.backend,
        "n": options.n,
        "correlation": found.correlation,
        "teacher_figures": stand.teacher_figures(),
        "counts": {steps: stand.figures(steps) for steps in sorted(manifest.schedules)},
    }


@dataclass(frozen=True, slots=True)
class Judging:
    """What is asked and by what the answers are judged."""

    asked: Questions
    reference: Reference
    rounds: int

    def metrics(self, pictures: Pixels, steps: int) -> dict[str, Any]:
        """Of pictures that are there already, one for each question."""
        place = {seed: k for k, seed in enumerate(self.asked.seeds)}

        def answers(captions: Sequence[str], seeds: Sequence[int], count: int) -> Pixels:
            return pictures[[place[seed] for seed in seeds]]

        found = evaluate(answers, n=self.asked.n, seed=SEED, steps=steps, reference=self.reference, rounds=self.rounds)
        return as_json(found)


class Stand:
    """One student and its teacher, asked the same questions in every way."""

    def __init__(self, student: LoadedStudent, teacher: LoadedStudent, judging: Judging) -> None:
        self._student, self._teacher, self._judging = student, teacher, judging
        self._full = max(teacher.manifest.schedules)
        self._theirs = self._pictures(teacher, self._full)
        self._cost = cost(student)

    def teacher_figures(self) -> dict[str, Any]:
        rows = leases.evaluations(self._teacher.manifest, self._full).expected
        return self._judged(self._theirs, self._full, rows)

    def figures(self, steps: int) -> dict[str, Any]:
        manifest, teacher = self._student.manifest, self._teacher.manifest
        own = self._pictures(self._student, steps)
        made = {"student": self._judged(own, steps, leases.evaluations(manifest, steps).expected)}
        for how in ALL:
            if not fits(manifest, teacher, steps, how):
                continue
            pictures = self._pictures(self._student, steps, Aid(self._teacher, how))
            rows = leases.evaluations(manifest, steps, None, teacher, how)
            if how != REDO:
                made[how.how] = self._judged(pictures, steps, rows.expected)
            else:
                made |= self._redone(steps, own, pictures, rows)
        return made

    def _redone(self, steps: int, own: Pixels, some: Pixels, rows: leases.Evaluations) -> dict[str, Any]:
        """A share by the judge, and what it is compared with."""
        always = _with(self._student, _never_content(self._student.manifest.judge))
        redone = (own != some).any(axis=(1, 2, 3))
        everything = self._pictures(always, steps, Aid(self._teacher, REDO))
        share, judging = float(redone.mean()), (rows.expected - REDO.share * rows.most) / (1 - REDO.share)
        luck = np.random.default_rng(0).permutation(redone)
        rest = rows.most - judging
        full = leases.evaluations(self._teacher.manifest, self._full).expected
        plain = leases.evaluations(self._student.manifest, steps).expected
        return {
            "redo": self._judged(some, steps, judging + share * rest, share=share),
            "redo_at_random": self._judged(_mixed(own, everything, luck), steps, plain + share * (rows.most - plain)),
            "redo_all": self._judged(everything, steps, rows.most),
            "redo_from_noise": self._judged(_mixed(own, self._theirs, redone), steps, judging + share * full),
        }

    def _judged(self, pictures: Pixels, steps: int, rows: float, share: float | None = None) -> dict[str, Any]:
        cost_ms = 1000 * leases.queued_s([self._cost], rows)
        told = {"network_rows": round(rows, 2), "engine_ms": round(cost_ms, 3), "share_redone": share}
        return self._judging.metrics(pictures, steps) | told

    def _pictures(self, loaded: LoadedStudent, steps: int, aid: Aid | None = None) -> Pixels:
        return sampler_of(loaded, aid=aid)(self._judging.asked.captions, self._judging.asked.seeds, steps)


def _with(student: LoadedStudent, judge: Judge) -> LoadedStudent:
    return replace(student, manifest=student.manifest.judged(judge))


def _never_content(judge: Judge | None) -> Judge:
    assert judge is not None
    nothing = (0.0,) * len(REDO_SHARES)
    return judge.model_copy(update={"doubts": dict.fromkeys(judge.doubts, nothing)})


def _mixed(own: Pixels, other: Pixels, where: "np.ndarray[Any, np.dtype[np.bool_]]") -> Pixels:
    return np.where(where[:, None, None, None], other, own)


def cost(student: LoadedStudent) -> VersionCost:
    """Engine seconds per row of a full batch. A student and its teacher share the graph, so it is that of both."""
    family, (c, h, w) = student.family, student.latent_shape
    x, t = torch.zeros(BATCH, c, h, w), torch.full((BATCH,), 0.5)
    cond = family.encode(["a picture"] * BATCH)
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: family.encode(["a picture"] * BATCH),
        "step": lambda: family.denoise(x, t, cond, t, [None] * BATCH),
        "decode": lambda: family.decode(x),
    }
    return VersionCost(**{name: StageCost(row_s=_quickest_s(call) / BATCH) for name, call in calls.items()})


def _quickest_s(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        begun_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun_s)
    return min(seconds)


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    columns = ("fd_ratio", "fd_to_teacher", "alignment_ratio", "diversity_ratio", "network_rows", "engine_ms")
    lines = [f"| steps | | {' | '.join(columns)} | share_redone |", "|---|---|" + "---|" * (len(columns) + 1)]
    entries = [(steps, name, one) for steps, made in found["counts"].items() for name, one in made.items()]
    for steps, name, one in [*entries, ("", "teacher", found["teacher_figures"])]:
        share = "" if one["share_redone"] is None else f"{one['share_redone']:.3f}"
        lines.append(f"| {steps} | {name} | {' | '.join(f'{one[key]:.3f}' for key in columns)} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
