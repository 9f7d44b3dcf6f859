"""The bench of peers over a real server: plain FastAPI, whose packages are those of the gateway."""

import sys
from pathlib import Path

import psutil
import pytest

from bench.peers import window
from bench.peers.pictures import Config, Kind, Painter
from bench.peers.servers import serving
from bench.peers.window import Shape
from bench.peers.workloads import requests
from engines.artefact import import_diffusers
from engines.registry.files import FilesRegistry
from tests import tiny_sd


@pytest.fixture
def config(tmp_path: Path) -> Config:
    registry = FilesRegistry(tmp_path / "registry")
    directory = tiny_sd.write(tmp_path / "pipeline")
    version = import_diffusers(directory, registry, name="tiny", schedules=tiny_sd.SCHEDULES, guidance=tiny_sd.GUIDANCE)
    return Config(
        registry=str(tmp_path / "registry"),
        cache=str(tmp_path / "cache"),
        kinds={"1": Kind(version, 1, "tiny"), "4": Kind(version, 4, "tiny")},
        backend="eager",
        precision="fp32",
        batches=(1, 2),
        threads=1,
    )


@pytest.mark.timeout(300)  # two processes import torch and diffusers
def test_a_grouping_server_answers_every_request_with_its_own_picture_and_ends(config: Config, tmp_path: Path) -> None:
    asked = requests({"1": 0.5, "4": 0.5}, ["a red circle", "two blue shapes"] * 200, 1)
    with serving("fastapi grouped", config, tmp_path / "peer", Path(sys.executable)) as running:
        processes = running.processes()
        load = {"mode": "closed", "concurrency": 4}
        taken = window.take(running, asked, load, Shape(0.2, 1.2), tmp_path / "load")
    painter = Painter(config)
    made = window.figures(taken, {"1": 1e9, "4": 1e9}, {"1": 1, "4": 4})
    assert (made["failed"], made["slo_attainment"]) == (0, 1.0)
    assert set(made["by_steps"]) == {"1", "4"}
    assert made["images_per_s"] > 0
    assert made["cpu_s"] > 0
    assert window.wrong(taken, painter, painter.sizes()) == 0
    assert psutil.wait_procs(processes, 5)[1] == []
