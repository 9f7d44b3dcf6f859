"""Searches for schedules beside each other on an embedded teacher: `python -m bench.searches`.

Each makes a student without new weights on the same rows; its distance to the teacher is measured on other ones, and it
is judged as students are. A row that is there already is kept, so an interrupted run goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import machine
from bench.distill_entry import Stand
from distill_jobs import times
from distill_jobs.assessment import SEED, sampler_of
from distill_jobs.batches import make_batch
from distill_jobs.evaluate.report import evaluate
from distill_jobs.methods._schemas import schemas
from distill_jobs.methods._search import Found, Search, SearchConfig, measured, plain
from distill_jobs.methods.base import resolve
from distill_jobs.roles import Cast
from distill_jobs.tasks import base as tasks
from engines.manifest import Schedule

UNIFORM = "uniform_ddim"
_OUT = Path(__file__).parent / "searches.json"
_APART, _BATCH = 64, 64


def searched(stand: Stand, name: str, counts: tuple[int, ...]) -> dict[int, Schedule]:
    """What one search finds on the rows that a job would give it."""
    if name == UNIFORM:
        return {k: plain(stand.guided.process, times.uniform(k), "ddim") for k in counts}
    preset = resolve(name)
    config = preset.config({"counts": counts})
    method = preset.method(Cast(stand.guided), config)
    assert isinstance(method, Search)
    assert isinstance(config, SearchConfig)
    method.search(make_batch(stand.source.rows(0, config.batch), stand.source.shape, 0))
    return method.schedules


def row(stand: Stand, name: str, counts: tuple[int, ...], n: int) -> dict[str, Any]:
    """One search's figures by step count; seconds are of the processor."""
    began = time.process_time()
    found = searched(stand, name, counts)
    seconds = time.process_time() - began
    apart = make_batch(stand.source.rows(1, _APART), stand.source.shape, 1)
    distances = measured(stand.guided, apart, {k: Found(one, 0.0, 0.0) for k, one in found.items()})
    guidance = stand.teacher.manifest.guidance
    student = stand.teacher.student(stand.teacher.denoiser, found, guidance)
    ask, reference = sampler_of(student, guidance=stand.asked.guidance, batch=_BATCH), stand.reference(n)
    return {
        "search": name,
        "n": n,
        "seconds": round(seconds, 1),
        "schedules": {str(k): one.model_dump(mode="json") for k, one in found.items()},
        "distance": {str(k): round(one.distance, 4) for k, one in distances.items()},
        "figures": {
            str(k): evaluate(ask, n=n, seed=SEED, steps=k, reference=reference, batch=_BATCH).model_dump(mode="json")
            for k in counts
        },
    }


def line(made: dict[str, Any]) -> str:
    """One row of the table that is shown."""
    parts = [f"| {made['search']} | {made['seconds']:.0f}"]
    for k, figures in made["figures"].items():
        parts += [f"{made['distance'][k]:.3f}", f"{figures['fd_ratio']:.2f}", f"{figures['diversity_ratio']:.2f}"]
    return " | ".join(parts) + " |"


def main() -> None:
    known = [UNIFORM, *(name for name, schema in sorted(schemas().items()) if not schema["roles"])]
    parser = argparse.ArgumentParser(description="Compare the searches for schedules on an embedded teacher.")
    parser.add_argument("--task", default=tasks.DEFAULT)
    parser.add_argument("--searches", nargs="+", default=known, choices=known)
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--n", type=int, default=2000, help="pictures of each evaluation")
    parser.add_argument("--work", type=Path, default=Path(".fewstep/bench-searches"), help="continued from if there")
    parser.add_argument("--out", type=Path, default=_OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stand, rows, console = Stand(options.task, options.work), list[dict[str, Any]](), Console()
    heads = [f"distance @{k} | fd ratio @{k} | diversity @{k}" for k in options.counts]
    console.print(f"| search | seconds | {' | '.join(heads)} |", markup=False, soft_wrap=True)
    for name in options.searches:
        file = options.work / f"{options.task}-{name}-{options.n}-{'-'.join(map(str, options.counts))}.json"
        if not file.exists():
            with sdpa_kernel(SDPBackend.MATH):  # the backward pass of the fused kernel is slow on CPUs
                made = json.dumps(row(stand, name, tuple(options.counts), options.n))
            partial = file.with_suffix(".partial")
            partial.write_text(made)
            partial.replace(file)
        rows.append(json.loads(file.read_bytes()))
        console.print(line(rows[-1]), markup=False, soft_wrap=True)
    report = machine.described("bench.searches") | {"task": options.task, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
