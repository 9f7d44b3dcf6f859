"""Forgetting while distilling: teachers are asked for the replacement, students read the prompt.

The truth is known: a Gaussian student forgets condition A when it answers A with the teacher's guided Gaussian of B.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import forgetting, times
from distill_jobs.batches import Batch, TensorSource, WeightedSource, take
from distill_jobs.data import prompts
from distill_jobs.forgetting import Forget
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.roles import Cast, Role
from distill_jobs.stage import Stage, StageRun
from distill_jobs.teachers import diffusers
from engines.denoiser import Denoiser, Forgetting, Guided
from engines.errors import InvalidRequest
from engines.manifest import Kind
from engines.process import RF, Process
from tests import tiny_sd
from tests.unit.distill_jobs.closed_form import (
    GUIDED_MEAN,
    MEAN,
    NULL_MEAN,
    SHAPE,
    STD,
    W,
    batch_of,
    data_of,
    exact_pairs,
    fake_of,
    over,
    student_of,
    teacher_of,
)
from tests.unit.distill_jobs.oracle import RUNGS, every_kind, every_process, top

A = 3.0  # what is to be forgotten; MEAN stands in its place
GUIDED_A = NULL_MEAN + W * (A - NULL_MEAN)
RED = (Forget(concept="red", instead="blue"),)


# words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a red circle", "a blue circle"),
        ("Red on RED", "blue on blue"),
        ("a bored, reddish infrared one", "a bored, reddish infrared one"),
        ("a red-hot ring, red", "a blue-hot ring, blue"),
        ("", ""),
    ],
)
def test_a_concept_is_replaced_as_a_whole_word_in_any_case(text: str, asked: str) -> None:
    assert forgetting.instead(text, RED) == asked


def test_several_words_are_one_concept_however_they_are_spaced() -> None:
    rules = (Forget(concept="red  ring", instead="green cross"),)
    assert forgetting.instead("a red\n ring above a red circle", rules) == "a green cross above a red circle"


def test_what_has_no_replacement_is_asked_for_without_a_condition() -> None:
    rules = (*RED, Forget(concept="ring"))
    assert forgetting.instead("a red ring", rules) is None
    assert forgetting.instead("a red cross", rules) == "a blue cross"


@pytest.mark.parametrize("turned", [False, True])
def test_no_order_of_the_rules_has_the_teacher_draw_what_is_to_be_forgotten(turned: bool) -> None:
    """`red` put in blue makes a blue ring of a red one."""
    told = (*RED, Forget(concept="blue ring", instead="green square"))
    rules = told[::-1] if turned else told
    forgetting.check(rules)
    assert forgetting.instead("a red ring", rules) is None
    assert forgetting.instead("a red ring, a blue ring", rules) is None
    assert forgetting.instead("a red cross, a blue ring", rules) == "a blue cross, a green square"


def test_a_replacement_is_text_and_no_pattern() -> None:
    assert forgetting.instead("a c++ logo", (Forget(concept="c++", instead=r"\1 $&"),)) == r"a \1 $& logo"


# conditions ----------------------------------------------------------------------------------------------------------


def test_a_teacher_is_asked_with_the_replacement_and_everybody_else_with_the_prompt() -> None:
    batch, t = batch_of(4), torch.full((4,), 0.5, dtype=torch.float64)
    cond = Forgetting(torch.full_like(batch.cond, A), batch.cond)
    teacher = forgetful(RF(), "flow")
    assert torch.equal(teacher(batch.noise, t, cond)[0], teacher_of(RF(), "flow")(batch.noise, t, batch.cond)[0])
    assert torch.equal(teacher.denoiser(batch.noise, t, cond)[0], teacher.denoiser(batch.noise, t, batch.cond)[0])
    student = student_of(RF(), "flow")
    assert torch.equal(student(batch.noise, t, cond)[0], student(batch.noise, t, cond.cond)[0])


def test_a_critic_that_begins_as_the_teacher_reads_what_the_student_reads() -> None:
    teacher = forgetful(RF(), "flow")
    cast = Cast.build(teacher, student_of(RF(), "flow"), {"fake": Role(), "student": Role(init="student")})
    batch, t = batch_of(4), torch.full((4,), 0.5, dtype=torch.float64)
    cond = Forgetting(torch.full_like(batch.cond, A), batch.cond)
    assert torch.equal(cast["fake"](batch.noise, t, cond)[0], teacher.denoiser(batch.noise, t, cond.cond)[0])
    assert torch.equal(cast.teacher(batch.noise, t, cond)[0], teacher(batch.noise, t, batch.cond)[0])


def test_rows_keep_both_conditions_when_they_are_taken_apart_and_weighted() -> None:
    source = TensorSource(Forgetting(torch.arange(4.0), torch.arange(4.0) + 10), SHAPE)
    cond = take(WeightedSource(source, 1.0, 2.0).rows(0, 4).cond, torch.tensor([2])).cond
    assert float(cond.instead - cond.cond) == 10


# methods -------------------------------------------------------------------------------------------------------------


def forgetful(process: Process, kind: Kind) -> Guided:
    right = teacher_of(process, kind)
    right.denoiser.reads_instead = True
    return Guided(right.denoiser, right.null_cond, right.w)


def forgetting_batch(process: Process, kind: Kind, *, swapped: bool = False) -> Batch:
    """Rows of A whose teacher is asked for MEAN; x and pair are of the teacher that is asked so."""
    noise = batch_of().noise
    pair = exact_pairs(process, noise, times.grid(process, tuple(top(kind) * u for u in RUNGS))[:-1])
    batch = batch_of(x=data_of(), pair=pair)
    named = torch.full_like(batch.cond, A)
    cond = Forgetting(batch.cond, named) if swapped else Forgetting(named, batch.cond)
    return replace(batch, rows=replace(batch.rows, cond=cond))


def loss(
    name: str, process: Process, kind: Kind, *, mean: float = GUIDED_MEAN, swapped: bool = False, deaf: bool = False
) -> float:
    """Of a student that answers A with N(mean, STD^2). A `deaf` teacher is asked with the prompt itself."""
    preset = resolve(name)
    asked = {"top": top(kind), "substeps": 8, "delta": 0.01, "rungs": tuple(top(kind) * u for u in RUNGS)}
    known = {key: asked[key] for key in ("rungs",) if name == "kd"}
    known |= {key: value for key, value in asked.items() if key in preset.method.Config.model_fields and key != "rungs"}
    player = student_of(process, kind, shift=mean - A, reads_s=name not in ("lcm", "cd"))
    config = preset.config(known)
    others = {role: player for role in preset.method.roles(config) if role != "student"}
    teacher = teacher_of(process, kind) if deaf else forgetful(process, kind)
    one = preset.method(Cast(teacher, student=player, **others), config)
    return float(sum(one.loss("student", forgetting_batch(process, kind, swapped=swapped)).values()))


@every_kind
@every_process
@pytest.mark.parametrize("name", ["kd", "lcm"])
def test_a_student_that_has_forgotten_is_at_rest_and_one_that_has_not_is_not(
    name: str, process: Process, kind: Kind
) -> None:
    right = loss(name, process, kind)
    assert right < 5e-5
    assert loss(name, process, kind, mean=GUIDED_A) > 5e-3 + 50 * right


@pytest.mark.parametrize("name", ["lcm", "cd", "pcm", "tdd", "lsd", "tcd", "shortcut"])
def test_swapped_conditions_and_a_teacher_that_reads_the_prompt_fail_with_every_method(name: str) -> None:
    right = loss(name, RF(), "flow")
    assert loss(name, RF(), "flow", swapped=True) > 50 * right
    assert loss(name, RF(), "flow", deaf=True) > 50 * right


def score_gradient(name: str, mean: float, *, swapped: bool = False) -> float:
    """d loss / d mean of a student N(mean, STD^2) of A with its exact critic, over some batches."""
    cast = Cast(
        forgetful(RF(), "flow"),
        student=student_of(RF(), "flow", shift=mean - A, reads_s=False),
        fake=fake_of(RF(), "flow", shift=mean - A),
    )
    one = resolve(name).method(cast, resolve(name).config({"counts": (1,)}))
    with cast.only("student") as student:
        for seed in range(4):
            batch = batch_of(256, seed)
            named = torch.full_like(batch.cond, A)
            cond = Forgetting(batch.cond, named) if swapped else Forgetting(named, batch.cond)
            losses = one.loss("student", replace(batch, rows=replace(batch.rows, cond=cond)))
            torch.autograd.backward(list(losses.values()))
    found: Any = student
    return float(found.net.shift.grad)


@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_score_matching_leads_from_the_concept_to_its_replacement_and_rests_there(name: str) -> None:
    away = score_gradient(name, GUIDED_A)
    assert away > 0.05  # downhill is from GUIDED_A down to GUIDED_MEAN
    assert abs(score_gradient(name, GUIDED_MEAN)) < 0.01 * away
    assert abs(score_gradient(name, GUIDED_MEAN, swapped=True)) > 0.5 * away


class Table(nn.Module):
    """The endpoint map of N(mean of the condition, STD^2) for two conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor([GUIDED_A, GUIDED_MEAN]))  # as the teacher that knows both

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Any, w: Any) -> Tensor:
        mean, t = over(torch.where(cond == A, self.means[0], self.means[1])), over(t)
        x0 = mean + STD / ((1 - t) ** 2 * STD**2 + t**2).sqrt() * (x - (1 - t) * mean)
        return (x - x0) / t


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kd", {"pairs": 512, "teacher_solver": "ab2"}),
        ("lcm", {"generate": 512, "rungs": 8, "skip": 1, "substeps": 4, "keep": 0.5}),
    ],
)
def test_training_moves_the_concept_and_leaves_the_other_prompts(name: str, settings: dict[str, Any]) -> None:
    named = torch.tensor([A, MEAN]).repeat(32)
    source = TensorSource(Forgetting(named, torch.full_like(named, MEAN)), SHAPE)
    told = {"counts": (1,), "lr": 1e-1, "batch": 128, **settings}
    student = Denoiser(Table(), RF(), "flow")
    run = StageRun(0, Stage(name, 200, told), forgetful(RF(), "flow").float(), student, ema=(0.9,))
    assert run.method.prepare(source, Workspace())
    while not run.done:
        run.iterate(source)
    assert run.averages[0].weights["net.means"].tolist() == pytest.approx([GUIDED_MEAN, GUIDED_MEAN], abs=0.06)


# sources -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> diffusers.Teacher:
    tiny = tiny_sd.teacher()
    return diffusers.load(tiny.registry, tiny.version)


TEXTS = ("a red circle", "a blue square", "two shapes on white", "the small circle")


def test_rows_bring_the_prompt_and_what_the_teacher_is_asked(teacher: diffusers.Teacher, tmp_path: Path) -> None:
    rules = (*RED, Forget(concept="two shapes"))
    source = prompts.forgetting(teacher, prompts.encoded(teacher, TEXTS, tmp_path, seed=3), rules, tmp_path)
    assert isinstance(source, prompts.ForgettingSource)
    asked = {"a red circle": teacher.encode(["a blue circle"]), "two shapes on white": teacher.null()}
    for position in range(3):
        cond = source.rows(position, 3).cond
        for i, text in enumerate(source.source.captions(position, 3)):
            torch.testing.assert_close(cond.cond[i], teacher.encode([text])[0])
            torch.testing.assert_close(cond.instead[i], asked.get(text, teacher.encode([text]))[0])


def test_a_concept_that_no_prompt_names_is_refused(teacher: diffusers.Teacher, tmp_path: Path) -> None:
    source = prompts.encoded(teacher, TEXTS, tmp_path)
    with pytest.raises(InvalidRequest, match="names 'purple'") as refusal:
        prompts.forgetting(teacher, source, (*RED, Forget(concept="purple")), tmp_path)
    assert refusal.value.param == "student.forget"


def test_the_network_of_a_loaded_teacher_reads_the_replacement_and_its_beginner_the_prompt(
    teacher: diffusers.Teacher,
) -> None:
    assert teacher.guided(1.0).reads_instead
    assert teacher.guided(2.0).reads_instead
    assert not teacher.beginner(frozenset()).reads_instead
