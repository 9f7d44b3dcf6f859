"""`fewstep students export --lora` writes what diffusers' `load_lora_weights` reads, and nothing else."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from engines.artefact import ADAPTER, import_diffusers, make_student
from engines.parts import load_weights
from engines.registry.files import FilesRegistry
from server.commands.students import app
from tests import tiny_sd


def test_a_lora_is_exported_alone(tmp_path: Path) -> None:
    registry = FilesRegistry(str(tmp_path / "registry"))
    base = import_diffusers(tiny_sd.write(tmp_path / "p"), registry, name="tiny", schedules=tiny_sd.SCHEDULES)
    adapter = {"conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "conv_in.lora_B.weight": torch.ones(16, 2, 1, 1)}
    weights = load_weights(registry, registry.student(base).components["denoiser"])
    version = make_student(
        registry, base, "tiny-lora", denoiser_weights=weights, adapter=adapter, schedules=tiny_sd.SCHEDULES
    )
    told = [version, str(tmp_path / "out"), "--lora", "--registry-url", str(tmp_path / "registry")]
    done = CliRunner().invoke(app, ["export", *told])
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == [ADAPTER]
    assert sorted(load_file(tmp_path / "out" / ADAPTER)) == [f"unet.conv_in.lora_{m}.weight" for m in "AB"]
