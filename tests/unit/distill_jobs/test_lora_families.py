"""An adapter of each family of models loads in diffusers and gives our engine's picture."""

from pathlib import Path

import pytest
import torch

from distill_jobs.lora import adapted, merged, portable
from distill_jobs.student_spec import LoraSpec
from distill_jobs.teachers import diffusers
from engines.artefact import export_lora, import_diffusers, make_student
from engines.loader import load_student
from engines.manifest import Guidance
from engines.noise import noise
from engines.registry.memory import MemoryRegistry
from engines.student import sample
from tests import tiny_families
from tests.tiny_families import FAMILIES, OF_PICTURES

PROMPTS, SEEDS, STEPS = ["a red circle", "two shapes on the left"], [11, 12], 2
LORA = LoraSpec(rank=2, alpha=4.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*OF_PICTURES} - {"pixart"}))  # whose pipeline loads no LoRA
def test_a_lora_gives_our_engines_picture_in_diffusers(name: str, tmp_path: Path) -> None:
    tiny, pipeline, registry = FAMILIES[name], tiny_families.pipeline(name), MemoryRegistry()
    pipeline.save_pretrained(tmp_path / "teacher")
    size = tiny.pixels
    guidance = Guidance(mode="embedded", default=1.0, maximum=10.0) if "w" in tiny.inputs else Guidance()
    version = import_diffusers(
        tmp_path / "teacher", registry, name="tiny", schedules=(STEPS,), guidance=guidance, resolution=(size, size),
        inputs=tiny.inputs, golden_prompts=PROMPTS[:1], num_frames=tiny.frames,  # type: ignore[arg-type]
    )  # fmt: skip
    teacher = diffusers.load(registry, version)
    network = adapted(teacher.denoiser, LORA)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in (value for key, value in network.named_parameters() if ".lora_B." in key):
            value.copy_(0.05 * torch.randn_like(value))
    adapter = diffusers.blob_weights(network.state_dict())
    weights = merged(diffusers.blob_weights(teacher.denoiser.state_dict()), adapter, LORA)
    made = make_student(
        registry, version, "tiny-lora", denoiser_weights=weights, adapter=portable(adapter, LORA),
        schedules=teacher.manifest.schedules, golden_prompts=PROMPTS[:1],
    )  # fmt: skip
    manifest = registry.student(made)
    ours = sample(load_student(registry, manifest), PROMPTS, SEEDS, STEPS, rounded=False)

    latents = torch.stack([noise(seed, 0, manifest.latent_shape(size, size)) for seed in SEEDS])
    scales = {"guidance_scale": 1.0 if tiny.w is None else tiny.scale - tiny.w + 1}  # what is w = 1 to this pipeline
    scales |= {"true_cfg_scale": 1.0} if "true_cfg_scale" in tiny.call else {}
    asked = {**tiny.call, **scales, "output_type": "pt"}

    def theirs() -> torch.Tensor:
        out = pipeline(
            list(PROMPTS), height=size, width=size, latents=tiny.latents(latents), num_inference_steps=STEPS, **asked
        )
        return 255 * tiny.pictures(out)

    untrained = theirs()
    export_lora(registry, made, tmp_path)
    pipeline.load_lora_weights(tmp_path)
    assert (theirs() - ours).abs().max() <= 2
    assert (untrained - ours).abs().max() > 20
