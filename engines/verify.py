"""Whether a student's forms agree: diffusers on its exported directory, and the compiled engine, against `eager`.

All are given the same prompts and the same starting noise. `eager` in fp32 is the sampler of the evaluation while
training and the reference of every backend, so what agrees with it agrees with what was trained.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.artefact import prompts_of
from engines.backends.base import Choice, Tolerance, psnr, tolerance
from engines.errors import InvalidManifest, InvalidRequest, NotBuilt
from engines.export import SAMPLING, export_pipeline
from engines.loader import load_student
from engines.manifest import shown
from engines.noise import noise
from engines.registry.base import Registry
from engines.student import LoadedStudent, sample

EXPORTED = Tolerance(levels=2, share=0.99, psnr_db=45.0)
"""For diffusers: at most 1 level where all times are whole thousandths, as most are; else see `engines.scheduler`. A
step at t = .4666 of the embedded teacher moved .4 % of the values by more than 2 levels, 57 dB."""
_FIRST_SEED = 2000
_BATCH = 8  # pictures; a video is as long as many of them


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pictures of one form against `eager` at one step count. `fault` says what is too far, if anything is."""

    form: str
    steps: int
    worst_levels: int
    mean_levels: float
    psnr_db: float
    fault: str | None


@dataclass(frozen=True, slots=True)
class Verification:
    """`missing` says why diffusers was not compared at some step counts, or at any."""

    comparisons: tuple[Comparison, ...]
    missing: str | None = None

    @property
    def passed(self) -> bool:
        return all(one.fault is None for one in self.comparisons)


def verify(
    registry: Registry,
    version: str,
    *,
    choice: Choice,
    cache: Path,
    directory: Path | None = None,
    prompts: Sequence[str] | None = None,
) -> Verification:
    """Compares every step count of a student. Without the `directory` of an export one is made for the time being.

    The prompts are those of its golden samples, unless others are given. Those with words that the student cannot read
    are left out: serving drops such words, and diffusers does not.

    Raises:
        InvalidManifest: the directory is no export.
        InvalidRequest: the student can read none of the prompts.
    """
    manifest = registry.student(version)
    eager = load_student(registry, manifest)
    asked = list(prompts or prompts_of(registry, manifest))
    ignored = eager.family.tokenize(asked).ignored_words
    prompts = [prompt for prompt, words in zip(asked, ignored, strict=True) if not words]
    if not prompts:
        raise InvalidRequest(f"{shown(version)} can read none of the prompts: give others")
    seeds = range(_FIRST_SEED, _FIRST_SEED + len(prompts))
    draw = partial(sample, prompts=prompts, seeds=seeds, batch=1 if manifest.frames else _BATCH)
    expected = {k: draw(eager, steps=k) for k in sorted(manifest.schedules)}
    compiled = load_student(registry, manifest, choice=choice, cache=cache)
    form, allowed = f"{choice.backend} {compiled.precision}", tolerance(choice.backend, compiled.precision)
    found = [compare(form, k, draw(compiled, steps=k), expected[k], allowed) for k in expected]
    with tempfile.TemporaryDirectory() as folder:
        try:
            if directory is None:
                export_pipeline(registry, version, Path(folder))
            drawn = _by_diffusers(directory or Path(folder), eager, prompts, seeds)
        except NotBuilt as error:
            return Verification(tuple(found), error.message)
    found += [compare("diffusers", k, drawn[k], expected[k], EXPORTED) for k in expected if k in drawn]
    lost = ", ".join(str(k) for k in expected if k not in drawn)
    return Verification(tuple(found), f"no scheduler of diffusers samples {lost} steps as we do" if lost else None)


def compare(form: str, steps: int, pixels: Tensor, expected: Tensor, allowed: Tolerance) -> Comparison:
    """Of pictures uint8 [N, 3, H, W] or videos [N, T, 3, H, W]."""
    error = (pixels.to(torch.int16) - expected.to(torch.int16)).abs()
    worst, mean = int(error.max()), float(error.float().mean())
    return Comparison(form, steps, worst, mean, psnr(pixels, expected), allowed.fault(pixels, expected))


def _by_diffusers(
    directory: Path, student: LoadedStudent, prompts: Sequence[str], seeds: Sequence[int]
) -> dict[int, Tensor]:
    """Pictures uint8 [N, 3, H, W] of the directory's own pipeline at each count of its `sampling.json`."""
    import diffusers

    try:
        asked: Mapping[str, Any] = json.loads((directory / SAMPLING).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidManifest(f"{directory} is no exported student: {error}; export it first") from error
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([noise(seed, 0, student.latent_shape) for seed in seeds])
    kind = type(pipeline.scheduler)
    drawn = {}
    for steps, sampling in asked.items():
        pipeline.scheduler = kind.from_config(sampling["scheduler"])
        sigmas, scale = (
            np.array(sampling["sigmas"]),
            sampling["guidance_scale"],
        )  # of a list the scheduler makes nothing
        asked_for = {"latents": latents.clone(), "sigmas": sigmas, "guidance_scale": scale, "output_type": "pt"}
        made = pipeline(list(prompts), **asked_for).images
        drawn[int(steps)] = (made * 255).round().to(torch.uint8)
    return drawn
