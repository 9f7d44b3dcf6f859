"""Each family's pictures are those of diffusers' own pipeline, with the scheduler that the family ships."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.artefact import import_diffusers
from engines.loader import load_student
from engines.manifest import Guidance, StudentManifest
from engines.noise import noise
from engines.registry.memory import MemoryRegistry
from engines.student import sample
from tests import tiny_families
from tests.tiny_families import FAMILIES, Tiny

PROMPTS, SEEDS, STEPS = ["a red circle", "two shapes on the left"], [11, 12], 4


@dataclass(frozen=True)
class Shipped:
    """A tiny pipeline as diffusers runs it and as a registry holds it."""

    tiny: Tiny
    pipeline: Any
    registry: MemoryRegistry
    manifest: StudentManifest


@pytest.fixture(scope="module", params=FAMILIES)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    tiny, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    pipeline, registry = tiny_families.pipeline(request.param), MemoryRegistry()
    pipeline.save_pretrained(folder)
    return Shipped(tiny, pipeline, registry, registry.student(imported(tiny, folder, registry)))


def imported(tiny: Tiny, folder: Path, registry: MemoryRegistry) -> str:
    mode = "none" if tiny.w is None else "embedded" if "w" in tiny.inputs else "cfg"
    guidance = Guidance() if tiny.w is None else Guidance(mode=mode, default=tiny.w, maximum=10.0)  # type: ignore[arg-type]
    return import_diffusers(
        folder, registry, name="tiny", schedules=(STEPS,), guidance=guidance, inputs=tiny.inputs,  # type: ignore[arg-type]
        resolution=(tiny.pixels, tiny.pixels), golden_prompts=PROMPTS[:1],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_pictures_are_those_of_diffusers_own_pipeline(shipped: Shipped) -> None:
    tiny, manifest = shipped.tiny, shipped.manifest
    latents = torch.stack([noise(seed, 0, manifest.latent_shape(tiny.pixels, tiny.pixels)) for seed in SEEDS])
    asked = {"guidance_scale": tiny.scale, "output_type": "pt"} | dict(tiny.call)
    expected = tiny.pictures(
        shipped.pipeline(
            list(PROMPTS), height=tiny.pixels, width=tiny.pixels, latents=tiny.latents(latents),
            num_inference_steps=STEPS, **asked,
        )
    )  # fmt: skip
    made = sample(load_student(shipped.registry, manifest), PROMPTS, SEEDS, STEPS, rounded=False) / 255
    assert made.shape == expected.shape
    assert (made - expected).abs().max() <= 1e-4
    inside = (expected > 0.02) & (expected < 0.98)
    assert inside.float().mean() > 0.5, "a picture that is black or white compares nothing"
    assert (expected[0] - expected[1]).abs().max() > 0.05
