"""Encoded training pictures on disk: encoding once is what makes a denoiser update cost only the denoiser."""

from __future__ import annotations

import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_jobs.tasks.base import Pictures, Split, Task
from distill_jobs.teachers.training import tokenizer
from distill_jobs.teachers.training.recipe import Recipe

_log = logging.getLogger(__name__)

CHUNK = 5_000
_SEED = 30_000_000
_BATCH = 50


@dataclass(frozen=True, slots=True)
class Latents:
    """Training latents at unit standard deviation and their captions' token ids."""

    x0: Tensor  # [N, C, H, W] fp32
    ids: Tensor  # [N, L] int64
    scaling_factor: float  # what the VAE's own latents were multiplied by


def write(recipe: Recipe, vae: AutoencoderKL, folder: Path) -> None:
    """Encodes what is missing of the recipe's chunks; several processes may share a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(recipe.chunks) if not _path(folder, index).exists()]
    for index in missing:
        if _path(folder, index).exists():  # another process was faster
            continue
        fresh = folder / f"{index:04d}.{os.getpid()}.new"
        save_file(_encode_chunk(recipe, vae, index), fresh)
        os.replace(fresh, _path(folder, index))
        _log.info("encoded chunk %d of %d", index + 1, recipe.chunks)


def read(folder: Path, *, chunks: int) -> Latents:
    parts = [load_file(_path(folder, index)) for index in range(chunks)]
    factor = 1.0 / float(parts[0]["latents"].float().std())
    x0 = torch.cat([part["latents"] for part in parts]).float() * factor
    return Latents(x0, torch.cat([part["ids"] for part in parts]).long(), factor)


def chunk(folder: Path, index: int) -> Tensor:
    """The VAE's own latents [CHUNK, C, H, W] of `chunk_pictures(task, index)`."""
    coded: Tensor = load_file(_path(folder, index))["latents"]
    return coded.float()


def chunk_pictures(task: Task, index: int) -> Pictures:
    return task.sample(CHUNK, _SEED + index, split="train")


def pictures(task: Task, n: int, seed: int, split: Split) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1]."""
    return as_input(task.sample(n, seed, split=split))


def as_input(batch: Pictures) -> Tensor:
    return torch.from_numpy(batch.pixels).float() / 127.5 - 1


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}.safetensors"


@torch.no_grad()
def _encode_chunk(recipe: Recipe, vae: AutoencoderKL, index: int) -> dict[str, Tensor]:
    batch = chunk_pictures(recipe.task, index)
    rng = random.Random(_SEED + index)
    captions = [tokenizer.loosen(caption, rng) for caption in batch.captions]
    with torch.autocast("cpu", torch.bfloat16):
        latents = [vae.encode(part).latent_dist.mode().float() for part in torch.split(as_input(batch), _BATCH)]
    ids = tokenizer.encode(tokenizer.build(recipe), captions)
    return {"latents": torch.cat(latents).half(), "ids": ids.to(torch.int16)}
