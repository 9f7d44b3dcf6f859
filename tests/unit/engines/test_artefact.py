import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from engines.artefact import ADAPTER, export_diffusers, export_lora, import_diffusers, make_student, prompts_of
from engines.errors import GraphMismatch, InvalidManifest, InvalidRequest, NotBuilt
from engines.loader import load_student
from engines.manifest import Component, Guidance, Schedule
from engines.parts import load_weights
from engines.registry.memory import MemoryRegistry
from engines.student import sample
from tests import tiny_sd

TWO = [Schedule(times=(1.0, 0.6, 0.0), eta=1.0)]


def test_the_same_directory_is_the_same_version_anywhere() -> None:
    teacher, registry = tiny_sd.teacher(), MemoryRegistry()
    again = import_diffusers(
        teacher.directory, registry, name="tiny", schedules=tiny_sd.SCHEDULES, guidance=tiny_sd.GUIDANCE
    )
    assert again == teacher.version
    assert registry.student(again).prediction == "flow"
    assert registry.student(again).resolutions == ((16, 16),)


def test_weights_stay_as_they_are_stored() -> None:
    teacher = tiny_sd.teacher()
    blob = teacher.manifest.components["denoiser"].weights
    stored = (teacher.directory / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert teacher.registry.read_blob(blob) == stored


def test_half_precision_weights_and_a_tiny_vae_are_imported(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    version = import_diffusers(
        tiny_sd.write(tmp_path, tiny_vae=True, fp16=True), registry, name="half", schedules=tiny_sd.SCHEDULES
    )
    manifest = registry.student(version)
    assert {w.dtype for w in load_weights(registry, manifest.components["denoiser"]).values()} == {torch.float16}
    pictures = sample(load_student(registry, manifest), ["a red circle"], [1], 1)
    assert pictures.shape == (1, 3, 16, 16)


def test_a_schedule_only_student_shares_every_component() -> None:
    teacher = tiny_sd.teacher()
    version = make_student(teacher.registry, teacher.version, "tiny-schedule", schedules=TWO)
    student = teacher.registry.student(version)
    assert (student.kind, student.base) == ("schedule", teacher.version)
    assert student.components == teacher.manifest.components
    assert student.golden != teacher.manifest.golden
    assert set(student.schedules) == {2}


def test_students_are_of_their_teacher_s_task() -> None:
    teacher, registry = tiny_sd.teacher(), MemoryRegistry()
    base = import_diffusers(teacher.directory, registry, name="tiny", schedules=tiny_sd.SCHEDULES, task="digits")
    student = make_student(registry, base, "tiny-schedule", schedules=TWO)
    assert (registry.student(base).task, registry.student(student).task) == ("digits", "digits")


def test_new_weights_are_published_with_all_else_shared() -> None:
    teacher = tiny_sd.teacher()
    weights = load_weights(teacher.registry, teacher.manifest.components["denoiser"])
    version = make_student(
        teacher.registry,
        teacher.version,
        "tiny-trained",
        denoiser_weights={name: value * 1.01 for name, value in weights.items()},
        schedules=TWO,
        guidance=Guidance(mode="baked", default=3.0, minimum=3.0, maximum=3.0),
    )
    student = teacher.registry.student(version)
    assert student.components["decoder"] == teacher.manifest.components["decoder"]
    assert student.components["denoiser"] != teacher.manifest.components["denoiser"]
    assert (student.kind, student.dtype, student.guidance.mode) == ("full", "fp16", "baked")


def test_a_student_that_reads_s_begins_with_the_layer_at_zero() -> None:
    teacher = tiny_sd.teacher()
    version = make_student(teacher.registry, teacher.version, "tiny-s", schedules=TWO, inputs=["s"], dtype="fp32")
    stored = load_weights(teacher.registry, teacher.registry.student(version).components["denoiser"])
    assert not stored["second_time.weight"].any()
    plain = make_student(teacher.registry, teacher.version, "tiny-plain", schedules=TWO)
    one, two = (
        sample(load_student(teacher.registry, teacher.registry.student(v)), ["a red circle"], [3], 2)
        for v in (version, plain)
    )
    assert torch.equal(one, two)


def test_a_lora_is_kept_beside_the_weights_it_is_merged_in_under_the_names_of_diffusers(tmp_path: Path) -> None:
    teacher = tiny_sd.teacher()
    weights = load_weights(teacher.registry, teacher.manifest.components["denoiser"])
    adapter = {"conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "conv_in.lora_B.weight": torch.ones(16, 2, 1, 1)}
    made = make_student(
        teacher.registry, teacher.version, "tiny-lora", denoiser_weights=weights, adapter=adapter, schedules=TWO
    )
    student = teacher.registry.student(made)
    assert student.kind == "lora"
    assert export_lora(teacher.registry, made, tmp_path) == tmp_path / ADAPTER
    written = load_file(tmp_path / ADAPTER)
    assert sorted(written) == ["unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight"]
    export_diffusers(teacher.registry, made, tmp_path / "whole")
    assert not list((tmp_path / "whole").rglob(ADAPTER))

    # Other weights on top of it are no LoRA's.
    later = make_student(teacher.registry, made, "tiny-later", denoiser_weights=weights, schedules=TWO)
    assert teacher.registry.student(later).kind == "full"
    with pytest.raises(InvalidRequest, match="was not trained as a LoRA"):
        export_lora(teacher.registry, later, tmp_path)


def test_weights_of_another_network_are_refused_and_nothing_is_published() -> None:
    teacher = tiny_sd.teacher()
    weights = load_weights(teacher.registry, teacher.manifest.components["decoder"])
    before = teacher.registry.students()
    with pytest.raises(GraphMismatch):
        make_student(teacher.registry, teacher.version, "bad", denoiser_weights=weights, schedules=TWO)
    assert teacher.registry.students() == before


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "fp32"), (1e6, "fp16")])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_published(
    value: float, dtype: Literal["fp32", "fp16"]
) -> None:
    teacher = tiny_sd.teacher()
    weights = load_weights(teacher.registry, teacher.manifest.components["denoiser"])
    weights["conv_in.bias"] = weights["conv_in.bias"].float() + value
    before = teacher.registry.students()
    with pytest.raises(InvalidManifest, match=r"conv_in\.bias"):
        make_student(teacher.registry, teacher.version, "bad", denoiser_weights=weights, schedules=TWO, dtype=dtype)
    assert teacher.registry.students() == before


def test_an_export_is_a_directory_that_imports_to_the_same_components(tmp_path: Path) -> None:
    teacher = tiny_sd.teacher()
    shutil.copytree(teacher.directory / "scheduler", tmp_path / "scheduler")
    shutil.copy(teacher.directory / "model_index.json", tmp_path)
    export_diffusers(teacher.registry, teacher.version, tmp_path)
    registry = MemoryRegistry()
    again = import_diffusers(tmp_path, registry, name="again", schedules=tiny_sd.SCHEDULES)
    assert registry.student(again).components == teacher.manifest.components


def test_what_is_no_pipeline_of_a_known_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest, match=r"model_index\.json"):
        import_diffusers(tmp_path, MemoryRegistry(), name="no", schedules=TWO)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(NotBuilt, match="KandinskyPipeline"):
        import_diffusers(tmp_path, MemoryRegistry(), name="no", schedules=TWO)


def test_a_pipeline_with_a_second_denoiser_is_refused(tmp_path: Path) -> None:
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer_2": index["transformer"]}))
    with pytest.raises(NotBuilt, match=r"further denoisers \(transformer_2\)"):
        import_diffusers(tmp_path, MemoryRegistry(), name="no", schedules=TWO)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer_2": [None, None]}))
    with pytest.raises(InvalidManifest, match="scheduler"):  # the next thing that is missing
        import_diffusers(tmp_path, MemoryRegistry(), name="no", schedules=TWO)


def test_a_size_that_is_no_multiple_of_the_autoencoder_s_scale_is_refused() -> None:
    directory = tiny_sd.teacher().directory
    with pytest.raises(InvalidRequest, match="17x16 are no multiples of 2"):
        import_diffusers(directory, MemoryRegistry(), name="odd", schedules=TWO, resolution=(17, 16))


def test_pipelines_that_are_guided_away_from_the_empty_prompt_s_own_encoding_are_refused(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(NotBuilt, match="force_zeros_for_empty_prompt"):
        import_diffusers(tmp_path, MemoryRegistry(), name="no", schedules=TWO)


@pytest.mark.parametrize("name", ["../evil.txt", "x/../../evil.txt", "/etc/passwd", ".hidden", "a/b/c", "a/.git", ""])
def test_a_component_s_file_names_stay_inside_its_folder(name: str) -> None:
    sha = "0" * 64
    with pytest.raises(ValueError, match="pattern"):
        Component(weights=sha, files={name: sha})


def test_golden_samples_of_a_student_are_of_its_base_s_prompts() -> None:
    registry = MemoryRegistry()
    base = import_diffusers(
        tiny_sd.teacher().directory, registry, name="t", schedules=TWO, golden_prompts=("a blue circle",)
    )
    student = registry.student(make_student(registry, base, "s", schedules=TWO))
    assert prompts_of(registry, student) == ("a blue circle",)


def test_a_noise_schedule_that_is_no_flow_has_to_be_named(tmp_path: Path) -> None:
    shutil.copytree(tiny_sd.teacher().directory, tmp_path / "p")
    config = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}))
    with pytest.raises(NotBuilt, match="DDIMScheduler"):
        import_diffusers(tmp_path / "p", MemoryRegistry(), name="no", schedules=TWO)


def test_guidance_that_is_read_has_no_interval_since_the_network_reads_a_weight_at_every_step() -> None:
    with pytest.raises(ValueError, match="embedded guidance has no interval"):
        Guidance(mode="embedded", interval=(0.2, 0.8))
