"""Code for a GPU whose calls are CUDA graphs: what eager answers, at each batch size and with other weights."""

from dataclasses import replace

import pytest
import torch

from engines.backends.base import Choice, Profile, load_backend, tolerance
from engines.graph import ComponentGraph
from engines.loader import Loader
from engines.parts import load_weights
from engines.student import sample
from tests import tiny_sd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
    pytest.mark.timeout(600),
]
PROFILE = Profile(batches=(1, 4), device="cuda")
NARROW = replace(PROFILE, precision="bf16")


@pytest.fixture(scope="module")
def graph() -> ComponentGraph:
    teacher = tiny_sd.teacher()
    loader = Loader(teacher.registry, Choice("torch_compile", "fp32"), PROFILE, teacher.graphs)
    return loader.graphs(teacher.manifest)["denoiser"]


def weights(graph: ComponentGraph, shift: float = 0.0) -> dict[str, torch.Tensor]:
    teacher = tiny_sd.teacher()
    found = graph.select(load_weights(teacher.registry, teacher.manifest.components["denoiser"]))
    return {name: value + shift for name, value in found.items()}


def inputs(graph: ComponentGraph, rows: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(zero.shape, generator=generator).cuda() for name, zero in graph.example(rows).items()}


def test_each_batch_size_is_captured_once_and_every_replay_is_eager(graph: ComponentGraph) -> None:
    backend, eager = load_backend("torch_compile"), load_backend("eager")
    compiled = backend.build(graph, PROFILE)
    for shift in (0.0, 0.05):  # other weights: another engine of the same code
        engine = backend.load(compiled, weights(graph, shift))
        reference = eager.load(eager.build(graph, PROFILE), weights(graph, shift))
        for rows in (1, 4, 1, 4):
            given = inputs(graph, rows, seed=rows)
            made, expected = engine.run(**given)["pred"], reference.run(**given)["pred"]
            torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
        assert sorted(engine._captured) == [1, 4]


def test_an_answer_is_the_callers_and_not_the_graph_s_own_memory(graph: ComponentGraph) -> None:
    backend = load_backend("torch_compile")
    engine = backend.load(backend.build(graph, PROFILE), weights(graph))
    first = engine.run(**inputs(graph, 1, seed=1))["pred"]
    kept = first.clone()
    engine.run(**inputs(graph, 1, seed=2))
    assert torch.equal(first, kept)


def test_bf16_is_near_and_what_it_is_given_may_be_in_the_host_s_memory(graph: ComponentGraph) -> None:
    backend, eager = load_backend("torch_compile"), load_backend("eager")
    engine = backend.load(backend.build(graph, NARROW), weights(graph))
    given = {name: value.cpu() for name, value in inputs(graph, 4, seed=1).items()}
    made = engine.run(**given)["pred"]
    expected = eager.load(eager.build(graph, PROFILE), weights(graph)).run(**given)["pred"]
    assert made.dtype == torch.float32
    assert made.device.type == "cuda"
    assert (made - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_a_student_on_the_gpu_makes_the_pictures_of_one_on_the_processor() -> None:
    teacher = tiny_sd.teacher()
    choice = Choice("eager", "fp32")
    here, there = (
        Loader(teacher.registry, choice, replace(PROFILE, device=device), teacher.graphs).load(teacher.manifest)
        for device in ("cpu", "cuda")
    )
    steps = max(teacher.manifest.schedules)
    expected, made = (sample(each, ["a red circle", "a small blue square"], [1, 2], steps) for each in (here, there))
    assert tolerance("eager", "fp32").fault(made, expected) is None
