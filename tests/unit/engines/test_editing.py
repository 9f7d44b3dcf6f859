"""Editing is diffusers' own: img2img and inpainting of each family, from the same picture, seed and strength."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.contract import Sampling
from engines.editing import Looked, changes_of
from engines.errors import InvalidRequest
from engines.imports import import_student
from engines.loader import load_student
from engines.registry.memory import MemoryRegistry
from engines.student import LoadedStudent, sample
from tests import tiny_families
from tests.tiny_families import FAMILIES, OF_PICTURES, STEPS, Shipped

PROMPT, SEED = "a red circle", 11
IMG2IMG = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
    "qwen_image": "QwenImageImg2ImgPipeline",
    "z_image": "ZImageImg2ImgPipeline",
}
INPAINT = {
    "sd": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline",
    "flux": "FluxInpaintPipeline",
}


def picture(pixels: int) -> Tensor:
    """Something to change, [3, H, W] in levels 0..255."""
    y, x = torch.meshgrid(torch.arange(pixels), torch.arange(pixels), indexing="ij")
    return torch.stack([255.0 * x / (pixels - 1), 255.0 * y / (pixels - 1), 90.0 + 10.0 * ((x // 4 + y // 4) % 2)])


def lower_half(pixels: int) -> Tensor:
    """What may change, bool [H, W]."""
    edited = torch.zeros(pixels, pixels, dtype=torch.bool)
    edited[pixels // 2 :] = True
    return edited


def by_diffusers(own: Shipped, pipeline: str, strength: float, **more: Any) -> Tensor:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        editor = getattr(diffusers, pipeline).from_pipe(own.pipeline)
        editor.set_progress_bar_config(disable=True)
        asked = {"guidance_scale": own.tiny.scale} | dict(own.tiny.call) | more
        if "negative_prompt" in asked:
            asked["negative_prompt"] = ""
        takes = inspect.signature(editor.__call__).parameters
        size = {side: own.tiny.pixels for side in ("height", "width") if side in takes}
        made: Tensor = editor(
            PROMPT, image=picture(own.tiny.pixels)[None] / 255, strength=strength, num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED), output_type="pt", **size, **asked,
        ).images  # fmt: skip
    return made[0]


def looked(student: LoadedStudent, pixels: int, edited: Tensor | None = None) -> Looked:
    latents, deviation = student.family.look(picture(pixels)[None])
    changes = None if edited is None else changes_of(edited, student.manifest.downscale)
    return Looked(latents[0], None if deviation is None else deviation[0], changes)


def by_us(own: Shipped, strength: float, edited: Tensor | None = None) -> Tensor:
    student = load_student(own.registry, own.manifest)
    first = own.manifest.first_step(STEPS, strength)
    seen = [looked(student, own.tiny.pixels, edited)]
    return sample(student, [PROMPT], [SEED], STEPS, rounded=False, looked=seen, first=first)[0] / 255


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", IMG2IMG)
@pytest.mark.filterwarnings("ignore")
def test_a_picture_is_changed_as_diffusers_changes_it(name: str, strength: float) -> None:
    own = tiny_families.shipped(name)
    expected = by_diffusers(own, IMG2IMG[name], strength)
    assert (by_us(own, strength) - expected).abs().max() <= 1e-4
    assert ((expected > 0.02) & (expected < 0.98)).float().mean() > 0.3


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", INPAINT)
@pytest.mark.filterwarnings("ignore")
def test_the_rest_of_a_picture_stays_as_diffusers_keeps_it(name: str, strength: float) -> None:
    own = tiny_families.shipped(name)
    edited = lower_half(own.tiny.pixels)
    expected = by_diffusers(own, INPAINT[name], strength, mask_image=edited[None, None].float())
    made = by_us(own, strength, edited)
    assert (made - expected).abs().max() <= 1e-4
    assert (by_us(own, strength) - made).abs().max() > 0.02


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.filterwarnings("ignore")
def test_a_solver_that_remembers_begins_in_the_middle_as_one_without_a_past(scheduler: str, tmp_path: Path) -> None:
    import diffusers

    tiny, made, registry = FAMILIES["sd"], tiny_families.pipeline("sd"), MemoryRegistry()
    made.scheduler = getattr(diffusers, scheduler).from_config(made.scheduler.config)
    made.save_pretrained(tmp_path)
    own = Shipped(tiny, made, tmp_path, registry, tiny_families.imported(tiny, tmp_path, registry))
    assert (by_us(own, 0.75) - by_diffusers(own, IMG2IMG["sd"], 0.75)).abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore")
def test_fresh_noise_goes_on_where_the_start_left_the_seed(tmp_path: Path) -> None:
    """An LCM draws at every step, and diffusers draws all from one generator: the code, the start, then the steps."""
    from diffusers import DDIMScheduler, LCMScheduler

    chain = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    made, registry = tiny_families.pipeline("sd"), MemoryRegistry()
    made.scheduler = DDIMScheduler(**chain, clip_sample=False, set_alpha_to_one=False)
    made.save_pretrained(tmp_path)
    sampling = Sampling(recipe="lcm", steps=(STEPS,))
    version = import_student(registry, tmp_path, "tiny", sampling=sampling, golden_prompts=[PROMPT]).version
    made.scheduler = LCMScheduler(**chain)
    own = Shipped(FAMILIES["sd"], made, tmp_path, registry, version)
    for strength in (0.75, 1.0):
        expected = by_diffusers(own, IMG2IMG["sd"], strength, guidance_scale=1.0)
        assert (by_us(own, strength) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", OF_PICTURES)
@pytest.mark.filterwarnings("ignore")
def test_every_family_s_vae_sees_what_its_own_encoder_does(name: str) -> None:
    """Scaled as latents are in its pipeline, which the decoder undoes."""
    own = tiny_families.shipped(name)
    vae, student = own.pipeline.vae, load_student(own.registry, own.manifest)
    pixels = picture(own.tiny.pixels)[None] / 127.5 - 1
    video = "temperal_downsample" in vae.config
    with torch.no_grad():
        coded = vae.encode(pixels.unsqueeze(2) if video else pixels)
        mean = coded.latent_dist.mean if hasattr(coded, "latent_dist") else coded.latent
        latents, deviation = student.family.look(picture(own.tiny.pixels)[None])
        back = vae.decode(mean).sample
    shown = (back[:, :, 0] if video else back) * 127.5 + 127.5
    assert (student.family.levels(latents) - shown.clamp(0, 255)).abs().max() <= 0.02
    assert (deviation is None) != hasattr(coded, "latent_dist")


def test_a_student_of_videos_sees_no_picture() -> None:
    own = tiny_families.shipped("wan")
    with pytest.raises(InvalidRequest, match="makes videos"):
        load_student(own.registry, own.manifest).family.look(picture(own.tiny.pixels)[None])


def test_a_position_may_change_if_any_of_its_pixels_may() -> None:
    edited = torch.zeros(4, 6, dtype=torch.bool)
    edited[3, 2] = True
    assert changes_of(edited, 2).tolist() == [[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]


@pytest.mark.parametrize(
    ("steps", "strength", "first"), [(4, 0.5, 2), (4, 0.74, 2), (4, 1.0, 0), (10, 0.7, 3), (100, 0.29, 71), (1, 1.0, 0)]
)
def test_strength_is_the_share_of_the_steps_rounded_down(steps: int, strength: float, first: int) -> None:
    assert tiny_families.shipped("sd").manifest.first_step(steps, strength) == first


def test_a_share_of_no_step_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"0\.75 of 1 steps.*1 or more"):
        tiny_families.shipped("sd").manifest.first_step(1, 0.75)
