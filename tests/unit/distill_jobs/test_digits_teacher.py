"""The digits teacher: where its pictures show ink and paper, and what its card must name."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from distill_jobs.tasks.digits import TASK
from distill_jobs.teachers.digits import data

pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers warns about while loading is not ours


def test_it_writes_in_the_ink_that_is_said_at_the_place_that_is_said() -> None:
    """Read from the pixels, without the metric network."""
    pipeline = StableDiffusionPipeline.from_pretrained(TASK.pipeline, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    captions = [f"a small handwritten one in red at the {side} on white paper" for side in ("left", "right")] * 4
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(captions, num_inference_steps=12, guidance_scale=2.0, output_type="np", generator=generator)
    red = (pictures.images[..., 0] - pictures.images[..., 1]).clip(0)  # [N, H, W], none on white paper
    across = (red.sum(1) * np.arange(32)).sum(1) / red.sum((1, 2)) / 32
    assert pictures.images[:, 0].mean() > 0.85
    assert (across[::2] < 0.45).all()
    assert (across[1::2] > 0.55).all()


def test_the_card_names_what_it_never_saw() -> None:
    card = (TASK.pipeline / "README.md").read_text()
    assert all(f"{data.INKS[ink]} {data.DIGITS[digit]}" in card for digit, ink in data.HELD_OUT)
