"""The shapes teacher: 64×64 pictures as 4×4×16 latents, through a wide autoencoder that finds them and a slim one.

Half of an autoencoder's cost lies at full resolution, where flat shapes need few channels; so width grows only as the
maps shrink. Finding the latents takes capacity, decoding them does not: the slim one takes less than half the time.
"""

from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers.shapes import data
from distill_jobs.teachers.training.loop import Plan
from distill_jobs.teachers.training.recipe import Recipe, Slim

_GLUE = (
    "a",
    "an",
    "and",
    "on",
    "in",
    "at",
    "the",
    "of",
    "left",
    "right",
    "above",
    "below",
    "row",
    "column",
    "background",
    "over",
)

RECIPE = Recipe(
    task=TASK,
    words=(*data.KINDS, *data.COLOURS, *data.SIZES, *data.PLACES, *data.BACKGROUNDS, *_GLUE),
    max_tokens=24,
    latent_channels=16,
    autoencoder=(8, 16, 48, 96, 96),
    width=128,
    chunks=20,
    autoencoder_plan=Plan(updates=2_200, batch=16, matrix_lr=0.02, adam_lr=2e-3, ema=0.995),
    denoiser_plan=Plan(updates=4_200, batch=64, matrix_lr=0.02, adam_lr=2e-3, ema=0.998),
    slim=Slim((8, 8, 16, 48, 64), Plan(updates=1_400, batch=32, matrix_lr=0.02, adam_lr=2e-3, ema=0.995)),
)
