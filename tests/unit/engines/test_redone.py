"""The cascade: what a teacher doubts by hand, what is kept and what is redone, and the share that may be."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from engines import refine, solvers
from engines.calibration import LEAST, calibrate, spearman, thresholds
from engines.errors import ContradictoryFields, InvalidRequest
from engines.manifest import REDO_SHARES, Judge, StudentManifest
from engines.noise import noise
from engines.redone import Redone, doubt
from engines.refine import FIRST_STEP, REDO, Refinement
from engines.solvers import State
from engines.student import Aid, LoadedStudent, sample
from tests.unit.server import toy

TEACHER = toy.manifest("teacher", weights="t", guided=True, counts=(1, 2, 4, 8))
PROMPTS, SEEDS = ["a red circle", "a ring", "two", "a blue square"], [7, 8, 9, 10]


def judge(*thresholds: float, steps: int = 8) -> Judge:
    """Of the same doubt at every share, per step count 1, 2 and 4."""
    found = thresholds * 3 if len(thresholds) == 1 else thresholds
    return Judge(steps=steps, doubts={k: (at,) * 10 for k, at in zip((1, 2, 4), found, strict=True)})


def student(of: Judge | None = None, **options: Any) -> StudentManifest:
    made = toy.manifest("student", **{"base": TEACHER.version, **options})
    return made if of is None else made.judged(of)


def pair(at: float, *, teachers: str = "dpmpp_2m", eta: float = 0.0) -> tuple[LoadedStudent, LoadedStudent]:
    """A student whose judge redoes what is doubted more than `at`, and its teacher."""
    teacher = toy.student(
        toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True, counts=(1, 2, 4, 8), solver=teachers
    )
    made = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version, eta=eta)
    return replace(made, manifest=made.manifest.judged(judge(at))), teacher


def test_the_student_s_picture_is_noised_to_the_middle_of_the_teacher_s_schedule() -> None:
    plan = refine.plan(student(judge(1.0)), TEACHER, 2, None, Refinement("redo", 0.3))
    assert [(step.t, step.s, step.w, step.eta, step.by_teacher, step.share) for step in plan] == [
        (1.0, 0.5, None, 0.0, False, 1.0),
        (0.5, 0.5, None, 1.0, False, 1.0),
        (0.5, 0.375, 2.0, 0.0, True, 1.0),
        (0.375, 0.25, 2.0, 0.0, True, 0.3),
        (0.25, 0.125, 2.0, 0.0, True, 0.3),
        (0.125, 0.0, 2.0, 0.0, True, 0.3),
    ]


def test_what_is_not_judged_is_not_redone() -> None:
    with pytest.raises(InvalidRequest, match="has no judge for its 2 steps: `fewstep students calibrate`") as caught:
        refine.plan(student(), TEACHER, 2, None, REDO)
    assert caught.value.param == "refine"
    with pytest.raises(InvalidRequest, match="judged at 16 steps of its teacher"):
        refine.plan(student(judge(1.0, steps=16)), TEACHER, 2, None, REDO)


def test_a_share_goes_with_redo_alone() -> None:
    assert refine.asked("redo", None) == REDO
    assert refine.asked("redo", 0.1) == Refinement("redo", 0.1)
    assert (refine.asked(None, None), refine.asked("first_step", None)) == (None, FIRST_STEP)
    with pytest.raises(ContradictoryFields, match=r"redo_share=0\.1") as caught:
        refine.asked("first_step", 0.1)
    assert caught.value.param == "redo_share"


def test_the_doubt_is_the_mean_square_of_what_the_teacher_would_change() -> None:
    picture = torch.zeros(2, 3, 2, 2)
    estimate = torch.tensor([0.5, -2.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    assert doubt(picture, estimate).tolist() == [0.25, 4.0]
    video = picture[:, :, None].repeat(1, 1, 5, 1, 1)
    assert doubt(video, estimate[:, :, None]).tolist() == [0.25, 4.0]


def test_a_row_that_is_not_doubted_enough_ends_as_it_was() -> None:
    """One step to 0.6 of a point, noised to t = 1/2; the teacher says 0.5: a doubt of 0.01."""
    teacher = refine.plan(student(judge(0.0)), TEACHER, 1, None, REDO)
    own, theirs = [replace(teacher[0], s=0.0, eta=0.0)], teacher[1:]
    process = toy.student().process
    for threshold, kept in ((0.02, True), (0.005, False)):
        first, second = (solvers.make("ddim", process, "x0", plan) for plan in (own, theirs))
        rule = Redone(first, second, teacher, threshold)
        fresh = torch.randn(1, 1, 2, 2)
        noised = rule.advance(State(torch.randn(1, 1, 2, 2), 0), torch.full((1, 1, 2, 2), 0.6), fresh)
        assert torch.allclose(noised.x, 0.5 * 0.6 + 0.5 * fresh)
        assert rule.settle(noised) is noised
        asked = rule.advance(noised, torch.full((1, 1, 2, 2), 0.5))
        assert asked.history[1].item() == pytest.approx(0.01)
        row = rule.settle(State(asked.x[0], asked.i, tuple(part[0] for part in asked.history)))
        assert rule.done(row) == kept
        assert torch.equal(row.x, torch.full((1, 2, 2), 0.6)) == kept
        assert kept or (row.i, row.history) == (2, ())


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_kept_pictures_are_the_student_s_own_and_the_others_the_teacher_s_second_half(steps: int, eta: float) -> None:
    made, teacher = pair(0.0, eta=eta)
    own = sample(made, PROMPTS, SEEDS, steps, rounded=False)
    all_redone = sample(made, PROMPTS, SEEDS, steps, aid=Aid(teacher, REDO), rounded=False)
    kept, _ = pair(1e9, eta=eta)
    assert torch.equal(sample(kept, PROMPTS, SEEDS, steps, aid=Aid(teacher, REDO), rounded=False), own)

    rule = solvers.make("dpmpp_2m", teacher.process, "flow", teacher.manifest.plan(8)[4:])
    alone = made.solver(steps)
    for k, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        cond = made.family.encode([prompt])
        state = alone.start(noise(seed, 0, made.latent_shape)[None])
        while not alone.done(state):
            fresh = noise(seed, state.i + 1, made.latent_shape)[None] if alone.needs_noise(state) else None
            state = alone.advance(state, asked(made, state, alone, cond, None), fresh)
        x = solvers.renoise(made.process, state.x, noise(seed, steps, made.latent_shape)[None], 0.0, 0.5)
        state = State(x, 0)
        while not rule.done(state):
            state = rule.advance(state, asked(teacher, state, rule, cond, 2.0))
        assert torch.equal(made.family.levels(state.x)[0], all_redone[k])


def asked(of: LoadedStudent, state: State, rule: solvers.Solver, cond: torch.Tensor, w: float | None) -> torch.Tensor:
    t, s = (torch.tensor([time]) for time in (rule.plan[state.i].t, rule.target(state)))
    pred: torch.Tensor = of.family.denoise(state.x, t, cond, s, [w])
    return pred


@pytest.mark.parametrize("negative", [None, ["dots", "", "lines", "three"]])
def test_a_row_is_kept_or_redone_whoever_shares_its_batch(negative: list[str] | None) -> None:
    own = sample(pair(0.0)[0], PROMPTS, SEEDS, 1)
    doubts = sorted(calibrated_doubts())
    made, teacher = pair((doubts[1] + doubts[2]) / 2)
    aid, others = Aid(teacher, REDO), negative or [None] * 4
    together = sample(made, PROMPTS, SEEDS, 1, aid=aid, negative=negative)
    alone = [
        sample(made, [prompt], [seed], 1, aid=aid, negative=None if other is None else [other])[0]
        for prompt, seed, other in zip(PROMPTS, SEEDS, others, strict=True)
    ]
    assert torch.equal(together, torch.stack(alone))
    kept = sum(torch.equal(one, before) for one, before in zip(together, own, strict=True))
    assert 0 < kept < 4
    assert negative or kept == 2


def calibrated_doubts() -> list[float]:
    """Of the four pictures, by the student's and the teacher's networks themselves."""
    made, teacher = pair(0.0)
    rule, found = made.solver(1), []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        cond = made.family.encode([prompt])
        start = rule.start(noise(seed, 0, made.latent_shape)[None])
        picture = rule.advance(start, asked(made, start, rule, cond, None)).x
        x = solvers.renoise(made.process, picture, noise(seed, 1, made.latent_shape)[None], 0.0, 0.5)
        second = solvers.make("ddim", teacher.process, "flow", teacher.manifest.plan(8)[4:])
        state = State(x, 0)
        found.append(doubt(picture, second.x0(state, asked(teacher, state, second, cond, 2.0))).item())
    return found


def test_a_threshold_is_the_order_statistic_that_bounds_the_share() -> None:
    doubts = [float(value) for value in range(1, 100)]
    random.Random(0).shuffle(doubts)
    found = thresholds(doubts)
    assert found == (95.0, 90.0, 85.0, 80.0, 75.0, 70.0, 65.0, 60.0, 55.0, 50.0)
    for at, share in zip(found, REDO_SHARES, strict=True):
        assert sum(value > at for value in doubts) / len(doubts) <= share


def test_of_further_doubts_no_more_than_the_share_is_redone_on_average() -> None:
    generator, over = random.Random(1), [0] * len(REDO_SHARES)
    for _ in range(2000):  # of few calibration pictures, where a plain quantile would redo more than it says
        found = thresholds([generator.expovariate(1.0) for _ in range(LEAST + 1)])
        new = generator.expovariate(1.0)
        over = [count + (new > at) for count, at in zip(over, found, strict=True)]
    for count, share in zip(over, REDO_SHARES, strict=True):
        assert count / 2000 <= share + 0.02


def test_a_share_between_two_that_are_known_is_rounded_down() -> None:
    found = Judge(steps=8, doubts={1: tuple(float(10 - k) for k in range(10))})
    assert [found.threshold(1, share) for share in (0.05, 0.149, 0.15, 0.3, 0.5)] == [10.0, 9.0, 8.0, 5.0, 1.0]


@pytest.mark.parametrize("doubts", [(1.0,) * 9, tuple(map(float, range(10))), (-1.0,) * 10])
def test_doubts_that_bound_nothing_are_no_judge(doubts: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="doubts"):
        Judge(steps=8, doubts={1: doubts})


def test_a_student_without_a_judge_keeps_its_digest() -> None:
    plain = student()
    assert b"judge" not in plain.canonical()
    assert plain.judged(judge(1.0)).digest not in (plain.digest, plain.judged(judge(2.0)).digest)


def test_calibrating_hears_the_doubts_that_serving_decides_by() -> None:
    _, teacher = pair(0.0)
    plain = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version)
    prompts = [f"{k} rings" for k in range(39)]
    found = calibrate(plain, teacher, 8, prompts)
    assert sorted(found.judge.doubts) == [1, 2, 4]
    judged = replace(plain, manifest=plain.manifest.judged(found.judge))
    own = sample(plain, prompts, range(39), 1, rounded=False)
    for share in (0.1, 0.5):
        some = sample(judged, prompts, range(39), 1, aid=Aid(teacher, Refinement("redo", share)), rounded=False)
        redone = sum(not torch.equal(one, before) for one, before in zip(some, own, strict=True))
        assert redone == 40 * share - 1
    assert all(-1 <= value <= 1 for value in found.correlation.values())
    with pytest.raises(InvalidRequest, match="18 prompts are too few: 19"):
        calibrate(plain, teacher, 8, prompts[:18])


def test_ranks_correlate_whatever_their_scale() -> None:
    assert spearman([1.0, 5.0, 2.0, 9.0], [0.1, 30.0, 0.2, 31.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
