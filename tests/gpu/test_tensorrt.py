"""Plans on a GPU: where the weights are makes no difference to what comes out, and a refit sets every one of them."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from engines import scales
from engines.backends import _tensorrt_library as libraries
from engines.backends import tensorrt
from engines.backends._tensorrt_engine import TensorRtEngine
from engines.backends.base import Engine, Profile, load_backend
from engines.errors import BackendUnavailable, GraphMismatch, InvalidRequest
from tests.tensorrt.graphs import ROLES, Case, case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tensorrt.TensorRt().available(), reason="no NVIDIA GPU, or no TensorRT library"),
    pytest.mark.timeout(600),
]
PROFILE = Profile(batches=(1, 4), precision="fp32")


@pytest.fixture(params=ROLES)
def made(request: pytest.FixtureRequest) -> Case:
    return case("sd", request.param)


@pytest.fixture
def engine(made: Case) -> Iterator[Engine]:
    backend = tensorrt.TensorRt()
    loaded = backend.load(backend.build(made.graph, PROFILE), made.weights)
    yield loaded
    loaded.close()


def given(made: Case, rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    inputs = {name: torch.randn(zero.shape, generator=draw) for name, zero in made.graph.example(rows).items()}
    if "ids" in inputs:
        inputs["ids"] = torch.randint(3, 10, inputs["ids"].shape, generator=draw)
    return inputs | ({"t": torch.rand(rows, generator=draw)} if "t" in inputs else {})


def by_eager(made: Case, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    eager = load_backend("eager")
    (out,) = eager.load(eager.build(made.graph, PROFILE), weights).run(**inputs).values()
    return out


def close(out: dict[str, Tensor], expected: Tensor, share: float = 1e-3) -> bool:
    (value,) = out.values()
    return bool((value - expected).square().mean().sqrt() <= share * expected.std())


@pytest.mark.parametrize("rows", PROFILE.batches)
def test_every_profile_is_eager(made: Case, engine: Engine, rows: int) -> None:
    inputs = given(made, rows)
    for _ in range(2):  # the second is the recorded graph again
        assert close(engine.run(**inputs), by_eager(made, made.weights, inputs))


def test_a_refit_sets_every_weight_and_leaves_the_engine_that_serves(made: Case, engine: Engine) -> None:
    backend, inputs = tensorrt.TensorRt(), given(made, 4)
    before = engine.run(**inputs)
    other = {name: value + 0.05 * torch.randn_like(value.float()) for name, value in made.weights.items()}
    second = backend.load(backend.build(made.graph, PROFILE), other)
    assert close(second.run(**inputs), by_eager(made, other, inputs))
    assert all(torch.equal(value, before[name]) for name, value in engine.run(**inputs).items())
    assert not close(second.run(**inputs), by_eager(made, made.weights, inputs))


@pytest.mark.parametrize("weights", ["set", "constant"])
@pytest.mark.parametrize("ahead", [False, True])
def test_wherever_the_weights_are_the_network_is_the_same(
    made: Case, weights: Literal["set", "constant"], ahead: bool
) -> None:
    gpu, backend, inputs = libraries.need_gpu("this test"), tensorrt.TensorRt(), given(made, 4)
    library = libraries.find()
    if ahead and not (library.rtx and gpu.capability in library.api.ComputeCapability.__members__):
        pytest.skip(f"{library.name} builds no plan ahead for {gpu.capability}")
    profile = replace(PROFILE, weights=weights, targets=(gpu.capability,) if ahead else ())
    loaded = backend.load(backend.build(made.graph, profile), made.weights)
    assert close(loaded.run(**inputs), by_eager(made, made.weights, inputs))


def test_bf16_is_near(made: Case) -> None:
    backend, inputs = tensorrt.TensorRt(), given(made, 4)
    loaded = backend.load(backend.build(made.graph, replace(PROFILE, precision="bf16")), made.weights)
    assert close(loaded.run(**inputs), by_eager(made, made.weights, inputs), share=0.05)


def test_fp8_is_near_and_not_what_bf16_is() -> None:
    gpu = libraries.need_gpu("this test")
    if int(gpu.capability[2:]) < 89:
        pytest.skip(f"{gpu.capability} does not compute in fp8")
    denoiser, backend = case("sd", "denoiser"), tensorrt.TensorRt()
    inputs = given(denoiser, 4)
    eager = load_backend("eager")
    reference: Any = eager.load(eager.build(denoiser.graph, PROFILE), denoiser.weights)
    with ExitStack() as watching:
        largest = scales.watched(reference.module, denoiser.graph.graph_names, watching.enter_context)
        expected = reference.run(**inputs)["pred"]
    profile = replace(PROFILE, precision="fp8", weights="constant")
    measured = {name: float(value) for name, value in largest.items()}
    compiled = replace(backend.build(denoiser.graph, profile), largest=measured)
    loaded = backend.load(compiled, denoiser.weights)
    assert close(loaded.run(**inputs), expected, share=0.25)
    assert not close(loaded.run(**inputs), expected, share=0.005)


def test_weights_that_do_not_fit_are_streamed_and_the_pictures_stay(made: Case) -> None:
    backend, inputs = tensorrt.TensorRt(), given(made, 4)
    profile = replace(PROFILE, weight_room=backend.weight_bytes(made.graph, PROFILE) // 2)
    loaded: Any = backend.load(backend.build(made.graph, profile), made.weights)
    engine = loaded._kept[0]
    assert engine.weight_streaming_budget_v2 <= profile.weight_room
    for _ in range(2):
        assert close(loaded.run(**inputs), by_eager(made, made.weights, inputs))


def test_a_plan_that_the_library_did_not_write_is_no_plan(made: Case) -> None:
    """As one of another version or device would be, had it come into the cache under this key."""
    library = libraries.find()
    with pytest.raises(BackendUnavailable, match="cannot load the plan here"):
        TensorRtEngine(library, made.graph, bytes(4096), made.weights, form="constant", types={}, batches=(1,))


def test_what_does_not_fit_is_refused(made: Case, engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="3 rows"):
        engine.run(**given(made, 3))
    first = next(iter(made.weights))
    backend = tensorrt.TensorRt()
    with pytest.raises(GraphMismatch, match="1 missing"):
        backend.load(backend.build(made.graph, PROFILE), {name: v for name, v in made.weights.items() if name != first})
    with pytest.raises(BackendUnavailable, match="SM75"):
        backend.load(tensorrt.Compiled(made.graph, replace(PROFILE, targets=("SM75",)), None), made.weights)
