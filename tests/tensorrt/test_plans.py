"""Real plans by the real library, without a GPU, of every graph of every family; and that bf16 is the same network."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from engines import plugins
from engines.backends import _tensorrt_graph as graphs
from engines.backends import _tensorrt_library as libraries
from engines.backends import tensorrt
from engines.backends._tensorrt_build import FACTS, PLAN
from engines.backends.base import Profile
from engines.cache import DiskCache
from engines.errors import GraphMismatch
from engines.families.base import PICTURES
from engines.graph import export
from engines.loader import load_student
from engines.parts import reader
from tests import tiny_families
from tests.tensorrt.graphs import GRAPHS, NO_GRAPH, ROLES, Case, case, each

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'fewstep[tensorrt]'")
pytestmark = pytest.mark.timeout(600)  # an export and a build
every_graph = each(GRAPHS)
of_sd = pytest.mark.xdist_group("sd")
AHEAD = Profile(batches=(1, 4), precision="bf16", targets=("SM89",))
CONSTANT = Profile(batches=(1, 4), precision="bf16", targets=("SM89",), weights="constant")


def test_every_graph_of_every_family_is_built_here_or_named_with_the_reason() -> None:
    named = {*GRAPHS, *NO_GRAPH}
    built = {(tiny_families.shipped(name).manifest.family, role) for name, role in named if role != PICTURES}
    assert built == {(family, role) for family in plugins.names("engines.families") for role in ROLES}


def test_an_encoder_of_pictures_is_built_of_every_kind_of_vae() -> None:
    assert {vae(name) for name, role in GRAPHS if role == PICTURES} == {vae(name) for name in tiny_families.FAMILIES}


def vae(name: str) -> str:
    """The class of its VAE."""
    own = tiny_families.shipped(name)
    found: str = json.loads(reader(own.registry, own.manifest)("decoder/config.json"))["_class_name"]
    return found


@every_graph
def test_a_plan_is_built_without_a_gpu_and_serves_any_weights(name: str, role: str) -> None:
    made = case(name, role)
    folder = tensorrt.plan(made.graph, AHEAD)
    plan, facts = (folder / PLAN).read_bytes(), json.loads((folder / FACTS).read_text())
    read = set(facts["weights"])
    assert read <= set(made.graph.shapes)
    assert set(facts["weights"].values()) <= {"fp32", "bf16"}
    assert facts["form"] == "input"
    for tensor in (*made.graph.inputs, *made.graph.outputs, *(f"weight:{weight}" for weight in read)):
        assert tensor.encode() in plan, f"{tensor} is no tensor of the plan"


@each([("sd", "encoder"), ("sd", "decoder"), ("pixart", "denoiser")])
def test_a_plan_with_constants_holds_the_weights_that_it_was_given(name: str, role: str) -> None:
    made = case(name, role)
    other = {key: value + 1 for key, value in made.weights.items()}
    plan, else_ = (
        (tensorrt.plan(made.graph, CONSTANT, weights) / PLAN).read_bytes() for weights in (made.weights, other)
    )
    assert held(plan, made.weights) > 0 == held(plan, other)
    assert held(else_, other) > 0 == held(else_, made.weights)


def held(plan: bytes, weights: dict[str, Tensor]) -> float:
    """The share of the larger weights whose bf16 bytes stand in a plan as they are; others are laid out anew, as those
    of convolutions are."""
    large = [value for value in weights.values() if value.numel() >= 64]
    found = [value.to(torch.bfloat16).view(torch.int16).numpy().tobytes() in plan for value in large]
    return sum(found) / len(found)


@each([("sd", "denoiser"), ("sana", "denoiser"), ("flux", "denoiser")])
def test_a_denoiser_is_built_in_fp8_and_half_as_large_weights_stand_in_it(name: str, role: str) -> None:
    made = case(name, role)
    profile = dataclasses.replace(CONSTANT, precision="fp8")
    folder = tensorrt.plan(made.graph, profile, made.weights, dict.fromkeys(made.weights, 4.0))
    kinds = json.loads((folder / FACTS).read_text())["weights"]
    low = sum(made.weights[key].numel() for key, kind in kinds.items() if kind == "fp8")
    assert low > 0.8 * sum(value.numel() for value in made.weights.values())


@every_graph
def test_in_bf16_it_is_the_same_network(name: str, role: str) -> None:
    """Run by OpenVINO, which reads typed graphs too. The weights are rounded; were a cast missing, it would not run."""
    made = case(name, role)
    inputs = given(name, role)
    plain = onnx.load_from_string(made.graph.onnx())
    expected = by_openvino(plain, made, inputs)
    rounded = by_openvino(graphs.in_bf16(plain), made, inputs)
    assert not np.array_equal(rounded, expected)
    assert np.sqrt(np.square(rounded - expected).mean()) <= 0.05 * expected.std()


@every_graph
def test_every_weight_can_be_refitted_by_its_name(name: str, role: str, tmp_path: Path) -> None:
    """As far as a machine without a GPU can tell: the parser keeps each of them under the name that a refit sets."""
    from engines.backends import _tensorrt_build as build
    from engines.backends._tensorrt_library import find

    library = find()
    model = graphs.in_bf16(onnx.load_from_string(case(name, role).graph.onnx()))
    names = sorted(graphs.weight_types(model))
    order = build.Order("refit", (1,), "bf16", ())
    path = graphs.write(model, tmp_path, build._weights(tmp_path, order, model))
    messages = library.messages()
    builder = library.api.Builder(messages)
    network, config = builder.create_network(1), builder.create_builder_config()
    parser = library.api.OnnxParser(network, messages)
    assert parser.parse_from_file(str(path))
    build._make_refittable(library.api, config, network, names)
    assert config.get_flag(library.api.BuilderFlag.REFIT_INDIVIDUAL)
    assert all(network.are_weights_marked_refittable(f"weight:{weight}") for weight in names)


@each(NO_GRAPH)
def test_what_is_named_as_having_no_graph_has_none(name: str, role: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"complex|export"):
        export(case(name, role).graph.spec, tmp_path)


@of_sd
def test_weights_of_another_shape_are_refused_before_anything_is_built() -> None:
    made = case("sd", "encoder")
    compiled = tensorrt.Compiled(made.graph, CONSTANT, None)
    first = next(iter(made.weights))
    with pytest.raises(GraphMismatch, match=first):
        tensorrt.TensorRt().load(compiled, made.weights | {first: torch.zeros(3, 5, 7)})


@of_sd
def test_a_plan_is_found_again_and_one_of_another_version_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    made, library = case("sd", "encoder"), libraries.find()
    first = tensorrt.plan(made.graph, AHEAD)
    assert tensorrt.plan(made.graph, AHEAD) == first
    monkeypatch.setattr(libraries, "find", lambda: dataclasses.replace(library, version="0.0.1"))
    other = tensorrt.plan(made.graph, AHEAD)
    assert other != first
    assert (other / PLAN).read_bytes()[:4] == (first / PLAN).read_bytes()[:4]


@of_sd
def test_a_plan_that_was_damaged_on_disk_is_built_again(tmp_path: Path) -> None:
    made = case("sd", "encoder")
    graph = dataclasses.replace(made.graph, cache=DiskCache(tmp_path))
    path = tensorrt.plan(graph, AHEAD) / PLAN
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000] + bytes(1000))
    again = tensorrt.plan(dataclasses.replace(graph, cache=DiskCache(tmp_path)), AHEAD) / PLAN
    assert again.read_bytes()[-1000:] != bytes(1000)


@cache
def given(name: str, role: str) -> dict[str, np.ndarray[Any, Any]]:
    """Two rows, as the family itself gives them to this component."""
    own = tiny_families.shipped(name)
    student = load_student(own.registry, own.manifest)
    prompts, generator = ["a red circle", "two shapes on the left"], torch.Generator().manual_seed(1)
    values = {
        key: torch.randn(zero.shape, generator=generator) for key, zero in case(name, role).graph.example(2).items()
    }
    if role == "encoder":
        tokens = student.family.tokenize(prompts)
        values = {"ids": tokens.ids} | ({"mask": tokens.mask} if "mask" in values and tokens.mask is not None else {})
    if role == "denoiser":
        values |= {"t": torch.tensor([0.9, 0.3]), "cond": student.family.encode(prompts)}
        values |= {key: torch.tensor([2.0, 4.0]) for key in ("w",) if key in values}
    return {key: value.numpy() for key, value in values.items()}


def by_openvino(model: onnx.ModelProto, made: Case, inputs: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    import ml_dtypes

    from engines.backends._openvino_library import core, ov

    compiled = core.compile_model(
        core.read_model(model.SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        name = port.get_any_name()
        weight = name.removeprefix("weight:")
        value = inputs[name] if weight == name else made.weights[weight].float().numpy()
        if port.get_element_type() == ov.Type.bf16:
            tensor = ov.Tensor(port.get_element_type(), ov.Shape(value.shape))
            np.copyto(tensor.data, value.astype(ml_dtypes.bfloat16).view(tensor.data.dtype))
        else:
            tensor = ov.Tensor(np.ascontiguousarray(value))
        request.set_tensor(name, tensor)
    request.infer()
    (out,) = request.output_tensors
    copied: np.ndarray[Any, Any] = out.data.copy()
    return copied
