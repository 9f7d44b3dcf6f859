"""What every evaluation is compared with: real pictures and the teacher.

The real set is committed as mean and covariance of its features, with what real pictures of the evaluation's own
captions score (the floor). The teacher's sample is made once for each (version, steps, guidance, N) and kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from distill_jobs.evaluate import alignment, diversity, features, frechet, neighbours, sample
from distill_jobs.evaluate.features import FeatureNetwork
from distill_jobs.evaluate.frechet import Gaussian
from distill_jobs.evaluate.network_reference import NetworkReference
from distill_jobs.evaluate.questions import Questions, questions, real_set
from distill_jobs.evaluate.sample import Sample
from distill_jobs.forgetting import Forget, holds
from distill_jobs.tasks import shapes
from distill_jobs.tasks.base import Task
from engines.errors import ArtefactRejected, InvalidRequest

REAL = "real.safetensors"
REAL_SET_PICTURES = 20_000
COMMITTED_N = (500, 1000, 2000, 10_000)
_KEPT_PICTURES = 10_000  # before those to forget are left out; more would move a distance at N = 2000 by .05
_LEAST_KEPT = 8  # so that nearest neighbours and a covariance say something


class Baseline(BaseModel):
    """What real pictures of the asked captions score: the best that any generator can."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    seed: int
    floor: float  # Fréchet distance to the real set
    spread: float  # mean feature distance between two pictures of one caption
    alignment: float
    grain: float
    saturation: float


@dataclass(frozen=True, slots=True)
class TeacherSample:
    """A teacher's answers to `questions(n, seed)` and, as `other`, to the same captions with other seeds."""

    digest: str
    steps: int
    guidance: float
    seed: int
    sample: Sample
    other: Gaussian


class Reference:
    """Network, real set, baselines and (where there is one) the teacher's sample; `others` are the same in further
    feature networks, for the questions that they were made for."""

    def __init__(
        self,
        network: FeatureNetwork,
        real: Gaussian,
        size: int,
        teacher: TeacherSample | None = None,
        forget: Sequence[Forget] = (),
        others: Sequence[NetworkReference] = (),
    ) -> None:
        self.network = network
        self.real = real
        self.size = size
        self.teacher = teacher
        self.forget = tuple(forget)
        self.others = tuple(others)
        self._baselines: dict[tuple[int, int], Baseline] = {}
        self._real_rows: dict[tuple[int, int], features.Floats] = {}

    @property
    def task(self) -> Task:
        return self.network.task

    @classmethod
    def load(cls, teacher: Path | None = None, *, task: Task = shapes.TASK) -> Reference:
        """The task's committed reference, with a teacher's sample from `save_teacher` if its file is given.

        Raises:
            ArtefactRejected: a file was made with another feature network.
        """
        network, real = features.load(task), task.weights / REAL
        with safe_open(real, framework="numpy") as file:
            metadata = _checked(file.metadata(), real, network)
            gaussian = _gaussian(file.get_tensor("mean"), file.get_tensor("covariance"))
        found = cls(network, gaussian, int(metadata["size"]), load_teacher(teacher, network) if teacher else None)
        for row in json.loads(metadata["baselines"]):
            baseline = Baseline.model_validate(row)
            found._baselines[baseline.n, baseline.seed] = baseline
        return found

    def with_teacher(self, teacher: TeacherSample | None) -> Reference:
        return self._like(teacher, self.others)

    def beside(self, others: Sequence[NetworkReference]) -> Reference:
        return self._like(self.teacher, others)

    def _like(self, teacher: TeacherSample | None, others: Sequence[NetworkReference]) -> Reference:
        copy = Reference(self.network, self.real, self.size, teacher, self.forget, others)
        copy._baselines, copy._real_rows = self._baselines, self._real_rows
        return copy

    def forgetting(self, rules: Sequence[Forget], pictures: int = _KEPT_PICTURES) -> Reference:
        """The same for students that forget: its real pictures, drawn now, show nothing that they shall not draw. Of
        shapes without red ones, the distance to all real pictures is 4, four times their teacher's."""
        if not rules:
            return self
        drawn = real_set(pictures, self.size, self.task, without=rules)
        real = frechet.fit(self.network.observe(drawn).features)
        return Reference(self.network, real, self.size, self.teacher, rules)

    @property
    def digest(self) -> str:
        """Figures of two digests must not be compared: of the feature networks and of what is to be forgotten."""
        if not self.forget and not self.others:
            return self.network.digest
        rules, others = (
            (rule.model_dump() for rule in self.forget),
            ([other.name, other.network.digest] for other in self.others),
        )
        said = json.dumps([self.network.digest, *rules, *others])
        return hashlib.sha256(said.encode()).hexdigest()

    def kept(self, asked: Questions) -> Questions:
        """The questions that a student is judged by: all but those that name what it is to forget.

        Raises:
            InvalidRequest: too few are left.
        """
        if not self.forget:
            return asked
        index = [i for i, scene in enumerate(asked.scenes) if not holds(scene.caption, self.forget)]
        if len(index) < _LEAST_KEPT:
            raise InvalidRequest(
                f"of {asked.n} questions only {len(index)} name nothing to forget, and {_LEAST_KEPT} are needed to "
                "judge what is kept: raise eval.samples and eval.small_samples, or forget less",
                param="student.forget",
            )
        return asked.part(np.array(index))

    def baseline(self, asked: Questions) -> Baseline:
        """Committed for the usual N; else drawn and measured now, once."""
        key = (asked.n, asked.seed)
        if key not in self._baselines:
            self._baselines[key] = self._measure(asked)
        return self._baselines[key]

    def real_rows(self, asked: Questions) -> features.Floats:
        """Features [at most `MOST_ROWS`, D] of real pictures of the captions, not the baseline's; drawn once."""
        n = min(asked.n, neighbours.MOST_ROWS)
        if (n, asked.seed) not in self._real_rows:
            drawn = asked.part(np.arange(n)).draw(1, self.size)
            self._real_rows[n, asked.seed] = self.network.observe(drawn).features
        return self._real_rows[n, asked.seed]

    def _measure(self, asked: Questions) -> Baseline:
        seen = sample.of(asked.draw(0, self.size), self.network)
        return Baseline(
            n=asked.n,
            seed=asked.seed,
            floor=frechet.distance(frechet.fit(seen.features), self.real),
            spread=diversity.spread(seen.features, asked.groups),
            alignment=alignment.accuracy(seen.attributes, asked.attributes) or 0.0,
            grain=seen.grain,
            saturation=seen.saturation,
        )


def make_real(path: Path, size: int, network: FeatureNetwork) -> list[Baseline]:
    """Draws the real set and writes its statistics; to be done again whenever the feature network changes."""
    gaussian = frechet.fit(network.observe(real_set(REAL_SET_PICTURES, size, network.task)).features)
    made = Reference(network, gaussian, size)
    baselines = [made.baseline(questions(n, task=network.task)) for n in COMMITTED_N]
    tensors = {"mean": gaussian.mean.astype(np.float32), "covariance": gaussian.covariance.astype(np.float32)}
    rows = json.dumps([baseline.model_dump() for baseline in baselines])
    metadata = {"network": network.digest, "size": str(size), "baselines": rows}
    save_file(tensors, path, metadata=metadata)
    return baselines


def teacher_path(folder: Path, digest: str, *, steps: int, guidance: float, n: int) -> Path:
    return folder / f"features-{digest[:12]}-{steps}-{guidance:g}-{n}.safetensors"


def kept_answers(folders: Iterable[Path], digest: str, *, steps: int, guidance: float, n: int) -> Path | None:
    """A file of answers to at least n questions, the fewest: those to the first n are among them."""
    name = teacher_path(Path(), digest, steps=steps, guidance=guidance, n=n).name
    stem = name.removesuffix(f"{n}.safetensors")
    found = [path for folder in folders for path in folder.glob(f"{stem}*.safetensors")]
    enough = [(count, path) for path in found if (count := int(path.stem.removeprefix(stem))) >= n]
    return min(enough)[1] if enough else None


def save_teacher(path: Path, teacher: TeacherSample, network: FeatureNetwork) -> None:
    tensors = {
        "features": teacher.sample.features.astype(np.float16),
        "attributes": teacher.sample.attributes.astype(np.int8),
        "other_mean": teacher.other.mean.astype(np.float32),
        "other_covariance": teacher.other.covariance.astype(np.float32),
    }
    fields = {name: getattr(teacher, name) for name in ("digest", "steps", "guidance", "seed")}
    pixels = {name: getattr(teacher.sample, name) for name in ("grain", "saturation", "clipped")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"network": network.digest, "teacher": json.dumps(fields | pixels)})
    partial.replace(path)


def load_teacher(path: Path, network: FeatureNetwork) -> TeacherSample:
    with safe_open(path, framework="numpy") as file:
        fields = json.loads(_checked(file.metadata(), path, network)["teacher"])
        other = _gaussian(file.get_tensor("other_mean"), file.get_tensor("other_covariance"))
        seen = file.get_tensor("features").astype(np.float32)
        read = file.get_tensor("attributes").astype(np.int64)
    found = Sample(seen, read, fields["grain"], fields["saturation"], fields.get("clipped"))
    return TeacherSample(fields["digest"], fields["steps"], fields["guidance"], fields["seed"], found, other)


def _gaussian(mean: features.Floats, covariance: features.Floats) -> Gaussian:
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _checked(metadata: dict[str, str], path: Path, network: FeatureNetwork) -> dict[str, str]:
    if metadata["network"] != network.digest:
        raise ArtefactRejected(f"{path.name} was made with another feature network; make it again with the present one")
    return metadata
