"""What every task promises: captions and pictures that agree, seeds that repeat, combinations that nobody trains on."""

import numpy as np
import pytest

from distill_jobs.data import prompts
from distill_jobs.evaluate.questions import HELD_OUT_EVERY, questions, real_set
from distill_jobs.tasks import base
from distill_jobs.tasks.base import ABSENT, Task
from engines import plugins
from engines.errors import UnknownPlugin
from tests.unit.server.manifests import manifest


@pytest.fixture(scope="module", params=plugins.names(base.PACKAGE))
def task(request: pytest.FixtureRequest) -> Task:
    return base.load(request.param)


def test_a_file_holds_the_task_of_its_name(task: Task) -> None:
    assert base.load(task.name) is task


def test_attributes_are_classes_or_silent(task: Task) -> None:
    drawn = task.sample(300, 4, split="all")
    assert drawn.attributes.shape == (300, len(task.attributes))
    assert len(task.classes) == len(task.attributes)
    assert (drawn.attributes >= ABSENT).all()
    assert (drawn.attributes < np.array(task.classes)).all()
    assert (drawn.attributes == ABSENT).any()  # so that captions leave something to the seeds


def test_training_never_sees_what_is_held_out(task: Task) -> None:
    assert not any(scene.heldout for scene in task.scenes(2_000, 1, "train"))
    assert all(scene.heldout for scene in task.scenes(300, 1, "heldout"))
    assert 0.05 < np.mean([scene.heldout for scene in task.scenes(2_000, 1, "all")]) < 0.5


def test_the_same_seed_gives_the_same_pictures_and_another_does_not(task: Task) -> None:
    first, again, other = (task.sample(8, seed, split="train") for seed in (7, 7, 8))
    assert first.pixels.shape == (8, 3, task.size_px, task.size_px)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.captions == again.captions == task.captions(8, 7)
    assert not np.array_equal(first.pixels, other.pixels)


def test_another_picture_of_a_scene_says_the_same_and_is_another(task: Task) -> None:
    scenes = task.scenes(4, 9, "train")
    first, second = task.draw(scenes, 1, task.size_px), task.draw(scenes, 2, task.size_px)
    assert np.array_equal(first.attributes, second.attributes)
    assert (first.pixels != second.pixels).any(axis=(1, 2, 3)).all()


def test_questions_and_the_real_set_are_those_of_the_task(task: Task) -> None:
    asked = questions(80, task=task)
    known = set(task.captions(20_000, 1, "all"))
    assert np.mean([caption in known for caption in asked.captions]) > 0.3
    assert asked.heldout.mean() == pytest.approx(1 / HELD_OUT_EVERY)
    assert asked.draw(0, task.size_px).shape == (80, 3, task.size_px, task.size_px)
    np.testing.assert_array_equal(real_set(8, task.size_px, task), real_set(8, task.size_px, task))


def test_a_job_that_names_no_prompts_has_those_of_its_teacher_s_task(task: Task) -> None:
    assert prompts.texts(None, count=5, default=task.name) == task.captions(5, 0)


def test_a_manifest_says_its_task_and_silence_is_the_first_one() -> None:
    silent = manifest("a", 1, mark=1)
    assert base.of(silent).name == base.DEFAULT
    with pytest.raises(UnknownPlugin, match="shapes"):
        base.of(silent.model_copy(update={"task": "nothing"}))


def test_silence_about_the_task_leaves_no_trace_in_the_digest() -> None:
    silent = manifest("a", 1, mark=1)
    assert b'"task"' not in silent.canonical()
    assert b'"task":"shapes"' in silent.model_copy(update={"task": "shapes"}).canonical()
