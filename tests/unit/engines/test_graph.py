from pathlib import Path

import pytest
import torch

from engines.cache import DiskCache
from engines.errors import InternalError
from engines.graph import WEIGHT, ComponentGraph, ComponentSpec, GraphStore, export, graph_id, spec
from engines.parts import reader
from tests import tiny_families, tiny_sd


@pytest.fixture(scope="module")
def encoder() -> ComponentSpec:
    teacher = tiny_sd.teacher()
    return spec(teacher.manifest, "encoder", reader(teacher.registry, teacher.manifest))


def denoiser(**changes: object) -> ComponentSpec:
    teacher = tiny_sd.teacher()
    manifest = teacher.manifest.model_copy(update=changes)
    return spec(manifest, "denoiser", reader(teacher.registry, teacher.manifest))


def test_the_graph_holds_no_weight_and_names_each_as_the_blob_does(encoder: ComponentSpec, tmp_path: Path) -> None:
    import onnx

    export(encoder, tmp_path)
    data = (tmp_path / "graph.onnx").read_bytes()
    inputs = {value.name for value in onnx.load_from_string(data).graph.input}
    shapes = ComponentGraph(encoder, lambda: tmp_path).shapes
    assert inputs == {"ids"} | {WEIGHT + name for name in shapes}
    assert len(data) < 40_000


def test_products_are_all_weights_that_something_is_multiplied_with_but_those_in_groups() -> None:
    own = tiny_families.shipped("sana")
    graph = GraphStore(None).graph(spec(own.manifest, "denoiser", reader(own.registry, own.manifest)))
    matrices = {name for name, shape in graph.shapes.items() if name.endswith(".weight") and len(shape) > 1}
    depthwise = {name for name in matrices if "conv_depth" in name}
    assert depthwise
    assert graph.products == matrices - depthwise


def test_another_process_exports_the_same_graph(encoder: ComponentSpec, tmp_path: Path) -> None:
    """Its weights are random: the id must not depend on them, nor on anything of the process."""
    elsewhere = GraphStore(DiskCache(tmp_path / "a"), in_process=False).graph(encoder)
    here = GraphStore(DiskCache(tmp_path / "b")).graph(encoder)
    assert elsewhere.id == here.id == graph_id(here.onnx())


def test_a_known_config_needs_no_export(encoder: ComponentSpec, tmp_path: Path) -> None:
    first = GraphStore(DiskCache(tmp_path)).graph(encoder)
    made = first.id
    again = GraphStore(DiskCache(tmp_path))
    again._export = _refuse
    assert again.graph(encoder).id == made


@pytest.mark.parametrize(("name", "role"), [("sdxl", "encoder"), ("sdxl", "denoiser"), ("pixart", "denoiser")])
def test_an_export_does_not_take_its_example_s_rows_for_a_constant(name: str, role: str) -> None:
    own = tiny_families.shipped(name)
    component = spec(own.manifest, role, reader(own.registry, own.manifest))
    given = ComponentGraph(component, Path).example(2)
    rows = torch.export.Dim("rows", max=63)  # from 64 on UNets copy what they enlarge
    program = torch.export.export(
        component.network(), (), kwargs=given, dynamic_shapes={port: {0: rows} for port in given}, strict=False
    )
    assert len(program.range_constraints) == 1


def _refuse(spec: ComponentSpec, folder: Path) -> None:
    raise AssertionError("exported again")


def test_a_key_follows_config_inputs_and_shape_and_nothing_else(encoder: ComponentSpec) -> None:
    keys = {
        denoiser().key,
        denoiser(inputs=frozenset("s")).key,
        denoiser(resolutions=((32, 32),)).key,
        encoder.key,
    }
    assert len(keys) == 4
    same = [(name, text.replace("0.42.1", "0.43.0")) for name, text in denoiser().files]
    assert same != list(denoiser().files)
    plain = denoiser()
    assert ComponentSpec(plain.family, plain.role, tuple(same), plain.inputs, plain.latent).key == plain.key


def test_a_spec_crosses_a_process_border_whole(encoder: ComponentSpec) -> None:
    assert ComponentSpec.from_json(encoder.to_json()) == encoder


def test_an_export_without_a_cache_folder_says_so(encoder: ComponentSpec) -> None:
    with pytest.raises(InternalError, match="cache folder"):
        GraphStore(None).graph(encoder).onnx()


def test_ports_and_outputs_are_known_without_an_export() -> None:
    graph = GraphStore(None).graph(denoiser(inputs=frozenset("s")))
    assert graph.inputs == {"x", "t", "cond", "s"}
    assert graph.output_shapes == {"pred": tiny_sd.LATENT}
