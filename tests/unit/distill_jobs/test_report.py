"""The report of a sampler: a perfect one scores like real pictures, a bad one fails where it is bad."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_jobs.evaluate import features, reference, report, sample
from distill_jobs.evaluate.questions import Questions, questions
from distill_jobs.evaluate.reference import Reference, kept_answers, teacher_path
from distill_jobs.evaluate.report import Metrics, Sampler
from distill_jobs.teachers.shapes import data
from engines.errors import ArtefactRejected, Diverged, InvalidRequest

N = 400
DIGEST = "ab" * 32
IDENTITY = {"digest": DIGEST, "steps": 32, "guidance": 2.0, "n": N}


class Painter:
    """A stand-in teacher: real pictures of the questions, every fourth caption in wrong colours, with faint grain."""

    def __init__(self, asked: Questions, size: int = 64) -> None:
        self.calls = 0
        drawn = np.concatenate([asked.draw(again, size) for again in (3, 4)]).astype(np.float32)
        wrong = np.arange(len(drawn)) // 2 % 4 == 0
        drawn[wrong] = drawn[wrong][:, [1, 2, 0]]
        self.pictures = drawn + np.random.default_rng(0).normal(0, 0.3, drawn.shape).astype(np.float32)
        self.rows = {seed: row for row, seed in enumerate([*asked.seeds, *asked.other_seeds])}

    def __call__(self, captions: Sequence[str], seeds: Sequence[int], steps: int) -> np.ndarray:
        self.calls += 1
        return self.pictures[[self.rows[seed] for seed in seeds]]


@pytest.fixture(scope="module")
def real() -> Reference:
    return Reference.load()


@pytest.fixture(scope="module")
def asked() -> Questions:
    return questions(N)


@pytest.fixture(scope="module")
def painter(asked: Questions) -> Painter:
    return Painter(asked)


@pytest.fixture(scope="module")
def taught(real: Reference, painter: Painter, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return report.teacher_reference(painter, **IDENTITY, reference=real, folder=tmp_path_factory.mktemp("features"))


def judge(sampler: Sampler, against: Reference, n: int = N, rounds: int = 0) -> Metrics:
    return report.evaluate(sampler, n=n, seed=0, steps=4, reference=against, rounds=rounds)


def test_real_pictures_score_their_own_floor(real: Reference, asked: Questions) -> None:
    drawn = dict(zip(asked.seeds, asked.draw(0, 64), strict=True))
    found = judge(lambda captions, seeds, steps: np.stack([drawn[seed] for seed in seeds]), real)
    assert found.fd == pytest.approx(found.fd_floor, rel=1e-3)
    assert found.alignment > 0.99
    assert found.alignment_heldout == pytest.approx(1, abs=0.02)
    assert found.diversity == pytest.approx(1, rel=1e-3)
    assert found.grain < 0.01
    assert found.fd_ratio is None
    assert found.steps == 4


def test_unseen_combinations_are_scored_apart(real: Reference, asked: Questions) -> None:
    seen = sample.of(asked.draw(0, 64), real.network)
    seen.attributes[asked.heldout] = -2  # the heads never say this
    found = report.measure(seen, asked, steps=4, reference=real)
    assert found.alignment > 0.99
    assert found.alignment_heldout == 0


def test_the_committed_floor_is_what_would_be_measured(real: Reference) -> None:
    asked = questions(500)
    committed, measured = real.baseline(asked), real._measure(asked)
    assert measured.floor == pytest.approx(committed.floor, rel=1e-3)
    assert measured.spread == pytest.approx(committed.spread, rel=1e-3)


def test_the_teacher_equals_itself(taught: Reference, painter: Painter) -> None:
    found = judge(painter, taught)
    ratios = (found.fd_ratio, found.alignment_ratio, found.diversity_ratio, found.grain_ratio, found.saturation_ratio)
    assert ratios == pytest.approx((1,) * 5, abs=2e-3)
    assert found.fd == pytest.approx(report.teacher_metrics(N, 0, taught).fd, rel=1e-3)
    assert found.fd_to_teacher is not None
    assert found.fd_to_teacher < found.fd


def rules_broken(found: Metrics) -> set[str]:
    """By the demo's gate at 4 steps."""
    assert found.fd_ratio is not None
    assert found.alignment_ratio is not None
    assert found.diversity_ratio is not None
    assert found.grain_ratio is not None
    rules = {
        "fd": found.fd_ratio > 1.3,
        "alignment": found.alignment_ratio < 0.93,
        "diversity": found.diversity_ratio < 0.8,
        "grain": found.grain_ratio > 3,
    }
    return {name for name, broken in rules.items() if broken}


def test_one_picture_per_caption_breaks_diversity_alone(taught: Reference, painter: Painter) -> None:
    same = judge(lambda captions, seeds, steps: painter(captions, [seed - seed % 2 for seed in seeds], steps), taught)
    assert rules_broken(same) == {"diversity"}


def test_grain_of_three_levels_breaks_grain_alone(taught: Reference, painter: Painter) -> None:
    rng = np.random.default_rng(0)

    def grainy(captions: Sequence[str], seeds: Sequence[int], steps: int) -> np.ndarray:
        clean = painter(captions, seeds, steps)
        return clean + rng.normal(0, 3, clean.shape).astype(np.float32)

    assert rules_broken(judge(grainy, taught)) == {"grain"}


def test_permuted_captions_break_alignment_alone(taught: Reference, painter: Painter) -> None:
    def permuted(captions: Sequence[str], seeds: Sequence[int], steps: int) -> np.ndarray:
        first = min(painter.rows)
        return painter(captions, [first + (seed - first + N // 2) % N for seed in seeds], steps)

    assert rules_broken(judge(permuted, taught)) == {"alignment"}


def test_noise_breaks_fd(taught: Reference) -> None:
    rng = np.random.default_rng(0)
    found = judge(lambda captions, *_: rng.integers(0, 256, (len(captions), 3, 64, 64), dtype=np.uint8), taught)
    assert found.fd_ratio is not None
    assert found.fd_ratio > 10
    assert rules_broken(found) >= {"fd", "alignment", "grain"}


def test_a_short_evaluation_uses_part_of_the_teachers_pictures(taught: Reference, painter: Painter) -> None:
    found = judge(painter, taught, n=100)
    assert found.fd_ratio == pytest.approx(1, abs=2e-3)
    with pytest.raises(InvalidRequest, match="n = 400 of seed 0"):
        judge(Painter(questions(N + 2)), taught, n=N + 2)


def test_the_teacher_is_asked_once(real: Reference, painter: Painter, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = report.teacher_reference(
        painter, **IDENTITY, reference=real, folder=tmp_path, progress=lambda *done: seen.append(done)
    )
    calls = painter.calls
    second = report.teacher_reference(painter, **IDENTITY, reference=real, folder=tmp_path)
    assert painter.calls == calls
    assert seen[-1] == (2 * N, 2 * N)
    assert first.teacher is not None
    assert second.teacher is not None
    np.testing.assert_allclose(first.teacher.sample.features, second.teacher.sample.features, atol=0.02)
    assert second.teacher.sample.grain == first.teacher.sample.grain
    (path,) = tmp_path.iterdir()
    assert path.name == "features-abababababab-32-2-400.safetensors"
    assert Reference.load(path).teacher is not None


def test_features_of_another_network_are_refused(real: Reference, taught: Reference, tmp_path: Path) -> None:
    assert taught.teacher is not None
    other = features.FeatureNetwork(features.FeatureNet(real.task.classes), real.task, digest="other")
    reference.save_teacher(tmp_path / "t.safetensors", taught.teacher, other)
    with pytest.raises(ArtefactRejected, match="another feature network"):
        Reference.load(tmp_path / "t.safetensors")


def test_a_reference_without_teacher_has_no_teacher_figures(real: Reference) -> None:
    with pytest.raises(InvalidRequest, match="no teacher"):
        report.teacher_metrics(10, 0, real)


def test_pictures_that_are_no_numbers_are_divergence(real: Reference) -> None:
    with pytest.raises(Diverged):
        judge(lambda captions, *_: np.full((len(captions), 3, 64, 64), np.nan, dtype=np.float32), real, n=8)


@pytest.mark.parametrize("shape", [(3, 3, 64, 64), (8, 64, 64, 3), (8, 3, 64)])
def test_a_sampler_that_answers_in_another_shape_is_refused(real: Reference, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest):
        judge(lambda *_: np.zeros(shape, dtype=np.uint8), real, n=8)


def test_progress_counts_to_the_end(real: Reference) -> None:
    done: list[int] = []
    pictures = data.sample(4, 0).pixels
    report.evaluate(
        lambda captions, *_: pictures[: len(captions)],
        n=10,
        seed=0,
        steps=1,
        reference=real,
        batch=4,
        progress=lambda part, total: done.append(part) if total == 10 else None,
    )
    assert done == [4, 8, 10]


def test_batches_do_not_change_the_figures(real: Reference, painter: Painter, asked: Questions) -> None:
    whole = report.measure(sample.of(painter([], asked.seeds, 4), real.network), asked, steps=4, reference=real)
    parts = report.evaluate(painter, n=N, seed=0, steps=4, reference=real, batch=37)
    for name in ("fd", "fd_floor", "alignment", "diversity", "grain", "saturation"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4), name


def test_a_quick_evaluation_has_the_same_figures_without_intervals(taught: Reference, painter: Painter) -> None:
    whole, quick = judge(painter, taught, n=100, rounds=20), judge(painter, taught, n=100)
    assert (quick.fd_ci, quick.fd_ratio_ci) == (None, None)
    assert whole.fd_ci is not None
    assert whole.fd_ci[0] < whole.fd < whole.fd_ci[1]
    left_out = ("fd_ci", "fd_ratio_ci", "precision", "recall", "density", "coverage")
    assert quick == whole.model_copy(update=dict.fromkeys(left_out))


def test_real_pictures_are_precise_and_cover_real_ones(real: Reference, asked: Questions) -> None:
    drawn = dict(zip(asked.seeds, asked.draw(0, 64), strict=True))
    found = judge(lambda captions, seeds, steps: np.stack([drawn[seed] for seed in seeds]), real, n=200, rounds=2)
    assert found.density == pytest.approx(1, abs=0.3)
    assert min(found.precision or 0, found.recall or 0, found.coverage or 0) > 0.7


def test_noise_is_nowhere_near_real_pictures(real: Reference) -> None:
    rng = np.random.default_rng(0)
    noise = lambda captions, *_: rng.integers(0, 256, (len(captions), 3, 64, 64), dtype=np.uint8)  # noqa: E731
    found = judge(noise, real, n=100, rounds=2)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)
    assert found.clipped == pytest.approx(2 / 256, rel=0.05)


def test_metrics_survive_json() -> None:
    found = Metrics(
        n=1,
        seed=0,
        steps=4,
        fd=1.0,
        fd_ci=(0.9, 1.1),
        fd_floor=0.5,
        alignment=0.9,
        alignment_heldout=None,
        alignment_real=1.0,
        diversity=1.0,
        grain=0.1,
        saturation=10.0,
    )
    assert Metrics.model_validate_json(found.model_dump_json()) == found


def test_answers_to_more_questions_serve_for_fewer_and_the_fewest_are_taken(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"steps": 32, "guidance": 2.0}
    for n in (400, 2000, 10_000):
        teacher_path(tmp_path, "a" * 64, **asked, n=n).touch()
    teacher_path(tmp_path, "a" * 64, steps=16, guidance=2.0, n=500).touch()
    found = [kept_answers([tmp_path], "a" * 64, **asked, n=n) for n in (400, 401, 10_001)]
    assert [path and path.name.rpartition("-")[2] for path in found] == ["400.safetensors", "2000.safetensors", None]
