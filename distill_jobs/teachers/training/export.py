"""Writes the trained networks as the diffusers directory that everything else reads, in half precision."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline

from distill_jobs.teachers.training import tokenizer
from distill_jobs.teachers.training.denoiser import TextToLatent
from distill_jobs.teachers.training.recipe import Recipe


def pipeline(
    recipe: Recipe, vae: AutoencoderKL, networks: TextToLatent, scaling_factor: float
) -> StableDiffusionPipeline:
    """The stock pipeline around our networks; latents are divided by `scaling_factor` before decoding."""
    vae.register_to_config(scaling_factor=scaling_factor)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=networks.text,
        tokenizer=tokenizer.build(recipe),
        unet=networks.unet,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(recipe: Recipe, vae: AutoencoderKL, networks: TextToLatent, scaling_factor: float, directory: Path) -> None:
    """Saves in half precision, which the networks given are left in."""
    half = pipeline(recipe, vae.half(), networks.half(), scaling_factor)
    half.save_pretrained(directory, safe_serialization=True)
    _load_as_float(directory / "text_encoder" / "config.json")


def _load_as_float(config: Path) -> None:
    """transformers loads in the precision that the config names, diffusers in fp32: both must agree by default."""
    fields = json.loads(config.read_text())
    fields["dtype"] = "float32"
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
