"""One entry of the leaderboard, in a process of its own: `python -m bench.distill_entry --preset kd --out FILE …`.

Trains the named method on the embedded teacher for so many network evaluations (preparation included) and judges
the student at its step counts on plain torch, with the questions of every evaluation.
"""

import argparse
import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.distill_table import TEACHER
from bench.evaluations import metered
from distill_jobs.assessment import SEED, TeacherAs, sampler_of
from distill_jobs.data import prompts
from distill_jobs.evaluate.reference import Reference, kept_answers
from distill_jobs.evaluate.report import evaluate, teacher_metrics
from distill_jobs.methods import _schemas
from distill_jobs.methods._schemas import PREPARED
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.pairs import SHARD
from distill_jobs.small_evaluation import baked
from distill_jobs.stage import Precision, Stage, StageRun
from distill_jobs.tasks import base as tasks
from distill_jobs.tasks.base import Task
from distill_jobs.teachers import diffusers, publish
from distill_jobs.timing import shortened
from distill_jobs.trainer import TrainConfig, Trainer
from engines.denoiser import Denoiser
from engines.errors import FewstepError, InvalidRequest
from engines.registry.files import FilesRegistry

COUNTS = (1, 2, 4)
_TRIED = 3  # iterations that say what one costs
_PREPARED_SHARE = 0.4  # of the budget, at most, for what the teacher makes first
_BATCH = 64


class Stand:
    """A task's embedded teacher, as a job would have it."""

    def __init__(self, name: str, work: Path) -> None:
        self.task: Task = tasks.load(name)
        registry = FilesRegistry(work / "registry")
        revision = registry.current(name)
        if revision is None:
            version = publish.publish(registry, name, task=self.task)
        else:
            version = revision.tiers[publish.TIER].student
        self.teacher = diffusers.load(registry, version)
        self.asked = TeacherAs.of(self.teacher.manifest)
        self.guided = self.teacher.guided(self.asked.guidance)
        self.source = prompts.encoded(self.teacher, prompts.texts(name), work / "prompts")

    def reference(self, n: int) -> Reference:
        asked = self.asked
        path = kept_answers([self.task.answers], asked.digest, steps=asked.steps, guidance=asked.guidance, n=n)
        if path is None:
            raise InvalidRequest(f"n={n}: the teacher's shipped answers are fewer, take a smaller --n", param="n")
        return Reference.load(path, task=self.task)

    def beginner(self, preset: str, settings: Mapping[str, Any]) -> Denoiser:
        """The student before its first update, with the inputs and the points that the method needs."""
        method = resolve(preset)
        return self.teacher.beginner(method.method.inputs, points=getattr(method.config(settings), "points", 1))


def planned(stand: Stand, preset: str, settings: dict[str, Any], evaluations: int, precision: Precision) -> Stage:
    """The stage that the budget pays for: what one iteration and one prepared row cost is found by trying."""
    known = resolve(preset).method.Config.model_fields
    key = next((name for name in PREPARED if name in known), None)
    student = stand.beginner(preset, settings)
    tried = shortened(Stage(preset, _TRIED, settings), _TRIED)
    run = StageRun(0, tried, stand.guided, student, precision=precision)
    with metered() as meter, precision.context():
        run.method.prepare(stand.source, Workspace())
    row = meter.rows / SHARD
    with metered() as meter:
        for _ in range(_TRIED):
            run.iterate(stand.source)
    each = meter.rows / _TRIED
    told = dict(settings)
    if key and row:
        told[key] = max(SHARD, int(_PREPARED_SHARE * evaluations / row) // SHARD * SHARD)
    rest = evaluations - (told[key] * row if key else 0)
    return Stage(preset, max(1, int(rest / each)), told)


def counts_of(preset: str) -> dict[str, Any]:
    """The step counts of every entry, as a setting; nothing for a method that is for its own alone."""
    asked = {"counts": list(COUNTS)}
    try:
        _schemas.check(preset, asked)
        _schemas.check_counts(preset, asked, resolve(preset).method.inputs)
    except InvalidRequest:
        return {}
    return {"counts": COUNTS}


def entry(stand: Stand, preset: str, seed: int, evaluations: int, n: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Figures by step count.

    Raises:
        Diverged: training or sampling left the numbers.
    """
    wanted = counts_of(preset) | settings
    precision = Precision(bf16=True)
    stage = planned(stand, preset, wanted, evaluations, precision)
    student = stand.beginner(preset, wanted)
    trainer = Trainer([stage], stand.guided, student, stand.source, TrainConfig(seed=seed, bf16=True))
    began = time.monotonic()
    with metered() as meter:
        result = trainer.fit()
    seconds = time.monotonic() - began
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    student.load_state_dict(result.weights)
    loaded = stand.teacher.student(student.requires_grad_(False).eval(), result.schedules, baked(stand.asked.guidance))
    ask, reference = sampler_of(loaded, batch=_BATCH), stand.reference(n)
    counts = [k for k in COUNTS if k in result.schedules] or sorted(result.schedules)
    figures = {k: evaluate(ask, n=n, seed=SEED, steps=k, reference=reference, batch=_BATCH) for k in counts}
    return {
        "preset": preset,
        "settings": settings,
        "seed": seed,
        "n": n,
        "iterations": stage.iterations,
        "evaluations": meter.rows,
        "seconds": round(seconds, 1),
        "rss_mb": rss_mb,
        "figures": {str(k): metrics.model_dump(mode="json") for k, metrics in figures.items()},
    }


def teacher(stand: Stand, n: int) -> dict[str, Any]:
    """The guided teacher itself at the same step counts: what a student has to beat."""
    manifest, asked = stand.teacher.manifest, stand.asked
    loaded = stand.teacher.student(stand.teacher.denoiser, manifest.schedules, manifest.guidance)
    ask, reference = sampler_of(loaded, guidance=asked.guidance, batch=_BATCH), stand.reference(n)
    counts = [k for k in COUNTS if k in manifest.schedules]
    figures = {k: evaluate(ask, n=n, seed=SEED, steps=k, reference=reference, batch=_BATCH) for k in counts}
    full = teacher_metrics(n, SEED, reference)
    return {
        "preset": TEACHER,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "n": n,
        "full": full.model_dump(mode="json"),
        "figures": {str(k): metrics.model_dump(mode="json") for k, metrics in figures.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default=tasks.DEFAULT)
    parser.add_argument("--preset", required=True, help=f"a method, or {TEACHER} for the teacher at few steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluations", type=int, required=True)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the backward pass of the fused kernel is slow on CPUs
            stand = Stand(options.task, options.work)
            if options.preset == TEACHER:
                made = teacher(stand, options.n)
            else:
                made = entry(stand, options.preset, options.seed, options.evaluations, options.n, options.settings)
    except FewstepError as error:
        made = {"preset": options.preset, "seed": options.seed, "failed": f"{error.code}: {error.message}"}
    partial = options.out.with_suffix(".partial")
    partial.write_text(json.dumps(made, indent=1))
    partial.replace(options.out)


if __name__ == "__main__":
    main()
