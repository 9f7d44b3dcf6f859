"""The digits teacher: 32×32 pictures as 4×4×8 latents, a third of the shapes teacher's weights."""

from distill_jobs.tasks.digits import TASK
from distill_jobs.teachers.digits import data
from distill_jobs.teachers.training.loop import Plan
from distill_jobs.teachers.training.recipe import Recipe

_GLUE = ("a", "an", "the", "handwritten", "digit", "in", "on", "at", "ink", "paper")

RECIPE = Recipe(
    task=TASK,
    words=(*data.DIGITS, *data.INKS, *data.PAPERS, *data.SIZES, *data.PLACES, *_GLUE),
    max_tokens=18,
    latent_channels=8,
    autoencoder=(16, 16, 48, 64),
    width=96,
    chunks=24,
    autoencoder_plan=Plan(updates=1_300, batch=32, matrix_lr=0.02, adam_lr=2e-3, ema=0.995),
    denoiser_plan=Plan(updates=10_000, batch=64, matrix_lr=0.02, adam_lr=2e-3, ema=0.998),
)
