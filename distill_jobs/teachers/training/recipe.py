"""What a task's teacher is made of and how long it is trained; `distill_jobs/teachers/<task>/recipe.py` holds one."""

from __future__ import annotations

from dataclasses import dataclass

from distill_jobs.tasks.base import Task
from distill_jobs.teachers.training.loop import Plan
from engines import plugins


@dataclass(frozen=True, slots=True)
class Slim:
    """A second autoencoder, taught the first one's latents, that ships instead of it because it decodes faster."""

    widths: tuple[int, ...]
    plan: Plan


@dataclass(frozen=True, slots=True)
class Recipe:
    task: Task
    words: tuple[str, ...]  # all that captions are made of
    max_tokens: int  # of a caption, with its start and its end
    latent_channels: int
    autoencoder: tuple[int, ...]  # channels from full resolution down, each half as wide and high as the one before
    width: int  # of the text encoder and the denoiser
    chunks: int  # of `latents.CHUNK` pictures that the denoiser sees again and again
    autoencoder_plan: Plan
    denoiser_plan: Plan
    slim: Slim | None = None

    @property
    def latent_side(self) -> int:
        return int(self.task.size_px // 2 ** (len(self.autoencoder) - 1))


def load(task: str) -> Recipe:
    """The recipe of this task's teacher.

    Raises:
        UnknownPlugin: no embedded teacher is of this task.
    """
    recipe: Recipe = plugins.load(f"distill_jobs.teachers.{task}", "recipe", "RECIPE")
    return recipe
