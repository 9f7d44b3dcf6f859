"""The Fréchet distance at several sample counts: it falls as pictures are added, and its interval narrows.

Figures of papers with other counts can be compared only at the same count. The first n questions are the same at every
count, so all come from one set of pictures.

Source: arXiv 1911.07023, section 3 (the bias of FID falls as 1/N).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from distill_jobs.evaluate import frechet
from distill_jobs.evaluate.frechet import AnyFloats, Check, Gaussian
from distill_jobs.evaluate.questions import Questions

SIZES = (500, 1000, 2000, 5000)


class Sized(BaseModel):
    """`fd` on the first n pictures, with its interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    fd: float
    fd_ci: tuple[float, float]


def at_sizes(
    features: AnyFloats, asked: Questions, real: Gaussian, *, rounds: int, check: Check = lambda: None
) -> tuple[Sized, ...]:
    """At every count of `SIZES` below all N rows of features [N, D], which answer `asked`."""
    found = []
    for n in SIZES:
        if n < len(features):
            part = features[:n]
            ends = frechet.interval(part, real, asked.groups[:n], rounds=rounds, check=check)
            fd = frechet.distance(frechet.fit(part), real)
            found.append(Sized(n=n, fd=fd, fd_ci=(ends.low, ends.high)))
    return tuple(found)
