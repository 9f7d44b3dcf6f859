"""A student's plans built ahead, and found again by whoever asks for the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.ahead import build_ahead
from engines.backends import tensorrt
from engines.backends._tensorrt_build import FACTS
from engines.backends.base import Profile
from engines.errors import UnknownPlugin
from engines.registry.files import FilesRegistry
from server.commands.students import app
from server.settings import WorkerSettings
from tests import tiny_families
from tests.tensorrt import graphs

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'fewstep[tensorrt]'")
pytestmark = [pytest.mark.xdist_group("sd"), pytest.mark.timeout(600)]


PROFILE = Profile((1, 4), "bf16", targets=("SM89",))


def test_the_denoiser_of_a_student_gets_a_plan_for_any_weights_and_the_shared_parts_hold_theirs() -> None:
    own = tiny_families.shipped("sd")
    made = build_ahead(own.registry, own.version, PROFILE, graphs.store())
    forms = {role: json.loads((folder / FACTS).read_text())["form"] for role, folder in made.items()}
    assert forms == {"encoder": "constant", "denoiser": "input", "decoder": "constant"}
    denoiser = graphs.case("sd", "denoiser").graph
    assert tensorrt.TensorRt().build(denoiser, PROFILE).folder == made["denoiser"]


def test_left_to_itself_the_command_builds_for_the_batch_sizes_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Profile] = []
    monkeypatch.setattr(
        "engines.ahead.build_ahead", lambda registry, version, profile, graphs: asked.append(profile) or {}
    )
    done = CliRunner().invoke(app, ["plans", "v", "--registry-url", "memory://", "--target", "SM89"])
    assert done.exit_code == 0, done.output
    assert [profile.batches for profile in asked] == [
        WorkerSettings(redis_url="memory:", registry_url="memory:").batch_sizes
    ]


def test_in_fp8_a_denoiser_has_the_plan_it_goes_live_in_and_that_which_it_is_specialised_in(tmp_path: Path) -> None:
    own = tiny_families.shipped("sd")
    version = tiny_families.imported(own.tiny, own.directory, FilesRegistry(str(tmp_path)))
    told = ["plans", version, "--registry-url", str(tmp_path), "--cache-dir", str(graphs.FOLDER), "--target", "SM89"]
    done = CliRunner().invoke(app, [*told, "--batch-size", "4", "--batch-size", "1", "--precision", "fp8"])
    assert done.exit_code == 0, done.output
    manifest, profile = own.registry.student(own.version), replace(PROFILE, precision="fp8")
    made = build_ahead(own.registry, own.version, profile, graphs.store())
    assert made.keys() == {*manifest.components, "denoiser fp8"}
    assert {Path(line).name for line in done.output.split() if "/" in line} >= {path.name for path in made.values()}
    live, special = (json.loads((made[role] / FACTS).read_text()) for role in ("denoiser", "denoiser fp8"))
    assert (live["form"], special["form"]) == ("input", "constant")
    graph = graphs.case("sd", "denoiser").graph
    assert {name for name, kind in special["weights"].items() if kind == "fp8"} == graph.products
    assert "fp8" not in live["weights"].values()


def test_the_command_builds_into_the_cache_that_it_is_given(tmp_path: Path) -> None:
    own = tiny_families.shipped("sd")
    made = build_ahead(own.registry, own.version, PROFILE, graphs.store())
    version = tiny_families.imported(own.tiny, own.directory, FilesRegistry(str(tmp_path)))
    told = ["plans", version, "--registry-url", str(tmp_path), "--cache-dir", str(graphs.FOLDER), "--target", "SM89"]
    done = CliRunner().invoke(app, [*told, "--batch-size", "4", "--batch-size", "1"])
    assert done.exit_code == 0, done.output
    assert {Path(line).name for line in done.output.split() if "/" in line} >= {path.name for path in made.values()}
    refused = CliRunner().invoke(app, [*told, "--precision", "int8"])
    assert isinstance(refused.exception, UnknownPlugin)
