"""A student's forms agree: what diffusers makes of its export, the compiled engine, and the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import verify as verify_file
from engines.artefact import import_diffusers, make_student
from engines.backends.base import Choice
from engines.errors import InvalidManifest, NotBuilt
from engines.export import SAMPLING, export_pipeline
from engines.manifest import Guidance, ProcessSpec, Schedule
from engines.parts import load_weights
from engines.registry.memory import MemoryRegistry
from engines.scheduler import sampling, samplings
from engines.student import sample
from engines.verify import Verification, verify
from tests import tiny_families, tiny_sd

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
EAGER = Choice("eager", "fp32")
PARTLY = Guidance(mode="cfg", default=3.0, maximum=8.0, interval=(0.0, 0.8))
BAKED = Guidance(mode="baked", default=2.0, minimum=2.0, maximum=2.0)
PROMPTS = ["a red circle", "the small blue square", ""]


def student(name: str, *schedules: Schedule, **changes: Any) -> str:
    teacher = tiny_sd.teacher()
    return make_student(teacher.registry, teacher.version, name, schedules=schedules, **changes)


def verified(version: str, tmp_path: Path, **more: Any) -> Verification:
    registry = tiny_sd.teacher().registry
    return verify(registry, version, choice=EAGER, cache=tmp_path / "cache", prompts=PROMPTS, **more)


def by_diffusers(found: Verification) -> dict[int, int]:
    return {one.steps: one.worst_levels for one in found.comparisons if one.form == "diffusers"}


@pytest.mark.parametrize("solver", ["ddim", "euler", "flow_match_euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("guidance", [tiny_sd.GUIDANCE, BAKED], ids=["guided", "baked"])
def test_diffusers_makes_the_same_pictures_of_an_export(solver: str, guidance: Guidance, tmp_path: Path) -> None:
    times = (1.0, 0.875, 0.6, 0.23, 0.0)
    version = student(
        f"v-{solver}", Schedule(times=times), Schedule(times=(1.0, 0.0)), solver=solver, guidance=guidance
    )
    found = verified(version, tmp_path)
    assert found.passed
    assert found.missing is None
    assert max(by_diffusers(found).values()) <= 1
    assert by_diffusers(found).keys() == {1, 4}


def test_times_between_whole_thousandths_stay_within_the_tolerance(tmp_path: Path) -> None:
    assert verified(student("v-odd", Schedule(times=(1.0, 0.46660156, 0.0))), tmp_path).passed


def test_weights_that_were_trained_are_exported(tmp_path: Path) -> None:
    teacher = tiny_sd.teacher()
    weights = load_weights(teacher.registry, teacher.manifest.components["denoiser"])
    moved = {name: value * 1.2 for name, value in weights.items()}
    found = verified(student("v-trained", Schedule(times=(1.0, 0.5, 0.0)), denoiser_weights=moved), tmp_path)
    assert by_diffusers(found)[2] <= 1


def test_an_export_of_other_weights_is_told(tmp_path: Path) -> None:
    registry = tiny_sd.teacher().registry
    weights = load_weights(registry, tiny_sd.teacher().manifest.components["denoiser"])
    schedule = Schedule(times=(1.0, 0.5, 0.0))
    other = student("v-other", schedule, denoiser_weights={name: value * 1.3 for name, value in weights.items()})
    export_pipeline(registry, other, tmp_path / "export")
    found = verified(student("v-own", schedule), tmp_path, directory=tmp_path / "export")
    assert not found.passed
    assert [one.form for one in found.comparisons if one.fault] == ["diffusers"]


def test_a_wrong_noise_level_in_the_export_is_told(tmp_path: Path) -> None:
    version = student("v-levels", Schedule(times=(1.0, 0.5, 0.0)))
    export_pipeline(tiny_sd.teacher().registry, version, tmp_path / "export")
    file = tmp_path / "export" / SAMPLING
    told = json.loads(file.read_text())
    told["2"]["sigmas"][1] = 0.3
    file.write_text(json.dumps(told))
    assert not verified(version, tmp_path, directory=tmp_path / "export").passed


def test_counts_that_no_scheduler_samples_are_named_and_the_others_compared(tmp_path: Path) -> None:
    version = student("v-noisy", Schedule(times=(1.0, 0.5, 0.0), eta=1.0), Schedule(times=(1.0, 0.0), eta=1.0))
    found = verified(version, tmp_path)
    assert by_diffusers(found).keys() == {1}
    assert found.missing is not None
    assert "2 steps" in found.missing


def test_a_student_that_diffusers_cannot_sample_is_checked_on_the_engine_alone(tmp_path: Path) -> None:
    found = verified(student("v-map", Schedule(times=(1.0, 0.5, 0.0)), inputs=["s"]), tmp_path)
    assert [one.form for one in found.comparisons] == ["eager fp32"]
    assert found.missing is not None
    assert "reads ['s']" in found.missing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "batch"), [("wan", 1), ("sd", 8)])
def test_videos_are_compared_one_by_one(
    family: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, batches = tiny_families.shipped(family), set[int]()
    monkeypatch.setattr(verify_file, "sample", lambda *a, **k: batches.add(k["batch"]) or sample(*a, **k))
    found = verify(own.registry, own.version, choice=EAGER, cache=tmp_path / "cache", prompts=["a red circle"])
    assert [one.fault for one in found.comparisons if one.form == "eager fp32"] == [None]
    assert batches == {batch}


@pytest.mark.parametrize(
    ("schedule", "changes", "reason"),
    [
        (Schedule(times=(1.0, 0.5, 0.0), eta=1.0), {}, "re-noises"),
        (Schedule(times=(0.9, 0.0)), {}, "from noise level 0.9"),
        (Schedule(times=(1.0, 0.5, 0.0)), {"solver": "ab2"}, "sampled by ab2"),
        (Schedule(times=(1.0, 0.5, 0.0)), {"guidance": PARTLY}, "some steps only"),
        (Schedule(times=(1.0, 0.5, 0.0)), {"prediction": "v"}, "predicts v"),
        (Schedule(times=(1.0, 0.5, 0.0)), {"process": ProcessSpec(shift=3.0)}, "time shift"),
    ],
)  # fmt: skip
def test_what_diffusers_would_sample_otherwise_is_refused(
    schedule: Schedule, changes: dict[str, Any], reason: str
) -> None:
    manifest = tiny_sd.teacher().registry.student(student("v-refused", schedule, **changes))
    with pytest.raises(NotBuilt, match=reason):
        samplings(manifest)


def test_a_guided_student_is_called_with_its_weight_and_a_baked_one_with_none() -> None:
    registry, schedule = tiny_sd.teacher().registry, Schedule(times=(1.0, 0.0))
    guided, baked = (registry.student(student("v-w", schedule, guidance=g)) for g in (tiny_sd.GUIDANCE, BAKED))
    assert (sampling(guided, 1).guidance_scale, sampling(baked, 1).guidance_scale) == (3.0, 1.0)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest, match="export it first"):
        verified(student("v-none", Schedule(times=(1.0, 0.0))), tmp_path, directory=tmp_path)


def test_an_export_is_imported_again_as_it_was(tmp_path: Path) -> None:
    registry, version = MemoryRegistry(), student("v-again", Schedule(times=(1.0, 0.5, 0.0)))
    export_pipeline(tiny_sd.teacher().registry, version, tmp_path)
    again = import_diffusers(tmp_path, registry, name="again", schedules=[Schedule(times=(1.0, 0.0))])
    assert registry.student(again).components == tiny_sd.teacher().manifest.components
    assert registry.student(again).prediction == "flow"


def test_the_pipeline_of_an_export_draws_without_being_told_anything(tmp_path: Path) -> None:
    """As people try it first; `sampling.json` says how to draw it well."""
    import diffusers

    export_pipeline(tiny_sd.teacher().registry, student("v-plain", Schedule(times=(1.0, 0.0))), tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
