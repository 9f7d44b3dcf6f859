"""The bench of a GPU: what it knows already, its figures, and that its networks are ones."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_steps
from bench.gpu_networks import SHAPES
from bench.gpu_students import ROLES, even, network
from engines.noise import noise


def given(tmp_path: Path, **changed: Any) -> argparse.Namespace:
    options = {
        "parts": ["pictures", "steps"],
        "networks": ["tiny"],
        "pixels": [16],
        "forms": None,
        "batches": [1, 2],
        "rows": [1, 2],
        "calls": 2,
        "seconds": 0.1,
        "backend": "eager",
        "threads": 1,
        "device": "cpu",
        "cell_minutes": 1.0,
        "out": tmp_path / "gpu.json",
        "cache": tmp_path / "cache",
    }
    return argparse.Namespace(**options | changed)


@pytest.mark.parametrize("form", ["diffusers", "eager"])
def test_a_step_is_measured_for_every_batch(tmp_path: Path, form: str) -> None:
    made = gpu_steps.measured({"network": "tiny", "pixels": 16, "form": form}, given(tmp_path))
    assert [one["median"] > 0 for one in made["step_ms"].values()] == [True, True]


def test_a_row_of_a_batch_counts_as_one_of_a_lone_one() -> None:
    cell = {"part": "steps", "network": "tiny", "pixels": 16, "form": "eager"}
    step_ms = {"1": {"median": 1.0}, "2": {"median": 2.0}}
    made = gpu.with_shares(cell | {"step_ms": step_ms}, peak=gpu_steps.tera_operations(SHAPES["tiny"].spec(16)) * 2000)
    assert made["share_of_peak"] == {"1": 0.5, "2": 0.5}


def test_pictures_are_put_beside_those_of_the_engines_alone() -> None:
    at = {"part": "pictures", "network": "tiny", "pixels": 16}
    engine = at | {"form": "engine", "pictures": {"1": {"per_s": 10.0, "alone_ms": {"median": 100.0}}}}
    served = at | {"form": "gateway", "pictures": {"1": {"per_s": 9.6, "alone_ms": {"median": 104.0}}}}
    other = served | {"pixels": 32}
    found = gpu.beside_engines([engine, served, other])
    assert found[1]["of_engines"] == {"1": {"per_s": 0.96, "alone": 1.04}}
    assert "of_engines" not in found[2]


def test_known_cells_stay_and_those_that_lacked_time_are_tried_again(tmp_path: Path) -> None:
    asked = given(tmp_path, parts=["steps"], forms=["diffusers", "eager"])
    settings = {name: getattr(asked, name) for name in gpu._SETTINGS} | {"gpu": None}
    at = {"part": "steps", "network": "tiny", "pixels": 16}
    known = [at | {"form": "diffusers", "failed": "it cannot"}, at | {"form": "eager", "failed": "late", "cut": True}]
    asked.out.write_text(json.dumps({"settings": settings, "cells": known}))
    assert gpu.run(asked, until_s=time.monotonic()) == known[:1]
    asked.out.write_text(json.dumps({"settings": settings | {"calls": 3}, "cells": known}))
    assert gpu.run(asked, until_s=time.monotonic()) == []


def test_a_cell_that_does_not_end_is_cut(tmp_path: Path) -> None:
    asked = given(tmp_path, parts=["steps"], forms=["eager"], cell_minutes=1e-3)
    [cell] = gpu.run(asked, until_s=float("inf"))
    assert cell["cut"]
    assert json.loads(asked.out.read_text())["cells"] == [cell]


def test_pictures_come_before_steps_and_large_before_small(tmp_path: Path) -> None:
    found = [(c["pixels"], c["part"]) for c in gpu.cells(given(tmp_path, pixels=[32, 16], forms=["diffusers"]))]
    assert found == [(32, "pictures"), (32, "steps"), (16, "pictures"), (16, "steps")]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_network_of_its_family(name: str) -> None:
    sizes = {}
    with torch.device("meta"):
        for role in ROLES:
            made = SHAPES[name].spec(64, role).network()
            sizes[role] = sum(weight.numel() for weight in made.parameters())
    millions = round(sizes["denoiser"] / 1e6)
    assert millions == {"sana": 1604, "sdxl": 2567, "flux": 11891, "tiny": 0}[name]


def test_pictures_of_random_weights_spread_around_the_middle() -> None:
    shape = SHAPES["tiny"]
    decoder = network(shape.spec(16, "decoder"), "cpu")
    even(decoder, shape.latent(16), "cpu")
    levels = decoder(noise(0, 0, shape.latent(16))[None])
    assert 15 < levels.std() < 25
    assert 100 < levels.mean() < 156
