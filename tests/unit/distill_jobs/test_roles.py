"""Who is trained, how often, and whose gradients flow."""

import torch

from distill_jobs.roles import Cast, Role
from engines.denoiser import Denoiser
from tests.unit.distill_jobs.tiny import tiny_student, tiny_teacher


def test_a_role_has_its_updates_when_it_is_due() -> None:
    role = Role(every=2, steps=3, start=1)
    assert [role.updates_at(i) for i in range(5)] == [0, 3, 0, 3, 0]


def test_a_fake_starts_as_the_teacher_without_its_guidance_and_is_a_copy() -> None:
    teacher = tiny_teacher()
    cast = Cast.build(teacher, tiny_student(), {"fake": Role(init="teacher"), "student": Role(init="student")})
    fake = cast["fake"]
    assert isinstance(fake, Denoiser)
    assert fake is not teacher.denoiser
    for ours, theirs in zip(fake.parameters(), teacher.denoiser.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_the_student_itself_plays_the_student() -> None:
    student = tiny_student()
    assert Cast.build(tiny_teacher(), student, {"student": Role(init="student")}).student is student


def test_only_the_named_role_takes_gradients_and_trains() -> None:
    cast = Cast.build(tiny_teacher(), tiny_student(), {"fake": Role(), "student": Role(init="student")})
    with cast.only("fake") as fake:
        assert fake.training
        assert all(p.requires_grad for p in fake.parameters())
        assert not cast.student.training
        others = [*cast.student.parameters(), *cast.teacher.parameters()]
        assert not any(p.requires_grad for p in others)
    assert not fake.training
    assert not any(p.requires_grad for p in fake.parameters())
