"""Every embedded teacher: a stock pipeline loads it as it is, it draws what it is asked for, and its answers ship."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from distill_jobs.assessment import Assessor, TeacherAs
from distill_jobs.evaluate import alignment, features
from distill_jobs.evaluate.reference import Reference, kept_answers
from distill_jobs.tasks import base
from distill_jobs.tasks.base import Task
from distill_jobs.teachers.publish import publish
from distill_jobs.teachers.training import latents, vae
from engines import plugins
from engines.backends.base import Choice
from engines.registry.files import FilesRegistry

pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers warns about while loading is not ours


@pytest.fixture(scope="module", params=plugins.names(base.PACKAGE))
def task(request: pytest.FixtureRequest) -> Task:
    return base.load(request.param)


@pytest.fixture(scope="module")
def pipeline(task: Task) -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(task.pipeline, safety_checker=None, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def asked_of(task: Task, folder: Path) -> tuple[FilesRegistry, TeacherAs]:
    registry = FilesRegistry(folder)
    return registry, TeacherAs.of(registry.student(publish(registry, task.name, task=task)))


def test_the_directory_is_small_and_holds_no_pickle(task: Task) -> None:
    files = [path for path in task.pipeline.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 13_500_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}
    assert json.loads((task.pipeline / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_the_autoencoder_gives_back_unseen_pictures(task: Task) -> None:
    network = AutoencoderKL.from_pretrained(task.pipeline / "vae", local_files_only=True).eval()
    assert vae.psnr_db(network, latents.pictures(task, 48, 11, "heldout")) >= 28


def test_its_pictures_show_what_new_captions_say(task: Task, pipeline: StableDiffusionPipeline) -> None:
    scenes, guidance = task.scenes(24, 5, "train"), task.teacher.guidance.default
    captions, generator = [scene.caption for scene in scenes], torch.Generator().manual_seed(0)
    asked = {"num_inference_steps": 12, "guidance_scale": guidance, "output_type": "np", "generator": generator}
    drawn = (255 * pipeline(captions, **asked).images).round().astype(np.uint8).transpose(0, 3, 1, 2)
    found = features.load(task).observe(drawn).attributes
    assert alignment.accuracy(found, np.array([scene.attributes() for scene in scenes])) > 0.95


def test_seeds_give_different_pictures(task: Task, pipeline: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [task.teacher.prompts[0]] * 2
    first, second = pipeline(prompts, num_inference_steps=6, output_type="np", generator=generator).images
    assert np.abs(first - second).mean() > 0.01


def test_the_card_says_how_it_was_made_and_where_it_ends(task: Task) -> None:
    card = (task.pipeline / "README.md").read_text()
    assert "distill_jobs.teachers.training.train" in card
    assert "## Limits" in card


def test_its_metric_network_reads_real_pictures_that_it_never_saw(task: Task) -> None:
    pictures = task.sample(300, 12_345, split="heldout")
    found = features.load(task).observe(pictures.pixels).attributes
    by_name = alignment.by_attribute(found, pictures.attributes, task.attributes)
    assert min(share for share in by_name.values() if share is not None) > 0.95


def test_its_shipped_answers_are_those_of_the_version_that_is_published(task: Task, tmp_path: Path) -> None:
    """Otherwise every job would first ask it thousands of questions."""
    _, asked = asked_of(task, tmp_path)
    for n in (256, 2000):
        kept = kept_answers([task.answers], asked.digest, steps=asked.steps, guidance=asked.guidance, n=n)
        assert kept is not None
        assert Reference.load(kept, task=task).teacher is not None


def test_its_shipped_figures_at_few_steps_are_read_instead_of_drawn(task: Task, tmp_path: Path) -> None:
    def drawing() -> None:
        raise AssertionError("the teacher was asked")

    registry, asked = asked_of(task, tmp_path / "registry")
    choice, folders = Choice("eager", "fp32"), {"cache": tmp_path / "cache", "answers": tmp_path / "answers"}
    assessor = Assessor(registry, choice=choice, **folders, check=drawing)
    shipped = assessor.teacher_at(asked, 2000, task.teacher.compared)
    assert set(shipped) == set(task.teacher.compared)
    assert shipped[1].fd_ratio > 2 > 1.05 > shipped[16].fd_ratio
    with pytest.raises(AssertionError, match="the teacher was asked"):
        assessor.teacher_at(asked, 256, (1,))
