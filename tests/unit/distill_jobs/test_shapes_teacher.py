"""The shapes teacher: where its pictures show the shapes, and what its card must name."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers.shapes import data

pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers warns about while loading is not ours
RED, BLUE = np.array([214, 56, 48]), np.array([56, 92, 206])


def test_it_draws_what_the_caption_says() -> None:
    """Read from the pixels, without the metric network."""
    pipeline = StableDiffusionPipeline.from_pretrained(TASK.pipeline, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
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


def test_the_card_names_what_it_never_saw() -> None:
    card = (TASK.pipeline / "README.md").read_text()
    assert all(f"{data.COLOURS[colour]} {data.KINDS[kind]}" in card for colour, kind in data.HELD_OUT)
