"""Judges a sampler: asks it the evaluation's questions and compares its pictures with real ones and the teacher's.

`fd_ratio` and the other ratios are to the guided teacher's answers to the same captions with the same seeds; they are
None where the reference has no teacher, as when the teacher itself is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from distill_jobs.evaluate import alignment, diversity, frechet, grain
from distill_jobs.evaluate.density_coverage import density_coverage
from distill_jobs.evaluate.features import Floats
from distill_jobs.evaluate.forgotten import forgotten
from distill_jobs.evaluate.frechet import Check
from distill_jobs.evaluate.network_reference import NetworkFigures
from distill_jobs.evaluate.networks import DirectoryNetwork
from distill_jobs.evaluate.pixels import Pixels
from distill_jobs.evaluate.precision_recall import precision_recall
from distill_jobs.evaluate.questions import Questions, questions
from distill_jobs.evaluate.reference import Reference, TeacherSample, load_teacher, save_teacher, teacher_path
from distill_jobs.evaluate.sample import Sample, Tally
from distill_jobs.evaluate.sheet import sheet as sheet
from distill_jobs.evaluate.sizes import Sized, at_sizes
from engines.errors import InvalidRequest

Sampler = Callable[[Sequence[str], Sequence[int], int], Pixels]
"""(captions, seeds, steps) -> pictures [N, 3, H, W], uint8 or better float32 in levels 0..255: rounding makes grain."""
Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

BATCH = 64
ROUNDS = 100  # of the bootstrap; each costs two 118 × 118 eigenvalue problems


class Metrics(BaseModel):
    """One sampler's figures at one step count. `…_ratio` is to the teacher; `diversity` is to real pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    seed: int
    steps: int
    fd: float
    fd_ci: tuple[float, float] | None
    fd_floor: float
    alignment: float
    alignment_heldout: float | None
    alignment_real: float
    diversity: float
    grain: float
    saturation: float
    fd_to_teacher: float | None = None
    fd_ratio: float | None = None
    fd_ratio_ci: tuple[float, float] | None = None
    alignment_ratio: float | None = None
    diversity_ratio: float | None = None
    grain_ratio: float | None = None
    saturation_ratio: float | None = None
    clipped: float | None = None  # share of values at an end of the range
    precision: float | None = None  # these four are to real pictures of the captions; density may pass 1
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    fd_at: tuple[Sized, ...] = ()  # at smaller sample counts
    alignment_forgotten: float | None = None  # share of what is to be forgotten that pictures of its prompts show
    alignment_instead: float | None = None  # and of what was to replace it
    networks: dict[str, NetworkFigures] = {}  # in further feature networks, by name


def evaluate(
    sampler: Sampler,
    *,
    n: int,
    seed: int,
    steps: int,
    reference: Reference,
    batch: int = BATCH,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    check: Check = lambda: None,
) -> Metrics:
    """Asks `sampler` for n pictures and measures them; `rounds` 0 leaves out the intervals and what nobody gates by.
    `check` is called before each round of theirs.

    Raises:
        Diverged: the sampler made values that are no numbers.
    """
    asked = questions(n, seed, reference.task)
    tally = Tally(reference.network, [other.network for other in reference.others])
    seen = _ask(sampler, asked, asked.seeds, steps, tally, batch=batch, progress=progress)
    return measure(seen, asked, steps=steps, reference=reference, rounds=rounds, check=check)


def measure(
    seen: Sample,
    asked: Questions,
    *,
    steps: int,
    reference: Reference,
    rounds: int = ROUNDS,
    check: Check = lambda: None,
) -> Metrics:
    """Figures of what was seen in the answers to `asked`. Where something is to be forgotten: of the answers to
    other prompts, and beside them what is left of it in those that name it."""
    kept = reference.kept(asked)
    part = seen.part(kept.rows)
    left = forgotten(seen.attributes, asked, reference.forget)
    beside = {
        "alignment_forgotten": left.concept,
        "alignment_instead": left.instead,
        "networks": {
            other.name: other.figures(
                part.others[other.name], kept, rounds, compared=reference.teacher is not None, check=check
            )
            for other in reference.others
        },
    }
    own = _measure_alone(part, kept, steps, reference, rounds, check).model_copy(update=beside)
    if reference.teacher is None:
        return own
    theirs = _part(reference.teacher, kept)
    return own.model_copy(update=_compared(own, part, theirs, kept, reference, rounds, check))


def teacher_metrics(n: int, seed: int, reference: Reference, check: Check = lambda: None) -> Metrics:
    """The figures of the reference's own teacher at n, without ratios."""
    if reference.teacher is None:
        raise InvalidRequest("the reference has no teacher; load it with a teacher's features")
    asked = questions(n, seed, reference.task)
    others = {other.name: other.teacher[asked.rows] for other in reference.others}
    theirs = replace(_part(reference.teacher, asked), others=others)
    alone = reference.with_teacher(None)
    return measure(theirs, asked, steps=reference.teacher.steps, reference=alone, check=check)


def teacher_reference(
    sampler: Sampler,
    *,
    digest: str,
    steps: int,
    guidance: float,
    n: int,
    reference: Reference,
    folder: Path,
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Reference:
    """`reference` with the teacher's sample, read from `folder` or asked of `sampler` (2 n pictures) and kept."""
    path = teacher_path(folder, digest, steps=steps, guidance=guidance, n=n)
    if path.exists():
        return reference.with_teacher(load_teacher(path, reference.network))
    asked = questions(n, seed, reference.task)

    def answers(seeds: list[int], before: int) -> Sample:
        shifted = _shifted(progress, before, 2 * n)
        return _ask(sampler, asked, seeds, steps, Tally(reference.network), batch=batch, progress=shifted)

    first, second = answers(asked.seeds, 0), answers(asked.other_seeds, n)
    teacher = TeacherSample(digest, steps, guidance, seed, first, frechet.fit(second.features))
    save_teacher(path, teacher, reference.network)
    return reference.with_teacher(teacher)


def seen_by(
    sampler: Sampler,
    network: DirectoryNetwork,
    *,
    n: int,
    seed: int,
    steps: int,
    reference: Reference,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Floats:
    """Features [n, D] of the sampler's answers in a further network."""
    asked = questions(n, seed, reference.task)
    tally = Tally(reference.network, [network])
    seen = _ask(sampler, asked, asked.seeds, steps, tally, batch=batch, progress=progress)
    return seen.others[network.name]


def _ask(
    sampler: Sampler,
    asked: Questions,
    seeds: list[int],
    steps: int,
    tally: Tally,
    *,
    batch: int,
    progress: Progress | None,
) -> Sample:
    captions = asked.captions
    for start in range(0, asked.n, batch):
        part = slice(start, min(start + batch, asked.n))
        pictures = sampler(captions[part], seeds[part], steps)
        if len(pictures) != len(captions[part]):
            raise InvalidRequest(f"the sampler made {len(pictures)} pictures for {len(captions[part])} captions")
        tally.add(pictures)
        if progress is not None:
            progress(part.stop, asked.n)
    return tally.sample()


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


def _measure_alone(
    seen: Sample, asked: Questions, steps: int, reference: Reference, rounds: int, check: Check
) -> Metrics:
    real = reference.baseline(asked)
    trained = ~asked.heldout
    ends = frechet.interval(seen.features, reference.real, asked.groups, rounds=rounds, check=check) if rounds else None
    return Metrics(
        n=asked.n,
        seed=asked.seed,
        steps=steps,
        fd=frechet.distance(frechet.fit(seen.features), reference.real),
        fd_ci=(ends.low, ends.high) if ends else None,
        fd_floor=real.floor,
        alignment=alignment.accuracy(seen.attributes[trained], asked.attributes[trained]) or 0.0,
        alignment_heldout=alignment.accuracy(seen.attributes[asked.heldout], asked.attributes[asked.heldout]),
        alignment_real=real.alignment,
        diversity=diversity.ratio(seen.features, asked.groups, real.spread),
        grain=seen.grain,
        saturation=seen.saturation,
        clipped=seen.clipped,
        **(_beside(seen, asked, reference, rounds, check) if rounds else {}),
    )


def _beside(seen: Sample, asked: Questions, reference: Reference, rounds: int, check: Check) -> dict[str, Any]:
    """The fields that no gate reads."""
    real = reference.real_rows(asked)
    found = precision_recall(seen.features, real), density_coverage(seen.features, real)
    named = {name: value for figures in found for name, value in asdict(figures).items()}
    return named | {"fd_at": at_sizes(seen.features, asked, reference.real, rounds=rounds, check=check)}


def _compared(
    own: Metrics,
    seen: Sample,
    theirs_seen: Sample,
    asked: Questions,
    reference: Reference,
    rounds: int,
    check: Check,
) -> dict[str, Any]:
    """The fields that need a teacher."""
    teacher = reference.teacher
    assert teacher is not None
    theirs = _measure_alone(theirs_seen, asked, teacher.steps, reference, 0, check)
    both = seen.features, theirs_seen.features
    ends = frechet.ratio_interval(*both, reference.real, asked.groups, rounds=rounds, check=check) if rounds else None
    return {
        # the teacher's other sample is kept as one Gaussian, of all prompts
        "fd_to_teacher": None if reference.forget else frechet.distance(frechet.fit(seen.features), teacher.other),
        "fd_ratio": own.fd / theirs.fd,
        "fd_ratio_ci": (ends.low, ends.high) if ends else None,
        "alignment_ratio": own.alignment / max(theirs.alignment, 1e-6),
        "diversity_ratio": own.diversity / max(theirs.diversity, 1e-6),
        "grain_ratio": grain.ratio(own.grain, theirs.grain),
        "saturation_ratio": own.saturation / max(theirs.saturation, 1e-6),
    }


def _part(teacher: TeacherSample, asked: Questions) -> Sample:
    """The teacher's answers to exactly these questions, some of the first of those it was asked."""
    n = int(asked.rows.max()) + 1
    if asked.seed != teacher.seed or n > teacher.sample.n:
        has = f"n = {teacher.sample.n} of seed {teacher.seed}"
        raise InvalidRequest(f"the teacher's features are for {has}, not n = {n} of seed {asked.seed}")
    return teacher.sample.part(asked.rows)
