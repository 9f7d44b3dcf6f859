"""Autoencoders of the embedded teachers: one finds the latents, a slim one may be taught them and ship instead."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill_jobs.teachers.training.recipe import Recipe

NORM_GROUPS = 1  # one mean and scale a picture: finer groups forget how bright a flat picture was
_L1_WEIGHT = 0.3  # sharper edges than squares alone
_KL_WEIGHT = 2e-4  # high enough that the decoder shrugs off the denoiser's small errors
_LATENT_NOISE = 0.25  # the first decoder's tolerance, handed on to the slim one


def build(recipe: Recipe, widths: tuple[int, ...]) -> AutoencoderKL:
    depth = len(widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=NORM_GROUPS,
        mid_block_add_attention=False,
        sample_size=recipe.task.size_px,
        scaling_factor=1.0,
    )


def loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Reconstruction and rate of pictures [B, 3, H, W] in [-1, 1]; `total` is what to minimise."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        decoded = vae.decode(mean + noise * (0.5 * log_variance).exp()).sample.float()
    error = decoded - pictures
    squared = error.square().mean()
    rate = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"total": squared + _L1_WEIGHT * error.abs().mean() + _KL_WEIGHT * rate, "squared": squared, "rate": rate}


def slim_loss(vae: AutoencoderKL, pictures: Tensor, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Teaches both halves apart: pictures [B, 3, H, W] to the first network's latents, and those back to pictures."""
    noise = torch.randn(latents.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = vae.decode(latents + _LATENT_NOISE * noise).sample.float()
        encoded = vae.encode(pictures).latent_dist.mean.float()
    error = decoded - pictures
    squared, aside = error.square().mean(), (encoded - latents).square().mean()
    return {"total": squared + _L1_WEIGHT * error.abs().mean() + aside, "squared": squared, "latents": aside}


@torch.no_grad()
def psnr_db(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean over pictures [B, 3, H, W] in [-1, 1] of the reconstruction's PSNR, from 8-bit black to white."""
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    squared = (decoded - pictures).square().mean((1, 2, 3)) / 4
    return float((-10 * squared.log10()).mean())
