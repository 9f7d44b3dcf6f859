"""What figures in a feature network of the operator's are compared with: real pictures and the teacher's, in its eyes.

The embedded network's real set is committed; that of another network is drawn and looked at once, and kept with the
teacher's features by the digest of the network. What a picture shows is read by the embedded network alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file, save_file

from distill_jobs.evaluate import frechet
from distill_jobs.evaluate.density_coverage import density_coverage
from distill_jobs.evaluate.features import Floats
from distill_jobs.evaluate.frechet import Check, Gaussian
from distill_jobs.evaluate.networks import DirectoryNetwork
from distill_jobs.evaluate.precision_recall import precision_recall
from distill_jobs.evaluate.questions import Questions, real_set
from distill_jobs.forgetting import Forget

REAL_PICTURES = 5000  # a quarter of the embedded network's: of DINOv2's small one a core looks at six a second


class NetworkFigures(BaseModel):
    """Figures in one other feature network, as those of the embedded one; the ratio is to the guided teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    fd: float
    fd_ci: tuple[float, float] | None
    fd_floor: float
    precision: float
    recall: float
    density: float
    coverage: float
    fd_ratio: float | None = None
    fd_ratio_ci: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class NetworkReference:
    """`real` is of the fixed real set, `rows` [N, D] of real pictures of the judged questions, `teacher` [M, D] of the
    teacher's answers to all questions, of which those may be a part."""

    network: DirectoryNetwork
    real: Gaussian
    rows: Floats
    teacher: Floats

    @property
    def name(self) -> str:
        return self.network.name

    def figures(
        self, seen: Floats, asked: Questions, rounds: int, *, compared: bool, check: Check = lambda: None
    ) -> NetworkFigures:
        """Of features [N, D] of the answers to `asked`, and if `compared` over those of the teacher's. `rounds` are the
        bootstrap's, with a `check` before each: 0 leaves out the intervals."""
        teacher = self.teacher[asked.rows]
        own, theirs, ends, ratio_ends = self._distance(seen), None, None, None
        if rounds:
            ends = frechet.interval(seen, self.real, asked.groups, rounds=rounds, check=check)
        if compared:
            theirs = self._distance(teacher)
        if compared and rounds:
            ratio_ends = frechet.ratio_interval(seen, teacher, self.real, asked.groups, rounds=rounds, check=check)
        return NetworkFigures(
            digest=self.network.digest,
            fd=own,
            fd_ci=(ends.low, ends.high) if ends else None,
            fd_floor=self._distance(self.rows),
            fd_ratio=own / theirs if theirs else None,
            fd_ratio_ci=(ratio_ends.low, ratio_ends.high) if ratio_ends else None,
            **asdict(precision_recall(seen, self.rows)),
            **asdict(density_coverage(seen, self.rows)),
        )

    def _distance(self, rows: Floats) -> float:
        return frechet.distance(frechet.fit(rows), self.real)


def network_reference(
    network: DirectoryNetwork,
    asked: Questions,
    size: int,
    folder: Path,
    *,
    without: Sequence[Forget] = (),
    teacher: str,
    answers: Callable[[], Floats],
    real_pictures: int = REAL_PICTURES,
    check: Check = lambda: None,
) -> NetworkReference:
    """The reference for the judged questions `asked`, whose real pictures, `size` x `size`, show nothing of `without`.
    What was seen before is read from `folder`, under the name `teacher` what `answers` found."""

    def real() -> dict[str, Floats]:
        gaussian = frechet.fit(network.observe(real_set(real_pictures, size, asked.task, without=without), check))
        return {"mean": gaussian.mean.astype(np.float32), "covariance": gaussian.covariance.astype(np.float32)}

    rules = hashlib.sha256(json.dumps([rule.model_dump() for rule in without]).encode()).hexdigest()[:12]
    named = f"{asked.task.name}-{size}-{rules}-{network.digest[:12]}"
    fixed = _kept(folder / f"real-set-{real_pictures}-{named}.safetensors", real)
    rows = _kept(
        folder / f"real-rows-{asked.n}-{asked.seed}-{named}.safetensors",
        lambda: {"rows": network.observe(asked.draw(1, size), check)},
    )
    seen = _kept(folder / f"seen-{teacher}-{network.digest[:12]}.safetensors", lambda: {"rows": answers()})
    gaussian = Gaussian(fixed["mean"].astype(np.float64), fixed["covariance"].astype(np.float64))
    return NetworkReference(network, gaussian, rows["rows"], seen["rows"])


def _kept(path: Path, make: Callable[[], Mapping[str, Floats]]) -> dict[str, Floats]:
    """The arrays of a file, which is made where it is missing."""
    if not path.exists():
        found = {name: np.ascontiguousarray(value) for name, value in make().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(found, partial)
        partial.replace(path)
    read: dict[str, Floats] = load_file(path)
    return read
