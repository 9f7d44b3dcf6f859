"""Guidance distillation at the closed-form guided denoiser."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_jobs import times
from distill_jobs.batches import Batch, Rows
from distill_jobs.methods import guidance
from distill_jobs.methods._line import snr_error
from distill_jobs.methods.base import Workspace, resolve
from distill_jobs.methods.guidance import Guidance, GuidedPath
from distill_jobs.roles import Cast
from distill_jobs.stage import Stage, StageRun
from engines.denoiser import BaseDenoiser, Denoiser
from engines.manifest import Kind
from engines.process import RF, Process
from engines.solvers import trajectory
from tests.unit.distill_jobs.closed_form import STD, GaussianNet, batch_of, data_of, exact_pairs, fake_of, teacher_of
from tests.unit.distill_jobs.oracle import OFF, TRUTH, every_kind, every_process, other_guidance, top
from tests.unit.distill_jobs.tiny import STAGES, tiny_source, tiny_student, tiny_teacher


def grid(kind: Kind) -> tuple[float, ...]:
    return tuple(top(kind) * u for u in times.uniform(16))


# at latents noised anew ----------------------------------------------------------------------------------------------


class Blind(GaussianNet):
    """Told s, it does not care: the optimal denoiser."""

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        return super().forward(x, t, cond, None, w)


def guidance_loss(
    process: Process,
    kind: Kind,
    *,
    teacher: BaseDenoiser | None = None,
    method: type[Guidance] = Guidance,
    student: BaseDenoiser | None = None,
    **other: float,
) -> float:
    """Of the student that is the optimal denoiser of N(MEAN + shift, std^2), by default the guided teacher's data."""
    cast = Cast(teacher or teacher_of(process, kind), student=student or fake_of(process, kind, **other))
    one = method(cast, resolve("guidance").config({"grids": {16: grid(kind)}}))
    return max(float(one.loss("student", batch_of(seed=seed, x=data_of()))["guidance"]) for seed in range(2))


@every_kind
@every_process
def test_guidance_is_zero_at_the_guided_denoiser_only(process: Process, kind: Kind) -> None:
    assert guidance_loss(process, kind) < 1e-12
    blind = Denoiser(Blind(process, kind, TRUTH), process, kind, inputs={"s"})
    assert guidance_loss(process, kind, student=blind) < 1e-12
    assert guidance_loss(process, kind, shift=TRUTH + OFF) > 0.001
    assert guidance_loss(process, kind, std=1.2 * STD) > 0.001


def test_guidance_with_the_other_convention_or_without_any_fails_the_oracle() -> None:
    assert guidance_loss(RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.1
    assert guidance_loss(RF(), "flow", teacher=teacher_of(RF(), "flow", w=1.0)) > 0.1


def test_guidance_with_the_wrong_sign_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance, "snr_error", lambda guess, line: snr_error(guess, (-line[0], -line[1])))
    assert guidance_loss(RF(), "flow") > 0.1


def test_a_guided_teachers_two_evaluations_become_one() -> None:
    asked: list[int] = []
    student = fake_of(RF(), "flow")
    student.net.register_forward_hook(lambda module, given, made: asked.append(len(made)))
    guidance_loss(RF(), "flow", student=student)
    assert asked == [64, 64]  # two batches, one evaluation of each row


# on the guided teacher's own paths -----------------------------------------------------------------------------------


def agd_loss(
    process: Process,
    kind: Kind,
    *,
    teacher: BaseDenoiser | None = None,
    method: type[GuidedPath] = GuidedPath,
    **student: float,
) -> float:
    """Of the optimal denoiser of N(MEAN + shift, std^2), by default the guided teacher's data, on exact paths."""
    cast = Cast(teacher or teacher_of(process, kind), student=fake_of(process, kind, **student))
    one = method(cast, resolve("agd").config({"counts": (16,), "grids": {16: grid(kind)}}))
    pairs = exact_pairs(process, batch_of().noise, times.grid(process, one.levels)[:-1])
    return max(float(one.loss("student", batch_of(seed=seed, pair=pairs))["guided_path"]) for seed in range(2))


@every_kind
@every_process
def test_agd_is_zero_at_the_guided_denoiser_only(process: Process, kind: Kind) -> None:
    assert agd_loss(process, kind) < 1e-12
    assert agd_loss(process, kind, shift=TRUTH + OFF) > 0.001
    assert agd_loss(process, kind, std=1.2 * STD) > 0.001


def test_agd_with_the_other_convention_or_without_guidance_fails_the_oracle() -> None:
    assert agd_loss(RF(), "flow", teacher=other_guidance(RF(), "flow")) > 0.1
    assert agd_loss(RF(), "flow", teacher=teacher_of(RF(), "flow", w=1.0)) > 0.1


def test_agd_with_the_wrong_sign_fails_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance, "snr_error", lambda guess, line: snr_error(guess, (-line[0], -line[1])))
    assert agd_loss(RF(), "flow") > 0.1


def test_agd_asks_at_states_of_the_guided_path_at_their_own_times() -> None:
    """Each state of a row tells its index, and so does the time that comes with it."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(GuidedPath):
        def loss(self, role: str, batch: Batch) -> dict[str, Tensor]:
            assert batch.rows.pair is not None
            index = torch.arange(17, dtype=torch.float64).reshape(1, 17, 1, 1, 1)
            return super().loss(
                role, Batch(Rows(batch.cond, pair=index + 0 * batch.rows.pair), batch.noise, batch.generator)
            )

    student = fake_of(RF(), "flow")
    student.net.register_forward_pre_hook(lambda module, given: seen.append((given[0].flatten(1)[:, 0], given[1])))
    one = Watched(Cast(teacher_of(RF(), "flow"), student=student), resolve("agd").config({}))
    one.loss("student", batch_of(pair=exact_pairs(RF(), batch_of().noise, times.grid(RF(), one.levels)[:-1])))
    (states, t), *_ = seen
    torch.testing.assert_close(t, 1 - states / 16)
    assert len(set(states.tolist())) > 8
    assert 16 not in states.tolist()


def test_the_bank_holds_guided_trajectories_and_needs_prompts_only() -> None:
    run = StageRun(0, Stage("agd", 2, {**STAGES["agd"], "states": 4}), tiny_teacher(), tiny_student())
    assert isinstance(run.method, GuidedPath)
    assert run.method.prepare(tiny_source(), Workspace())
    assert run.method.bank is not None
    states = run.method.bank.states
    path = trajectory(
        tiny_teacher(), states[:8, 0], (1.0, 0.75, 0.5, 0.25, 0.0), run.method.bank.conds[0][:8], solver="ab2"
    )
    torch.testing.assert_close(states[:8], torch.stack(path, dim=1), rtol=1e-4, atol=1e-5)
    assert run.method.needs == {"prompts"}
