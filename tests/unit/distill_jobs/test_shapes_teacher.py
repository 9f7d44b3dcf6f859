"""The committed teacher: a stock pipeline loads it as it is, and it draws what it is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from distill_jobs.assessment import Assessor, TeacherAs
from distill_jobs.evaluate.reference import kept_answers
from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers.publish import publish
from distill_jobs.teachers.shapes import data
from distill_jobs.teachers.training import latents, vae
from engines.backends.base import Choice
from engines.registry.files import FilesRegistry

pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers warns about while loading is not ours
PIPELINE = TASK.pipeline
RED, BLUE = np.array([214, 56, 48]), np.array([56, 92, 206])


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_directory_is_small_and_holds_no_pickle() -> None:
    files = [path for path in PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 13_500_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}
    assert json.loads((PIPELINE / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_the_autoencoder_gives_back_unseen_pictures() -> None:
    network = AutoencoderKL.from_pretrained(PIPELINE / "vae", local_files_only=True).eval()
    assert vae.psnr_db(network, latents.pictures(TASK, 48, 11, "heldout")) >= 28


def test_it_draws_what_the_caption_says(pipeline: StableDiffusionPipeline) -> None:
    caption = "a large red circle left of a large blue square on a white background"
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(
        [caption] * 4, num_inference_steps=12, guidance_scale=2.0, output_type="np", generator=generator
    )
    levels = 255 * pictures.images  # [N, H, W, 3]
    left, right = levels[:, 28:36, 14:20].mean((1, 2)), levels[:, 28:36, 44:50].mean((1, 2))
    assert levels.std() > 20
    assert np.median(np.abs(left - RED).max(1)) < 40
    assert np.median(np.abs(right - BLUE).max(1)) < 40


def test_seeds_give_different_pictures(pipeline: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = pipeline(["a red ring"] * 2, num_inference_steps=6, output_type="np", generator=generator).images
    assert np.abs(first - second).mean() > 0.01


def test_the_card_names_what_it_was_trained_on() -> None:
    card = (PIPELINE / "README.md").read_text()
    assert "distill_jobs.teachers.training.train" in card
    assert all(f"{data.COLOURS[colour]} {data.KINDS[kind]}" in card for colour, kind in data.HELD_OUT)


def test_its_shipped_answers_are_those_of_the_version_that_is_published(tmp_path: Path) -> None:
    """Otherwise every job would first ask it thousands of questions."""
    registry = FilesRegistry(tmp_path)
    asked = TeacherAs.of(registry.student(publish(registry, "shapes")))
    for n in (256, 2000, 10_000):
        assert kept_answers([TASK.answers], asked.digest, steps=asked.steps, guidance=asked.guidance, n=n) is not None


def test_its_shipped_figures_at_few_steps_are_read_instead_of_drawn(tmp_path: Path) -> None:
    def drawing() -> None:
        raise AssertionError("the teacher was asked")

    registry = FilesRegistry(tmp_path / "registry")
    asked = TeacherAs.of(registry.student(publish(registry, "shapes")))
    choice, folders = Choice("eager", "fp32"), {"cache": tmp_path / "cache", "answers": tmp_path / "answers"}
    assessor = Assessor(registry, choice=choice, **folders, check=drawing)
    shipped = assessor.teacher_at(asked, 2000, TASK.teacher.compared)
    assert set(shipped) == set(TASK.teacher.compared)
    assert shipped[1].fd_ratio > 2 > 1.05 > shipped[16].fd_ratio
    with pytest.raises(AssertionError, match="the teacher was asked"):
        assessor.teacher_at(asked, 256, (1,))
