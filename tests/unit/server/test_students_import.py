"""`fewstep students import`, from a file on disk to a version with golden samples and a report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from engines.artefact import import_diffusers
from engines.errors import FewstepError, InvalidRequest, StudentNotFound
from engines.golden import Golden
from engines.images import decode
from engines.manifest import StudentManifest
from engines.registry.files import FilesRegistry
from server.cli import app
from server.promotion import passed
from tests import tiny_sd


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd.write(tmp_path_factory.mktemp("tiny") / "Base")


def run(registry: FilesRegistry, folder: Path, *told: str | Path) -> Result:
    engine = ("--backend", "eager", "--precision", "fp32", "--registry-url", folder)
    return CliRunner().invoke(app, ["students", "import", *map(str, (*told, *engine))])


@pytest.fixture
def registry(tmp_path: Path) -> FilesRegistry:
    return FilesRegistry(str(tmp_path / "registry"))


def only(registry: FilesRegistry, name: str) -> tuple[StudentManifest, dict[str, Any]]:
    (version,) = registry.students(name)
    report = registry.report(version)
    assert report is not None
    return registry.student(version), report


def test_a_pipeline_becomes_a_student_with_golden_samples_and_a_report(
    registry: FilesRegistry, directory: Path, tmp_path: Path
) -> None:
    done = run(
        registry, tmp_path / "registry", directory, "--as", "turbo", "--steps", "1,2", "--prompt", "a red circle"
    )
    assert done.exit_code == 0, done.output
    made, report = only(registry, "base")
    assert sorted(made.schedules) == [1, 2]
    assert made.schedules[2].times == (1.0, 0.75, 0.0)
    assert made.golden is not None
    golden = Golden.from_bytes(registry.read_blob(made.golden))
    assert set(golden.prompts) == {"a red circle"}
    picture = registry.read_file(made.version, "samples.png")
    assert picture is not None
    assert decode(picture).shape == (16, 16 * len(golden.pictures), 3)
    assert report["imported"]["source"] == "pipeline"
    assert {one["steps"] for one in report["verification"] if one["form"] == "eager fp32"} == {1, 2}
    assert "was not judged" in done.output
    assert passed(made, report) == {1, 2}


def test_a_lora_becomes_a_student_of_its_base(registry: FilesRegistry, directory: Path, tmp_path: Path) -> None:
    base = import_diffusers(directory, registry, name="tiny", schedules=tiny_sd.SCHEDULES)
    weight = load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    pair = {"lora_A": torch.ones(2, *weight.shape[1:]), "lora_B": torch.ones(len(weight), 2, 1, 1)}
    file = tmp_path / "mine.safetensors"
    save_file({f"unet.conv_in.{name}.weight": value for name, value in pair.items()}, file)
    done = run(
        registry, tmp_path / "registry", file, "--base", base, "--times", ".9,.4", "--eta", "1,0", "--strength", "0.5",
        "--guidance", "1.5", "--guidance-max", "2", "--licence", "mit", "--name", "my-lora",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    made, report = only(registry, "my-lora")
    assert (made.kind, made.base, made.licence) == ("lora", base, "mit")
    assert (made.schedules[2].times, made.schedules[2].eta) == ((0.9, 0.4, 0.0), (1.0, 0.0))
    assert (made.guidance.mode, made.guidance.default, made.guidance.maximum) == ("cfg", 1.5, 2.0)
    stored = registry.read_blob(made.components["denoiser"].weights)
    assert stored != registry.read_blob(registry.student(base).components["denoiser"].weights)
    assert report["imported"]["lora_ranks"] == [2]
    assert list(report["imported"]["files"]) == ["mine.safetensors"]


@pytest.mark.parametrize(
    ("told", "error", "said"),
    [
        (("--steps", "four", "--as", "lcm"), InvalidRequest, "--steps four: give numbers"),
        (("--steps", "4"), InvalidRequest, "no times"),
        (("--as", "lcm", "--steps", "1", "--samples", "9"), InvalidRequest, "base in the registry"),
        (("--as", "lcm", "--steps", "1", "--base", f"none@{'0' * 12}"), StudentNotFound, "none@"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_published(
    registry: FilesRegistry,
    directory: Path,
    tmp_path: Path,
    told: tuple[str, ...],
    error: type[FewstepError],
    said: str,
) -> None:
    done = run(registry, tmp_path / "registry", directory, *told)
    assert isinstance(done.exception, error)
    assert said in str(done.exception)
    assert registry.students() == []


def test_a_registry_that_is_not_there_is_not_made(directory: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["students", "import", str(directory), "--registry-url", str(tmp_path / "none")])
    assert isinstance(done.exception, InvalidRequest)
    assert not (tmp_path / "none").exists()


def test_help_teaches_by_examples() -> None:
    done = CliRunner().invoke(app, ["students", "import", "--help"], env={"COLUMNS": "200"})
    for said in ("--as lcm --steps 4", "--as lightning", "--as turbo --steps 1,2,4", "--times 1,.75,.5,.25"):
        assert said in done.output
