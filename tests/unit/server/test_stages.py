"""The stages give every row what it would have had alone, whoever shares its batch."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.errors import InternalError
from engines.manifest import Guidance, Judge, ProcessSpec
from engines.noise import noise
from engines.refine import CORRECTION, FIRST_STEP, REDO
from engines.student import Aid, LoadedStudent, sample
from server.batcher import LaneKey
from server.prompt_cache import PromptCache
from server.sources import Source
from server.stages import Plans, Stages, give, partial_index, partial_steps, show
from server.tickets import LatentRow, PictureRow, Ticket, draw, latent_row, prompts_of, rows_of, sources_of
from tests.unit.server import toy


@pytest.fixture
def stages() -> Stages:
    return Stages(PromptCache(1 << 20))


def ticket(student: LoadedStudent, request_id: str = "r", aid: Aid | None = None, **given: object) -> Ticket:
    claimed = toy.claim(student, request_id, **given)  # type: ignore[arg-type]
    solver = Plans().solver(student, claimed.request.steps, claimed.request.guidance, aid)
    by = aid.teacher if aid else None
    return Ticket(claimed, student, solver.plan, solver, due_s=0.0, deadline_s=60.0, teacher=by)


def encoded(stages: Stages, *tickets: Ticket) -> list[PictureRow]:
    for one in tickets:
        prompts = prompts_of(one)
        one.missing = len(prompts)
        made = stages.encode(prompts)
        for row in prompts:
            give(row, made[row.prompt])
    return [row for one in tickets for row in rows_of(one)]


def run(stages: Stages, rows: Sequence[PictureRow]) -> dict[str, Tensor]:
    """Every row until it is done, always all that are left in one batch; pictures by request and index."""
    left, latents = list(rows), list[LatentRow]()
    while left:
        stages.denoise(left)
        latents += [latent_row(row, row.state.x) for row in left if row.done and row.state]
        left = [row for row in left if not row.done]
    pixels = torch.from_numpy(stages.decode(latents))
    return {f"{row.request_id}{row.index}": pixels[i] for i, row in enumerate(latents)}


def test_a_picture_is_the_one_that_the_student_samples_by_itself(stages: Stages) -> None:
    student = toy.student(counts=(1, 2, 4))
    rows = encoded(stages, ticket(student, "a", steps=4, n=2), ticket(student, "b", steps=1, prompt="two squares"))
    pictures = run(stages, rows)
    assert torch.equal(torch.stack([pictures["a0"], pictures["a1"]]), sample(student, ["a red circle"] * 2, [7, 8], 4))
    assert torch.equal(pictures["b0"], sample(student, ["two squares"], [7], 1)[0])


def test_rows_of_different_step_counts_share_calls(stages: Stages) -> None:
    family = toy.ToyFamily()
    student = toy.student(family)
    run(stages, encoded(stages, ticket(student, "a", steps=4), ticket(student, "b", steps=1)))
    assert [rows for stage, rows in family.calls if stage == "denoise"] == [2, 1, 1, 1]


def test_a_picture_begins_with_the_noise_that_was_drawn_for_it_before(stages: Stages) -> None:
    student = toy.student()
    drawn, undrawn = ticket(student, "a", steps=2, n=2), ticket(student, "b", steps=2, n=2)
    assert drawn.undrawn == 2 * prod(student.latent_shape)
    draw([drawn])
    assert drawn.undrawn == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.tickets.noise", None)  # nothing is drawn from here on
        begun = run(stages, encoded(stages, drawn))
    pictures = run(stages, encoded(stages, undrawn))
    assert torch.equal(begun["a0"], pictures["b0"])
    assert torch.equal(begun["a1"], pictures["b1"])


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 1.0), ("ddim", 0.3), ("ab2", 0.0), ("unipc", 0.0)])
def test_solver_state_and_fresh_noise_belong_to_the_row(stages: Stages, solver: str, eta: float) -> None:
    student = toy.student(solver=solver, eta=eta)
    together = run(stages, encoded(stages, ticket(student, "a", steps=4, n=2), ticket(student, "b", steps=2, seed=99)))
    assert torch.equal(together["a1"], sample(student, ["a red circle"], [8], 4)[0])
    assert torch.equal(together["b0"], sample(student, ["a red circle"], [99], 2)[0])


def test_each_row_is_scaled_and_told_its_time_as_its_own_process_says(stages: Stages) -> None:
    """Students of one network may differ in their process; a network of EDM is given x times a share of its noise."""
    edm = toy.student(process=ProcessSpec(kind="edm", sigma_data=0.5))
    asked = [ticket(edm, "a", steps=4), ticket(edm, "b", steps=2, seed=99), ticket(toy.student(), "c", steps=4)]
    together = run(stages, encoded(stages, *asked))
    assert torch.equal(together["a0"], sample(edm, ["a red circle"], [7], 4)[0])
    assert torch.equal(together["b0"], sample(edm, ["a red circle"], [99], 2)[0])
    assert torch.equal(together["c0"], sample(toy.student(), ["a red circle"], [7], 4)[0])
    assert not torch.equal(together["a0"], together["c0"])


def test_each_row_has_its_own_guidance_and_negative_prompt(stages: Stages) -> None:
    student = toy.student(guided=True)
    rows = encoded(
        stages,
        ticket(student, "a", steps=2),
        ticket(student, "b", steps=2, guidance=5.0, negative_prompt="blur"),
        ticket(student, "c", steps=2, guidance=1.0),
    )
    pictures = run(stages, rows)
    for name, guidance, negative in (("a0", None, ""), ("b0", 5.0, "blur"), ("c0", 1.0, "")):
        alone = sample(student, ["a red circle"], [7], 2, guidance=guidance, negative=[negative])
        assert torch.equal(pictures[name], alone[0]), name
    assert [row.network_rows for row in rows] == [2, 2, 1]


def test_a_student_that_reads_its_weight_is_told_it_and_encodes_one_prompt(stages: Stages) -> None:
    family = toy.ToyFamily()
    student = toy.student(family, guidance=Guidance(mode="embedded", default=2.0, maximum=8.0))
    asked = [ticket(student, name, steps=2, guidance=w) for name, w in (("a", None), ("b", 5.0), ("c", 1.0))]
    assert [len(prompts_of(one)) for one in asked] == [1, 1, 1]
    run(stages, encoded(stages, *asked))
    assert family.weights == [[2.0, 5.0, 1.0]] * 2


def test_the_empty_negative_prompt_is_left_to_the_family(stages: Stages) -> None:
    family = toy.ToyFamily()
    run(stages, encoded(stages, ticket(toy.student(family, guided=True), steps=2)))
    assert family.negatives == [None, None]


def test_a_known_prompt_is_not_encoded_again_and_equal_ones_are_encoded_once(stages: Stages) -> None:
    family = toy.ToyFamily()
    student = toy.student(family)
    first, second, third = (ticket(student, name, prompt="xyz circle") for name in "abc")
    prompts = [row for one in (first, second) for row in prompts_of(one)]
    stages.encode(prompts)
    assert stages.recall(prompts_of(third)[0])
    assert family.calls == [("encode", 1)]
    assert third.prompt is not None
    assert (third.prompt.ignored_words, third.prompt.tokens) == (("xyz",), 2)


def test_students_with_the_same_denoiser_share_a_lane_and_others_do_not() -> None:
    steps = {"counts": (1, 2, 4)}
    lanes = [
        rows_of(ticket(toy.student(name=name, weights=weights, **steps)))[0].lane  # type: ignore[arg-type]
        for name, weights in (("teacher", "w"), ("schedule", "w"), ("trained", "v"))
    ]
    assert lanes[0] == lanes[1] != lanes[2]


def test_a_batch_that_failed_half_way_can_run_again(stages: Stages) -> None:
    family = toy.ToyFamily(faults={"denoise": [None, InternalError("once")]})
    student = toy.student(family)
    rows = encoded(stages, ticket(student, "a", steps=2), ticket(student, "b", steps=4))
    stages.denoise(rows)
    with pytest.raises(InternalError):
        stages.denoise(rows)
    assert [row.step for row in rows] == [1, 1]
    pictures = run(stages, rows)
    assert torch.equal(pictures["b0"], sample(toy.student(), ["a red circle"], [7], 4)[0])


def test_a_partial_picture_is_the_estimate_after_its_step(stages: Stages) -> None:
    student = toy.student()
    [row] = encoded(stages, ticket(student, steps=4, partial_images=1))
    shown = [stages.denoise([row]) for _ in range(4)]
    assert [list(estimates) for estimates in shown] == [[], [0], [], []]
    solver = student.solver(4)
    state = solver.start(noise(7, 0, (3, 4, 4)))
    cond = student.family.encode(["a red circle"])
    for _ in range(2):
        times = student.times(solver, state)
        pred = student.family.denoise(state.x[None], torch.tensor([times.t]), cond, torch.tensor([times.s]), [None])[0]
        estimate, state = solver.x0(state, pred), solver.advance(state, pred)
    assert torch.allclose(shown[1][0], estimate)


@pytest.mark.parametrize(
    ("total", "wanted", "after"), [(4, 1, (2,)), (4, 3, (1, 2, 3)), (2, 3, (1,)), (1, 3, ()), (32, 3, (8, 16, 24))]
)
def test_partial_pictures_are_spread_and_never_the_last(total: int, wanted: int, after: tuple[int, ...]) -> None:
    assert partial_steps(total, wanted) == after


def test_a_seed_wraps_where_generators_end() -> None:
    one = ticket(toy.student(), n=2, seed=2**63 - 1)
    assert [one.seed(0), one.seed(1)] == [2**63 - 1, 0]


def test_first_steps_of_a_teacher_share_its_calls_with_its_own_rows_and_the_rest_the_student_s(stages: Stages) -> None:
    """Each row ends as it does alone: teacher's own, student's own, and the one that begins with the teacher."""
    teacher = toy.student(toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True)
    student = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version)
    plain, guided = ticket(student, "s", steps=4), ticket(teacher, "t", steps=4)
    mixed = ticket(student, "m", Aid(teacher, FIRST_STEP), steps=4)
    rows = encoded(stages, plain, guided, mixed)
    latents: dict[str, LatentRow] = {}
    while left := [row for row in rows if not row.done]:
        lanes: dict[LaneKey, list[PictureRow]] = {}
        for row in left:
            lanes.setdefault(row.ticket.lane(row.step), []).append(row)
        for batch in lanes.values():
            stages.denoise(batch)
        latents |= {row.request_id: latent_row(row, row.state.x) for row in left if row.done and row.state}
    pictures = {name: torch.from_numpy(stages.decode([row]))[0] for name, row in latents.items()}
    prompt, seed = ["a red circle"], [7]
    assert torch.equal(pictures["s"], sample(student, prompt, seed, 4)[0])
    assert torch.equal(pictures["t"], sample(teacher, prompt, seed, 4)[0])
    assert torch.equal(pictures["m"], sample(student, prompt, seed, 4, aid=Aid(teacher, FIRST_STEP))[0])
    assert not torch.equal(pictures["m"], pictures["s"])
    assert teacher.family.calls.count(("denoise", 2)) == 1  # type: ignore[attr-defined]
    assert student.family.calls.count(("denoise", 2)) == 3  # type: ignore[attr-defined]


def test_what_teachers_add_to_some_rows_leaves_every_row_as_it_is_alone(stages: Stages) -> None:
    """Rows without a teacher, corrected ones and judged ones, of which one is kept, all at once."""
    teacher = toy.student(toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True, solver="dpmpp_2m")
    plain = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version, eta=1.0)
    judge = Judge(steps=4, doubts={2: (0.35,) * 10})
    student = replace(plain, manifest=plain.manifest.judged(judge))
    alone = {
        name: sample(student, ["a red circle"] * 3, [7, 8, 9], 2, aid=aid)
        for name, aid in (("p", None), ("c", Aid(teacher, CORRECTION)), ("r", Aid(teacher, REDO)))
    }
    kept = [torch.equal(one, own) for one, own in zip(alone["r"], alone["p"], strict=True)]
    assert sorted(kept) == [False, False, True]
    tickets = [
        ticket(student, "p", steps=2, n=3),
        ticket(student, "c", Aid(teacher, CORRECTION), steps=2, n=3),
        ticket(student, "r", Aid(teacher, REDO), steps=2, n=3),
    ]
    rows = encoded(stages, *tickets)
    while left := [row for row in rows if not row.done]:
        lanes: dict[LaneKey, list[PictureRow]] = {}
        for row in left:
            lanes.setdefault(row.ticket.lane(row.step), []).append(row)
        for batch in lanes.values():
            stages.denoise(batch)
    for row in rows:
        assert row.state is not None
        picture = torch.from_numpy(stages.decode([latent_row(row, row.state.x)]))[0]
        assert torch.equal(picture, alone[row.request_id][row.index]), (row.request_id, row.index)


def test_a_negative_prompt_is_what_the_teacher_s_first_step_is_guided_away_from(stages: Stages) -> None:
    teacher = toy.student(toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True)
    student = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version)
    rows = encoded(stages, ticket(student, "r", Aid(teacher, FIRST_STEP), steps=4, negative_prompt="two squares"))
    expected = sample(student, ["a red circle"], [7], 4, aid=Aid(teacher, FIRST_STEP), negative=["two squares"])
    assert torch.equal(run(stages, rows)["r0"], expected[0])
    assert not torch.equal(expected, sample(student, ["a red circle"], [7], 4, aid=Aid(teacher, FIRST_STEP)))


def test_plans_are_shared_until_a_version_that_has_a_part_in_them_is_gone() -> None:
    plans, student, other = Plans(), toy.student(), toy.student(name="other")
    made, theirs = plans.solver(student, 4, None), plans.solver(other, 4, None)
    assert plans.solver(student, 4, None) is made
    plans.forget(student.version)
    assert plans.solver(student, 4, None) is not made
    assert plans.solver(other, 4, None) is theirs


def edited(student: LoadedStudent, request_id: str, first: int, *, masked: bool = False, **given: object) -> Ticket:
    """A ticket that changes a picture from step `first` on; its left half where `masked`."""
    made = ticket(student, request_id, edits_from=first, **given)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    made.source = Source(pixels, np.repeat([[0, 0, 255, 255]], 4, axis=0).astype(np.uint8) if masked else None)
    return made


def seen(stages: Stages, *tickets: Ticket) -> list[PictureRow]:
    for row in [row for one in tickets for row in sources_of(one)]:
        [looked] = stages.look([row])
        show(row, looked)
    return encoded(stages, *tickets)


def by_itself(student: LoadedStudent, one: Ticket, steps: int, seed: int) -> Tensor:
    looked, first = one.looked, one.first
    assert looked is not None
    return sample(student, ["a red circle"], [seed], steps, looked=[looked], first=first)[0]


@pytest.mark.parametrize(
    ("solver", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ab2", 0.0), ("dpmpp_2m", 0.0), ("unipc", 0.0)]
)
def test_an_edit_shares_calls_with_rows_from_noise_and_each_is_as_alone(
    stages: Stages, solver: str, eta: float
) -> None:
    family = toy.ToyFamily(spread=0.3)
    student = toy.student(family, solver=solver, eta=eta)
    late = edited(student, "late", 2, steps=4, n=2)
    part = edited(student, "part", 1, masked=True, steps=4, seed=99)
    rows = seen(stages, late, part) + encoded(stages, ticket(student, "made", steps=4))
    assert [row.step for row in rows] == [2, 2, 1, 0]
    pictures = run(stages, rows)
    assert [rows for stage, rows in family.calls if stage == "denoise"] == [4, 4, 2, 1]
    assert torch.equal(pictures["late1"], by_itself(student, late, 4, 8))
    assert torch.equal(pictures["part0"], by_itself(student, part, 4, 99))
    assert torch.equal(pictures["made0"], sample(student, ["a red circle"], [7], 4)[0])
    assert not torch.equal(pictures["late0"], pictures["late1"])


def test_rows_that_meet_at_one_step_with_other_pasts_are_advanced_each_by_its_own(stages: Stages) -> None:
    """An edit that begins where a row from noise has remembered two predictions has none."""
    student = toy.student(solver="unipc")
    [made] = encoded(stages, ticket(student, "made", steps=4))
    stages.denoise([made])
    stages.denoise([made])
    late = edited(student, "late", 2, steps=4)
    late.solver = made.ticket.solver  # as a worker's requests for one plan have
    pictures = run(stages, [made, *seen(stages, late)])
    assert torch.equal(pictures["made0"], sample(student, ["a red circle"], [7], 4)[0])
    assert torch.equal(pictures["late0"], by_itself(student, late, 4, 7))


def test_what_a_mask_leaves_closed_ends_as_the_picture_s_own_latents(stages: Stages) -> None:
    student = toy.student()
    one = edited(student, "one", 0, masked=True, steps=2)
    rows = seen(stages, one)
    run(stages, rows)
    state, looked = rows[0].state, one.looked
    assert state is not None
    assert looked is not None
    assert torch.equal(state.x[:, :, 2:], looked.latents[:, :, 2:])
    assert not torch.allclose(state.x[:, :, :2], looked.latents[:, :, :2])


def test_partial_pictures_of_an_edit_are_spread_over_the_steps_that_it_takes(stages: Stages) -> None:
    [row] = seen(stages, edited(toy.student(), "one", 1, steps=4, partial_images=2))
    shown = []
    while not row.done:
        shown.append((list(stages.denoise([row])), partial_index(row) if not row.done else None))
    assert shown == [([0], 0), ([0], 1), ([], None)]
