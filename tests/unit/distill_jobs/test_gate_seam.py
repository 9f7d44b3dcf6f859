"""Three ways to cheat over good pictures, at the evaluation's sampler seam: each fails exactly the rule made for it.

The teacher here is real pictures, slightly blurred: as good as a teacher can be without being perfect.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from distill_jobs.evaluate.questions import SEEDS_PER_CAPTION, Questions, questions
from distill_jobs.evaluate.reference import Reference
from distill_jobs.evaluate.report import Sampler, evaluate, teacher_reference
from distill_jobs.gate import judge
from distill_jobs.spec import GateSpec, parse, preset

N = 500
GATES: GateSpec = parse(preset("shapes-fast")).gates
STEPS = 1
Floats = npt.NDArray[np.float32]


def blurred(pictures: npt.NDArray[np.uint8]) -> Floats:
    x = pictures.astype(np.float32)
    for axis in (2, 3):
        x = 0.25 * np.roll(x, 1, axis) + 0.5 * x + 0.25 * np.roll(x, -1, axis)
    return x


def answering(asked: Questions, pictures: Floats) -> Sampler:
    """Answers each question by its seed."""
    row = {seed: i for seeds in (asked.seeds, asked.other_seeds) for i, seed in enumerate(seeds)}
    return lambda captions, seeds, steps: pictures[[row[seed] for seed in seeds]]


@pytest.fixture(scope="module")
def asked() -> Questions:
    return questions(N, 0)


@pytest.fixture(scope="module")
def good(asked: Questions) -> Floats:
    return blurred(asked.draw(2, Reference.load().size))


@pytest.fixture(scope="module")
def reference(asked: Questions, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    bare = Reference.load()
    teacher = answering(asked, blurred(asked.draw(1, bare.size)))
    folder = tmp_path_factory.mktemp("answers")
    return teacher_reference(teacher, digest="0" * 64, steps=1, guidance=1.0, n=N, reference=bare, folder=folder)


def one_seed_per_caption(pictures: Floats) -> Floats:
    return np.repeat(pictures[::SEEDS_PER_CAPTION], SEEDS_PER_CAPTION, axis=0)


def captions_permuted(pictures: Floats) -> Floats:
    return np.roll(pictures, 7 * SEEDS_PER_CAPTION, axis=0)


def grain_added(pictures: Floats) -> Floats:
    noise = np.random.default_rng(0).standard_normal(pictures.shape).astype(np.float32)
    return np.clip(pictures + 3 * noise, 0, 255)


def as_it_is(pictures: Floats) -> Floats:
    return pictures


CHEATS: Sequence[tuple[Callable[[Floats], Floats], list[str]]] = (
    (as_it_is, []),
    (one_seed_per_caption, ["diversity_ratio"]),
    (captions_permuted, ["alignment_ratio"]),
    (grain_added, ["grain_ratio"]),
)


@pytest.mark.parametrize(("cheat", "broken"), CHEATS, ids=[cheat.__name__ for cheat, _ in CHEATS])
def test_a_cheat_fails_exactly_its_rule(
    cheat: Callable[[Floats], Floats], broken: list[str], asked: Questions, good: Floats, reference: Reference
) -> None:
    metrics = evaluate(answering(asked, cheat(good)), n=N, seed=0, steps=STEPS, reference=reference)
    assert [result.rule for result in judge(GATES, {STEPS: metrics}).failures] == broken
