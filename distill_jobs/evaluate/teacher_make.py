"""Makes a teacher's features, and says what it scores: `python -m distill_jobs.evaluate.teacher_make`.

The teacher is asked on the engine that serves, as its students will be; the features file and the figures at few steps,
which students must beat, then stand beside its weights. Reconstructions by its VAE are the best that any denoiser could
do, and the unguided teacher says what guidance costs.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch

from distill_jobs.assessment import BATCH, SEED, Assessor, TeacherAs, chosen, sampler_of
from distill_jobs.evaluate.pixels import Pixels
from distill_jobs.evaluate.questions import questions
from distill_jobs.evaluate.reference import Reference
from distill_jobs.evaluate.report import Metrics, Progress, evaluate, measure, teacher_metrics
from distill_jobs.evaluate.sample import Tally
from distill_jobs.tasks import base as tasks
from distill_jobs.teachers import publish
from engines.backends.base import Profile, device_of
from engines.cache import DiskCache
from engines.graph import GraphStore
from engines.loader import Loader
from engines.registry.files import FilesRegistry

log = logging.getLogger(__name__)


def reconstructions(vae: Path, reference: Reference, n: int) -> Metrics:
    """Real pictures of the questions through the VAE, not rounded, as the teacher's are not."""
    from diffusers import AutoencoderKL

    asked = questions(n, SEED, reference.task)
    network = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32, local_files_only=True).eval()
    drawn = asked.draw(2, reference.size)  # others than the real pictures that precision and recall compare with
    tally = Tally(reference.network)
    for part in np.array_split(drawn, -(-n // 32)):
        tally.add(_through(network, part))
    return measure(tally.sample(), asked, steps=0, reference=reference)


@torch.no_grad()
def _through(vae: torch.nn.Module, pixels: Pixels) -> Pixels:
    coded = vae.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent_dist.mode()  # type: ignore[operator]
    back: Pixels = ((vae.decode(coded).sample * 127.5) + 127.5).clamp(0, 255).numpy()  # type: ignore[operator]
    return back


def _said(name: str) -> Progress:
    return lambda done, total: log.info("%s %d/%d", name, done, total) if done % 512 == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a teacher's features and print what it scores.")
    parser.add_argument("--task", type=tasks.load, default=tasks.load(tasks.DEFAULT))
    parser.add_argument("--pipeline", type=Path, help="its diffusers directory; the task's shipped one if missing")
    parser.add_argument("--out", type=Path, help="folder of what it makes; the task's shipped one if missing")
    parser.add_argument("--report", type=Path, help="JSON to write the figures to")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--counts", type=int, nargs="*", help="those of the task if missing")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.pipeline = options.pipeline or options.task.pipeline
    options.out = options.out or options.task.answers
    options.counts = options.task.teacher.compared if options.counts is None else options.counts
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    rows = run(options)
    text = json.dumps({name: row.model_dump(mode="json") for name, row in rows.items()}, indent=1)
    if options.report is not None:
        options.report.write_text(text)
    for name, row in rows.items():
        log.info("%s: %s", name, row)


def run(options: argparse.Namespace) -> dict[str, Metrics]:
    choice = chosen(options.backend, options.precision)
    with tempfile.TemporaryDirectory() as scratch:
        registry, cache = FilesRegistry(Path(scratch) / "registry"), Path(scratch) / "cache"
        version = publish.publish(registry, "teacher", options.pipeline, task=options.task)
        teacher = TeacherAs.of(registry.student(version))
        assessor = Assessor(registry, choice=choice, cache=cache, answers=options.out, threads=options.threads)
        log.info("asking %s on %s %s", version, choice.backend, choice.precision)
        reference = assessor.reference(teacher, options.n)
        profile = Profile((1, BATCH), choice.precision, options.threads, device=device_of(choice.backend))
        loaded = Loader(registry, choice, profile, GraphStore(DiskCache(cache))).load(registry.student(version))
        unguided, n = f"unguided {teacher.steps} steps", options.n
        ask = sampler_of(loaded, guidance=1.0)
        few = assessor.teacher_at(teacher, n, options.counts)
        return {
            "reconstructions": reconstructions(options.pipeline / "vae", reference, n),
            f"teacher {teacher.steps} steps": teacher_metrics(n, SEED, reference),
            unguided: evaluate(ask, n=n, seed=SEED, steps=teacher.steps, reference=reference, progress=_said(unguided)),
            **{f"teacher {k} steps": metrics for k, metrics in few.items()},
        }


if __name__ == "__main__":
    main()
