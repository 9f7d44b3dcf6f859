import dataclasses

import pytest
import torch

from engines.errors import CorruptBlob, GoldenMismatch
from engines.golden import Golden, verification
from engines.loader import load_student
from engines.streams import is_alone
from engines.student import LoadedStudent, sample
from tests import tiny_sd


@pytest.fixture(scope="module")
def student() -> LoadedStudent:
    teacher = tiny_sd.teacher()
    return load_student(teacher.registry, teacher.manifest)


@pytest.fixture(scope="module")
def golden(student: LoadedStudent) -> Golden:
    return Golden.from_bytes(tiny_sd.teacher().registry.read_blob(student.manifest.golden or ""))


def run(student: LoadedStudent, golden: Golden) -> None:
    for call in verification(student, golden):
        call()


def test_every_step_count_has_a_row_and_all_are_reproduced(student: LoadedStudent, golden: Golden) -> None:
    assert set(golden.steps) == set(student.manifest.schedules)
    assert golden.pictures.shape == (4, 3, 16, 16)
    run(student, golden)


def test_a_row_is_what_sample_makes_of_its_seed(student: LoadedStudent, golden: Golden) -> None:
    again = sample(student, [golden.prompts[1]], [golden.seeds[1]], golden.steps[1])
    assert torch.equal(again[0], golden.pictures[1])


def test_a_changed_picture_is_a_mismatch_that_names_row_and_steps(student: LoadedStudent, golden: Golden) -> None:
    pictures = golden.pictures.clone()
    pictures[2, :, 4:8] += 3
    with pytest.raises(GoldenMismatch, match=rf"sample 2 \({golden.steps[2]} steps\)"):
        run(student, dataclasses.replace(golden, pictures=pictures))


def test_another_noise_is_a_mismatch(student: LoadedStudent, golden: Golden) -> None:
    with pytest.raises(GoldenMismatch, match="noise"):
        run(student, dataclasses.replace(golden, noise=golden.noise + 1e-3))


def test_a_count_without_a_row_is_a_mismatch(student: LoadedStudent, golden: Golden) -> None:
    with pytest.raises(GoldenMismatch, match=r"\[4\]"):
        run(student, dataclasses.replace(golden, steps=(1, 1, 1, 1)))


def test_bytes_round_trip_and_garbage_is_corrupt(golden: Golden) -> None:
    again = Golden.from_bytes(golden.to_bytes())
    assert again.to_bytes() == golden.to_bytes()
    assert again.prompts == golden.prompts
    for data in (b"", b"garbage" * 9, golden.to_bytes()[:-7]):
        with pytest.raises(CorruptBlob):
            Golden.from_bytes(data)


def test_what_lone_calls_are_computed_by_is_judged_as_well_as_what_streams_are(
    student: LoadedStudent, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bool] = []
    levels = student.family.levels
    monkeypatch.setattr(student.family, "levels", lambda latents: (decoded.append(is_alone()), levels(latents))[1])
    run(student, golden)
    assert decoded == [False, True, False, True]
