"""A schedule that a search wrote out is served as it was searched: manifest, plan, solver and eager engine."""

import pytest
import torch

from distill_jobs.batches import Batch, Rows
from distill_jobs.methods._search import Search
from distill_jobs.methods.base import resolve
from distill_jobs.roles import Cast
from distill_jobs.teachers import diffusers
from engines import artefact
from engines.loader import load_student
from engines.manifest import Guidance
from engines.noise import noise
from engines.solvers import followed
from engines.student import sample
from tests import tiny_sd

CAPTIONS, SEEDS, W = ["a red circle", "two shapes on white", "a blue square"], [1, 2, 3], 2.0


@pytest.mark.parametrize("name", ["gas", "amed", "fitted_solver", "ld3"])
def test_a_searched_schedule_makes_the_pictures_that_its_search_made(name: str) -> None:
    tiny = tiny_sd.teacher()
    teacher = diffusers.load(tiny.registry, tiny.version)
    den, rows = teacher.guided(W), Rows(cond=teacher.encode(CAPTIONS))
    batch = Batch(rows, torch.stack([noise(seed, 0, teacher.shape) for seed in SEEDS]), torch.Generator())
    preset = resolve(name)
    told = {"counts": (3,), "reference_steps": 6, "iterations": 3}
    known = preset.method.Config.model_fields
    search = preset.method(Cast(den), preset.config({key: value for key, value in told.items() if key in known}))
    assert isinstance(search, Search)
    found = search.search(batch)[3].schedule
    ours = teacher.pictures(followed(den, batch.noise, found, rows.cond))

    own = teacher.manifest.guidance
    version = artefact.make_student(
        tiny.registry,
        tiny.version,
        f"{name.replace('_', '-')}-schedule",
        schedules={3: found},
        guidance=Guidance(mode=own.mode, default=W, minimum=own.minimum, maximum=own.maximum),
    )
    manifest = tiny.registry.student(version)
    assert (manifest.kind, manifest.schedules[3]) == ("schedule", found)
    served = sample(load_student(tiny.registry, manifest), CAPTIONS, SEEDS, 3, rounded=False)
    assert float((served - torch.as_tensor(ours)).abs().max()) < 0.05  # of 255
    if found.coefficients:  # which show in a picture
        plain = found.model_copy(update={"solver": "ddim", "coefficients": None})
        other = teacher.pictures(followed(den, batch.noise, plain, rows.cond))
        assert float((served - torch.as_tensor(other)).abs().max()) > 0.5
