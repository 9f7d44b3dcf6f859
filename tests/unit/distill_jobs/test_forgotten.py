"""Judging students that forget: what is left of the concept is one figure, and all others are of the other prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distill_jobs.evaluate.forgotten import Forgotten, forgotten
from distill_jobs.evaluate.questions import Questions, questions
from distill_jobs.evaluate.reference import Reference
from distill_jobs.evaluate.report import Metrics, Sampler, evaluate, measure, teacher_metrics, teacher_reference
from distill_jobs.evaluate.sample import Sample
from distill_jobs.forgetting import Forget
from distill_jobs.gate import judge
from distill_jobs.spec import GateSpec, parse, preset
from distill_jobs.teachers.shapes import data
from engines.errors import InvalidRequest

N = 400
RED, BLUE = data.COLOURS.index("red"), data.COLOURS.index("blue")
COLOURED = [i for i, name in enumerate(data.ATTRIBUTES) if name.startswith("colour")]
RULES = (Forget(concept="red", instead="blue"),)
GATES: GateSpec = parse(preset("shapes-fast")).gates


@pytest.fixture(scope="module")
def asked() -> Questions:
    return questions(N)


def recoloured(attributes: np.ndarray) -> np.ndarray:
    found = attributes.copy()
    cells = found[:, COLOURED]
    found[:, COLOURED] = np.where(cells == RED, BLUE, cells)
    return found


def test_what_is_left_is_the_share_of_mentions_that_still_show_the_concept(asked: Questions) -> None:
    assert forgotten(asked.attributes, asked, RULES) == Forgotten(concept=1.0, instead=0.0)
    assert forgotten(recoloured(asked.attributes), asked, RULES) == Forgotten(concept=0.0, instead=1.0)
    found = asked.attributes.copy()
    rows, columns = np.nonzero(asked.attributes[:, COLOURED] == RED)
    found[rows[::4], np.array(COLOURED)[columns[::4]]] = BLUE
    assert forgotten(found, asked, RULES).concept == pytest.approx(0.75, abs=0.02)


def test_what_pictures_of_other_prompts_show_is_nothing_left(asked: Questions) -> None:
    found = np.where(asked.attributes == RED, asked.attributes, RED)
    found[:, COLOURED] = np.where(asked.attributes[:, COLOURED] == RED, BLUE, found[:, COLOURED])
    assert forgotten(found, asked, RULES) == Forgotten(concept=0.0, instead=1.0)


@pytest.mark.parametrize("concept", ["red circle", "a cat"])
def test_words_that_no_head_reads_are_not_measured(asked: Questions, concept: str) -> None:
    rules = (Forget(concept=concept, instead="blue"),)
    assert forgotten(asked.attributes, asked, rules) == Forgotten(concept=None, instead=None)


def test_a_concept_without_a_replacement_has_no_share_of_it(asked: Questions) -> None:
    assert forgotten(asked.attributes, asked, (Forget(concept=" RED "),)) == Forgotten(concept=1.0, instead=None)


# pictures ------------------------------------------------------------------------------------------------------------


def painted(asked: Questions, again: int, *, blue: bool) -> Sampler:
    """Real pictures of the questions, with blue shapes for red ones where it is asked for."""
    scenes = [
        replace(scene, shapes=tuple(replace(s, colour=BLUE if blue and s.colour == RED else s.colour) for s in shapes))
        for scene, shapes in ((scene, scene.shapes) for scene in asked.scenes)  # type: ignore[attr-defined]
    ]
    drawn = asked.task.draw([*scenes, *scenes], again, 64).pixels
    rows = {seed: row for row, seed in enumerate([*asked.seeds, *asked.other_seeds])}

    def answer(captions: Sequence[str], seeds: Sequence[int], steps: int) -> np.ndarray:
        return drawn[[rows[seed] for seed in seeds]]

    return answer


@pytest.fixture(scope="module")
def taught(asked: Questions, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A teacher that draws what it is asked."""
    teacher = painted(asked, 3, blue=False)
    folder = tmp_path_factory.mktemp("answers")
    return teacher_reference(
        teacher, digest="ab" * 32, steps=32, guidance=2.0, n=N, reference=Reference.load(), folder=folder
    )


@pytest.fixture(scope="module")
def reference(taught: Reference) -> Reference:
    return taught.forgetting(RULES, pictures=2500)


def judged(sampler: Sampler, against: Reference) -> Metrics:
    return evaluate(sampler, n=N, seed=0, steps=4, reference=against, rounds=0)


def test_a_student_that_draws_the_replacement_keeps_every_rule(asked: Questions, reference: Reference) -> None:
    found = judged(painted(asked, 4, blue=True), reference)
    assert found.alignment_forgotten == pytest.approx(0, abs=0.02)
    assert found.alignment_instead == pytest.approx(1, abs=0.02)
    assert found.n == sum("red" not in caption.split() for caption in asked.captions) < N
    assert judge(GATES, {4: found}, forgets=True).failures == ()


def test_a_student_that_still_draws_the_concept_fails_that_rule_alone(asked: Questions, reference: Reference) -> None:
    found = judged(painted(asked, 4, blue=False), reference)
    assert found.alignment_forgotten == pytest.approx(1, abs=0.02)
    assert [result.rule for result in judge(GATES, {4: found}, forgets=True).failures] == ["alignment_forgotten"]


def test_what_is_kept_is_compared_with_real_pictures_without_the_concept(
    asked: Questions, reference: Reference, taught: Reference
) -> None:
    perfect = painted(asked, 4, blue=True)
    found = judged(perfect, reference)
    assert found.fd == pytest.approx(found.fd_floor, rel=0.1)
    assert found.fd_ratio == pytest.approx(1, abs=0.1)
    with_red = Reference(taught.network, taught.real, taught.size, taught.teacher, RULES)
    assert judged(perfect, with_red).fd > found.fd + 2


def test_answers_to_prompts_of_the_concept_move_no_figure_of_what_is_kept(
    asked: Questions, reference: Reference
) -> None:
    assert reference.teacher is not None
    seen: Sample = reference.teacher.sample
    named = np.array(["red" in caption.split() for caption in asked.captions])
    spoilt = replace(seen, features=np.where(named[:, None], 9.0, seen.features), attributes=seen.attributes.copy())
    spoilt.attributes[named] = 0
    own, other = (measure(one, asked, steps=32, reference=reference, rounds=0) for one in (seen, spoilt))
    left = {"alignment_forgotten", "alignment_instead"}
    assert own.model_dump(exclude=left) == other.model_dump(exclude=left)
    assert own.fd_ratio == pytest.approx(1)


def test_the_teacher_has_the_same_figures_beside_the_student(reference: Reference) -> None:
    found = teacher_metrics(N, 0, reference)
    assert found.alignment_forgotten == pytest.approx(1, abs=0.02)
    assert found.alignment_instead == pytest.approx(0, abs=0.02)
    assert found.fd_ratio is None


def test_figures_of_one_concept_are_not_compared_with_those_of_another(taught: Reference, reference: Reference) -> None:
    assert taught.forgetting(()) is taught
    assert taught.digest == taught.network.digest
    assert len({taught.digest, reference.digest}) == 2


def test_too_few_other_prompts_are_refused(taught: Reference) -> None:
    rules = tuple(Forget(concept=colour) for colour in data.COLOURS)
    against = Reference(taught.network, taught.real, taught.size, taught.teacher, rules)
    with pytest.raises(InvalidRequest, match="only 0 name nothing to forget"):
        against.kept(questions(64))


def test_answers_that_are_kept_are_those_of_the_same_questions(
    asked: Questions, taught: Reference, tmp_path: Path
) -> None:
    part = taught.forgetting(()).kept(asked)
    assert part is asked
    index = np.array([4, 5, 9])
    some = asked.part(index)
    assert [some.captions, some.seeds] == [[asked.captions[i] for i in index], [asked.seeds[i] for i in index]]
    assert some.groups.tolist() == [0, 0, 1]
    assert some.rows.tolist() == [4, 5, 9]
