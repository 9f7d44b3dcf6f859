"""What an assessor keeps of teachers at few steps, and that no other question is answered with it."""

from pathlib import Path

import pytest

from distill_jobs.assessment import Assessor, Forgets, TeacherAs
from distill_jobs.evaluate.reference import Reference
from distill_jobs.evaluate.report import Metrics
from distill_jobs.forgetting import Forget
from engines.backends.base import Choice
from tests import tiny_sd

N = 48
FORGET = (Forget(concept="red", instead="blue"),)


class Quick(Assessor):
    """Real pictures without a concept are drawn for every such reference: a few are enough to tell figures apart."""

    def reference(self, teacher: TeacherAs, n: int, forget: Forgets = (), networks: tuple[str, ...] = ()) -> Reference:
        return Reference.load(self.features_file(teacher, n), task=teacher.task).forgetting(forget, pictures=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("assessment")


class Stopped(Exception):
    """What stops an assessor's work."""


def at(folder: Path, *, n: int = N, guidance: float = 3.0, forget: Forgets = ()) -> dict[int, Metrics]:
    """The tiny teacher at 1, 4 and 9 steps, asked by an assessor that knows only what is in `folder`."""
    tiny = tiny_sd.teacher()
    made = Quick(tiny.registry, choice=Choice("eager", "fp32"), cache=folder / "engines", answers=folder / "answers")
    return made.teacher_at(TeacherAs.of(tiny.manifest, steps=4, guidance=guidance), n, (1, 4, 9), forget)


def test_a_teacher_at_few_steps_is_asked_once(folder: Path) -> None:
    first = at(folder)
    assert first.keys() == {1, 4}  # those that it was made for
    (kept,) = (folder / "answers").glob("few-steps-*.json")
    grain = first[1].grain
    kept.write_text(kept.read_text().replace(f'"grain": {grain}', f'"grain": {grain + 7}'))
    assert at(folder) == {1: first[1].model_copy(update={"grain": grain + 7}), 4: first[4]}


def test_figures_of_a_student_that_forgets_are_not_those_of_one_that_does_not(folder: Path) -> None:
    plain, forgetting = at(folder), at(folder, forget=FORGET)
    assert forgetting[4].n < plain[4].n == N
    assert forgetting[4].alignment_forgotten is not None
    assert (at(folder), at(folder, forget=FORGET)) == (plain, forgetting)


def test_figures_of_other_questions_and_of_another_guidance_are_not_taken(folder: Path) -> None:
    plain = at(folder)
    assert at(folder, n=N // 2)[4].n == N // 2
    assert at(folder, guidance=1.0)[4].fd != plain[4].fd
    assert at(folder) == plain


def test_the_intervals_of_every_figure_can_be_stopped(folder: Path) -> None:
    """Pictures are few, and so are their batches: by the fortieth time it is asked, resampling is all that is left."""
    tiny, asked = tiny_sd.teacher(), [0]

    def check() -> None:
        asked[0] += 1
        if asked[0] % 40 == 0:
            raise Stopped

    choice, cache = Choice("eager", "fp32"), folder / "engines"
    made = Quick(tiny.registry, choice=choice, cache=cache, answers=folder / "answers", check=check)
    reference = made.reference(TeacherAs.of(tiny.manifest, steps=4, guidance=3.0), N)
    with pytest.raises(Stopped):
        made.teacher_metrics(N, reference)
    with pytest.raises(Stopped):
        made.metrics(tiny.version, N, reference, (1,))
