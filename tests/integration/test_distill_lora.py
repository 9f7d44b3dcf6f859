"""A LoRA student from the job to diffusers: our engine's pictures and those of `load_lora_weights`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.artefact import export_lora
from engines.loader import load_student
from engines.noise import noise
from engines.student import sample
from tests import tiny_sd
from tests.distilling import DEPLOYMENT, Workshop, workshop
from tests.redis_server import RedisServer

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:.*:UserWarning")]
PROMPTS = ["a red circle", "two shapes on white", "a blue square on the left"]
SEEDS = [5, 6, 7]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    server = RedisServer().start()
    yield workshop(tmp_path_factory.mktemp("shop"), server.url)
    server.close()


@pytest.fixture(scope="module")
def student(shop: Workshop) -> str:
    """A DMD student whose critic is an adapter too; the learning rate is high so that the adapter shows."""
    job = shop.submit(
        student={"name": "tiny-lora", "steps": [1, 2], "train": {"lora": {"rank": 4, "alpha": 8}}},
        method={"name": "dmd", "batch": 8, "fake_updates": 2, "fake_warmup": 2, "eta": 0.0, "lr": 1e-2},
        schedule={"name": "optimal_steps"},
    )
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")
    version: str = (shop.records.read(job.id, "result.json") or {})["student"]
    return version


def test_a_lora_job_ends_as_a_student_on_its_teachers_graph(shop: Workshop, student: str) -> None:
    manifest = shop.registry.student(student)
    assert (manifest.kind, manifest.guidance.mode, manifest.inputs) == ("lora", "baked", frozenset())
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    assert current.tiers["low"].student == student


@pytest.mark.parametrize("steps", [1, 2])
def test_its_lora_gives_our_engines_picture_in_diffusers(
    steps: int, shop: Workshop, student: str, tmp_path: Path
) -> None:
    manifest = shop.registry.student(student)
    ours = sample(load_student(shop.registry, manifest), PROMPTS, SEEDS, steps)
    export_lora(shop.registry, student, tmp_path)
    directory = tiny_sd.write(tmp_path / "teacher")
    latents = torch.stack([noise(seed, 0, tiny_sd.LATENT) for seed in SEEDS])
    theirs, untrained = (
        _pictures(directory, latents, list(manifest.schedules[steps].times[:-1]), lora) for lora in (tmp_path, None)
    )
    assert (ours.int() - theirs.int()).abs().max() <= 2
    assert (theirs.int() - untrained.int()).abs().max() > 20


def _pictures(directory: Path, latents: Tensor, sigmas: list[float], lora: Path | None) -> Tensor:
    """uint8 [B, 3, H, W] of diffusers' own pipeline, unguided as a baked student is asked."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.init_noise_sigma = 1.0  # StableDiffusionPipeline asks for it, flow schedulers have none
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pictures = pipeline(
        PROMPTS, height=16, width=16, latents=latents, guidance_scale=1.0, output_type="np",
        num_inference_steps=len(sigmas), sigmas=sigmas,
    ).images  # fmt: skip
    return torch.from_numpy((pictures * 255).round().astype("uint8")).permute(0, 3, 1, 2)
