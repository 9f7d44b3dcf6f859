"""Networks that read the mask and the rest of the picture, beside diffusers' own pipelines of inpainting."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.artefact import import_diffusers
from engines.backends.base import Choice, Profile
from engines.contract import Sampling
from engines.editing import GREY, Looked, changes_of, without
from engines.errors import InvalidRequest
from engines.export import export_pipeline
from engines.families import sd
from engines.imports import import_student
from engines.loader import load_student
from engines.manifest import ProcessSpec, Schedule
from engines.registry.memory import MemoryRegistry
from engines.student import LoadedStudent, sample
from tests import tiny_families, tiny_sd
from tests.tiny_families import STEPS, Shipped
from tests.unit.engines.test_editing import INPAINT, PROMPT, SEED, by_diffusers, lower_half, picture


def looked(student: LoadedStudent, edited: Tensor | None) -> Looked:
    levels = picture(student.manifest.resolutions[0][0])
    latents, deviation = student.family.look(torch.stack([levels, without(levels, edited)]))
    changes = None if edited is None else changes_of(edited, student.manifest.downscale)
    spread = [None, None] if deviation is None else list(deviation)
    return Looked(latents[0], spread[0], changes, Looked(latents[1], spread[1]))


def by_us(own: Shipped, strength: float, edited: Tensor | None) -> Tensor:
    student = load_student(own.registry, own.manifest)
    first = own.manifest.first_step(STEPS, strength)
    seen = [looked(student, edited)]
    return sample(student, [PROMPT], [SEED], STEPS, rounded=False, looked=seen, first=first)[0] / 255


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "everywhere"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.filterwarnings("ignore")
def test_a_picture_is_inpainted_as_diffusers_inpaints_it(name: str, strength: float, masked: bool) -> None:
    own = tiny_families.inpainting(name)
    edited = lower_half(own.tiny.pixels) if masked else None
    mask = torch.ones(own.tiny.pixels, own.tiny.pixels) if edited is None else edited.float()
    expected = by_diffusers(own, INPAINT[name], strength, mask_image=mask[None, None])
    made = by_us(own, strength, edited)
    assert (made - expected).abs().max() <= 1e-4
    other = by_us(own, strength, None if masked else lower_half(own.tiny.pixels))
    assert (other - made).abs().max() > 0.02


@pytest.mark.filterwarnings("ignore")
def test_without_a_picture_all_may_change() -> None:
    """A grey picture under a mask of ones, and its mean code: nothing but the start is drawn."""
    own = tiny_families.inpainting("sd")
    student = load_student(own.registry, own.manifest)
    made = sample(student, [PROMPT], [SEED], STEPS, rounded=False)
    grey, _ = student.family.look(torch.full((1, 3, own.tiny.pixels, own.tiny.pixels), GREY))
    seen = [Looked(torch.zeros_like(grey[0]), None, None, Looked(grey[0]))]
    assert (made - sample(student, [PROMPT], [SEED], STEPS, rounded=False, looked=seen)).abs().max() <= 1e-3


@pytest.mark.filterwarnings("ignore")
def test_rows_with_a_picture_and_without_share_a_call() -> None:
    own = tiny_families.inpainting("sd")
    family = load_student(own.registry, own.manifest).family
    draw = torch.Generator().manual_seed(0)
    x, shown = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(5, 8, 8, generator=draw)
    t, cond, w = torch.tensor([0.5, 0.25]), family.encode([PROMPT, "two shapes"]), [None, 2.0]
    together = family.denoise(x, t, cond, w=w, seen=[None, shown])
    for k, seen in enumerate((None, [shown])):
        alone = family.denoise(x[k : k + 1], t[k : k + 1], cond[k : k + 1], w=[w[k]], seen=seen)
        assert (together[k] - alone[0]).abs().max() <= 1e-5
    assert family.sees


def test_the_network_itself_is_not_asked_without_a_mask() -> None:
    own = tiny_families.inpainting("sd")
    network = sd.DenoiserNet(own.pipeline.unet, sd.Packing(12, 16))
    with pytest.raises(InvalidRequest, match="cannot be asked without a mask"):
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 12, 16))
    assert [(port.name, port.shape) for port in network.ports if port.name in "x seen"] == [
        ("x", (4, 8, 8)),
        ("seen", (5, 8, 8)),
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_reads_them_too(tmp_path: Path) -> None:
    own = tiny_families.inpainting("sd")
    plain = load_student(own.registry, own.manifest)
    compiled = load_student(
        own.registry,
        own.manifest,
        choice=Choice("openvino", "fp32"),
        profile=Profile((1, 2), threads=1),
        cache=tmp_path,
    )
    seen = [looked(plain, lower_half(own.tiny.pixels))]
    one, other = (sample(made, [PROMPT], [SEED], STEPS, looked=seen).int() for made in (plain, compiled))
    assert (one - other).abs().max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_a_student_of_such_a_directory_is_imported_and_exported_as_one(tmp_path: Path) -> None:
    own, registry = tiny_families.inpainting("sd"), MemoryRegistry()
    sampling = Sampling(recipe="lcm", steps=(STEPS,))
    made = import_student(registry, own.directory, "tiny", sampling=sampling, golden_prompts=[PROMPT])
    manifest = registry.student(made.version)
    assert (manifest.family, manifest.latent_channels) == ("sd", 4)
    straight = import_diffusers(
        own.directory,
        registry,
        name="straight",
        schedules=[Schedule(times=(1.0, 0.0))],
        process=ProcessSpec(kind="rf"),
        prediction="flow",
    )
    export_pipeline(registry, straight, tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    export_pipeline(tiny_sd.teacher().registry, tiny_sd.teacher().version, tmp_path / "plain")
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
