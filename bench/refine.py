"""What the teacher's first step buys a student and what it costs: `python -m bench.refine --registry URL --student V`.

The student alone and with `refine: first_step` answer the same questions at each count of two steps or more; latency is
of one picture on the engine alone, both measured in turn. Needs a student whose teacher is in the registry.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import described, quantile
from distill_jobs.assessment import SEED, Assessor, TeacherAs, as_json, chosen, sampler_of
from distill_jobs.evaluate.questions import questions
from distill_jobs.evaluate.report import Sampler, evaluate
from engines.backends.base import Profile, device_of
from engines.errors import InvalidRequest
from engines.loader import load_student
from engines.registry.base import open_registry
from server.leases import num_evaluations

_REPEATS = 15
_OUT = Path(__file__).parent / "refine.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", required=True, help="a folder with the student and its teacher")
    parser.add_argument("--student", required=True, help="name@digest")
    parser.add_argument("--n", type=int, default=2000, help="pictures of each evaluation")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--work", type=Path, default=Path(".fewstep/bench-refine"))
    parser.add_argument("--out", type=Path, default=_OUT)
    options = parser.parse_args()
    report = described("bench.refine") | measured(options)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    Console().print_json(json.dumps(report["counts"]))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    registry = open_registry(options.registry)
    manifest = registry.student(options.student)
    if manifest.base is None:
        raise InvalidRequest(f"{options.student} has no teacher that could take its first step")
    teacher, choice, cache = registry.student(manifest.base), chosen(options.backend, "auto"), options.work / "engines"
    assessor = Assessor(registry, choice=choice, cache=cache, answers=options.work / "answers", threads=options.threads)
    asked = TeacherAs.of(teacher)
    reference = assessor.reference(asked, options.n)
    profile = Profile((1, 8), choice.precision, options.threads, device=device_of(choice.backend))
    student, other = (
        load_student(registry, one, choice=choice, profile=profile, cache=cache) for one in (manifest, teacher)
    )
    samplers = {"student": sampler_of(student), "first_step": sampler_of(student, teacher=other)}
    counts: dict[int, dict[str, Any]] = {}
    for steps in sorted(count for count in manifest.schedules if count > 1):
        speeds = latencies(samplers, steps, questions(_REPEATS + 1, SEED, asked.task).captions)
        counts[steps] = {
            name: as_json(evaluate(sampler, n=options.n, seed=SEED, steps=steps, reference=reference))
            | {
                "latency_ms_p50": round(1000 * quantile(speeds[name], 0.5), 2),
                "network_rows": num_evaluations(manifest, steps, None, teacher if name == "first_step" else None),
            }
            for name, sampler in samplers.items()
        }
    return {"student": manifest.version, "teacher": teacher.version, "engine": choice.backend, "counts": counts}


def latencies(samplers: dict[str, Sampler], steps: int, captions: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of one picture, in turn, so that all meet the same neighbours."""
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for repeat, caption in enumerate(captions):
        for name, sampler in samplers.items():
            begun_s = time.perf_counter()
            sampler([caption], [repeat], steps)
            if repeat:  # the first call of a size allocates
                seconds[name].append(time.perf_counter() - begun_s)
    return seconds


if __name__ == "__main__":
    main()
