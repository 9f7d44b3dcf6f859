"""What goes wrong is said: which library, GPU, node or shape, and what to do. The real library says it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from onnx import TensorProto, helper

from engines.backends import _tensorrt_library as libraries
from engines.backends import tensorrt
from engines.backends._tensorrt_build import Order, _stream, build_elsewhere, profiles
from engines.backends._tensorrt_engine import check_shapes, limit
from engines.backends._tensorrt_library import Gpu
from engines.backends.base import Graph, Precision, Profile, choose
from engines.errors import BackendUnavailable, InternalError, InvalidRequest, UnknownPlugin, UnsupportedGraph
from tests.tensorrt.graphs import case

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'fewstep[tensorrt]'")
pytestmark = [pytest.mark.xdist_group("sd"), pytest.mark.timeout(600)]  # whose encoder is exported here
without_gpu = pytest.mark.skipif(libraries.gpu() is not None, reason="a GPU is here")
AHEAD = Order("input", (1,), "fp32", ("SM89",))


def network(*nodes: Any, width: int = 8) -> bytes:
    """x [rows, 8] -> y, by `nodes`, with a weight w [width, 8]."""
    made = helper.make_graph(
        list(nodes),
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 8]),
            helper.make_tensor_value_info("weight:w", TensorProto.FLOAT, [width, 8]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    data: bytes = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("strange", 1)]
    ).SerializeToString()
    return data


def test_an_operator_that_it_does_not_know_is_named_with_its_node(tmp_path: Path) -> None:
    unknown = helper.make_node("Twirl", ["x", "weight:w"], ["y"], name="block.3/twirl", domain="strange")
    with pytest.raises(UnsupportedGraph, match=r"'block\.3/twirl' \(Twirl\)"):
        build_elsewhere(network(unknown), AHEAD, None, tmp_path)


def test_a_node_whose_shapes_do_not_fit_is_named(tmp_path: Path) -> None:
    product = helper.make_node("MatMul", ["x", "weight:w"], ["y"], name="head/product")
    with pytest.raises(UnsupportedGraph, match="head/product"):
        build_elsewhere(network(product, width=5), AHEAD, None, tmp_path)
    build_elsewhere(network(product), AHEAD, None, tmp_path)
    assert (tmp_path / "plan.bin").stat().st_size > 1000


def test_a_target_that_the_library_does_not_have_is_answered_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"SM90.*choose from .*SM89") as raised:
        build_elsewhere(
            case("sd", "encoder").graph.onnx(), dataclasses.replace(AHEAD, targets=("SM90",)), None, tmp_path
        )
    assert raised.value.param == "targets"


@without_gpu
def test_without_a_gpu_the_library_itself_refuses_to_build_for_the_one_here(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="name targets"):
        build_elsewhere(case("sd", "encoder").graph.onnx(), dataclasses.replace(AHEAD, targets=()), None, tmp_path)


@without_gpu
def test_without_a_gpu_plans_are_built_and_running_them_is_refused() -> None:
    made, backend = case("sd", "encoder"), tensorrt.TensorRt()
    compiled = backend.build(made.graph, Profile((1,), targets=("SM89",)))
    assert compiled.folder is not None
    with pytest.raises(BackendUnavailable, match=r"running a plan needs an NVIDIA GPU.*plans can be built here"):
        backend.load(compiled, made.weights)
    with pytest.raises(BackendUnavailable, match="no targets are named"):
        backend.build(made.graph, Profile((1,)))


@without_gpu
def test_auto_takes_tensorrt_only_where_it_can_run() -> None:
    assert not tensorrt.TensorRt().available()
    assert choose().backend != "tensorrt"
    with pytest.raises(UnknownPlugin, match="'tensorrt' cannot run here"):
        choose("tensorrt")


def test_a_missing_library_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "MODULES", ("no_such_tensorrt",))
    assert not libraries.installed()
    with pytest.raises(BackendUnavailable, match=r"not installed here; install .*fewstep\[tensorrt\]"):
        libraries.find.__wrapped__()


def test_a_library_that_cannot_be_loaded_is_said_with_its_own_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_tensorrt.py").write_text(
        'raise ImportError("libnvinfer.so.11: cannot open shared object file")'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "MODULES", ("broken_tensorrt",))
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded \(broken_tensorrt: libnvinfer\.so\.11"):
        libraries.find.__wrapped__()


def test_a_builder_that_dies_is_no_error_of_the_graph(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"died \(1\)"):
        build_elsewhere(b"no graph at all", AHEAD, None, tmp_path)


PRODUCT = network(helper.make_node("MatMul", ["x", "weight:w"], ["y"], name="head/product"))
FP8 = Order("constant", (1,), "fp8", ("SM89",), exponents=(("w", -6),))


def test_fp8_is_built_for_gpus_that_have_it_and_refused_for_others_with_those_that_do(tmp_path: Path) -> None:
    held = {"w": torch.randn(8, 8)}
    build_elsewhere(PRODUCT, FP8, held, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["weights"] == {"w": "fp8"}
    with pytest.raises(UnsupportedGraph, match="fp8 takes SM89 or later"):
        build_elsewhere(PRODUCT, dataclasses.replace(FP8, targets=("SM80",)), held, tmp_path)


def test_fp8_without_scales_is_refused_before_anything_is_built() -> None:
    profile = Profile((1,), "fp8", targets=("SM89",), weights="constant")
    with pytest.raises(InvalidRequest, match="fp8 takes the scales of a student"):
        tensorrt.plan(cast("Graph", Small()), profile, {"w": torch.ones(8, 8)})


def test_a_plan_whose_weights_may_be_streamed_is_built(tmp_path: Path) -> None:
    order = dataclasses.replace(FP8, precision="bf16", exponents=(), streamed=True)
    build_elsewhere(PRODUCT, order, {"w": torch.randn(8, 8)}, tmp_path)
    assert (tmp_path / "plan.bin").stat().st_size > 1000


def test_a_library_that_streams_no_weights_is_said() -> None:
    class BuilderFlag:
        __members__: ClassVar[dict[str, int]] = {"REFIT": 1}

    library = libraries.Library(SimpleNamespace(BuilderFlag=BuilderFlag), "tensorrt", "9.3.0")
    with pytest.raises(BackendUnavailable, match=r"tensorrt 9\.3\.0 streams no weights.*WORKER_RESIDENT_BYTES"):
        _stream(library, None)


def test_the_room_for_weights_is_set_and_a_library_that_keeps_more_is_refused() -> None:
    engine = SimpleNamespace(streamable_weights_size=1000, weight_streaming_budget_v2=1000)
    limit(engine, 300)
    assert engine.weight_streaming_budget_v2 == 300
    limit(engine, 5000)
    assert engine.weight_streaming_budget_v2 == 1000

    class Stubborn:
        streamable_weights_size = 1000
        weight_streaming_budget_v2 = property(lambda self: 800, lambda self, value: None)

    with pytest.raises(BackendUnavailable, match=r"keeps 800 bytes .* 300 were allowed"):
        limit(Stubborn(), 300)


class Small:
    """144 bytes of weights in bf16, 80 in fp8."""

    shapes: ClassVar[dict[str, tuple[int, ...]]] = {"w": (8, 8), "bias": (8,)}
    products = frozenset({"w"})


@pytest.mark.parametrize(
    ("room", "precision", "streams"),
    [
        (0, "bf16", False),
        (144, "bf16", False),
        (143, "bf16", True),
        (80, "fp8", False),
        (79, "fp8", True),
        (287, "fp32", True),
    ],
)
def test_only_what_does_not_fit_is_streamed_and_its_weights_are_constants(
    room: int, precision: Precision, streams: bool
) -> None:
    graph, profile = cast("Graph", Small()), Profile(precision=precision, weight_room=room)
    assert tensorrt.streamed(graph, profile) is streams
    assert tensorrt.form(graph, profile) == ("constant" if streams or precision == "fp8" else "refit")
    assert tensorrt.TensorRt().weight_bytes(graph, profile) == (
        room if streams else {"fp32": 288, "bf16": 144, "fp8": 80}[precision]
    )


SHAPES = {"x": (4, 8, 8), "t": ()}


def test_an_input_of_another_shape_and_a_batch_without_a_profile_are_refused() -> None:
    assert check_shapes(SHAPES, (1, 4), {"x": torch.zeros(4, 4, 8, 8), "t": torch.zeros(4)}) == 4
    with pytest.raises(InvalidRequest, match=r"x is \(4, 4, 8, 16\): this plan takes \(4, 4, 8, 8\)"):
        check_shapes(SHAPES, (1, 4), {"x": torch.zeros(4, 4, 8, 16), "t": torch.zeros(4)})
    with pytest.raises(InvalidRequest, match=r"t is \(1,\)"):
        check_shapes(SHAPES, (1, 4), {"x": torch.zeros(4, 4, 8, 8), "t": torch.zeros(1)})
    with pytest.raises(InvalidRequest, match=r"3 rows: .*\[1, 4\]"):
        check_shapes(SHAPES, (4, 1), {"x": torch.zeros(3, 4, 8, 8), "t": torch.zeros(3)})


def test_a_plan_for_other_gpus_is_refused_with_the_target_to_name() -> None:
    here = Gpu("NVIDIA L4", "SM89", "13.0")
    tensorrt.check_target((), here)
    tensorrt.check_target(("SM80", "SM89"), here)
    with pytest.raises(BackendUnavailable, match="for SM80, SM120 and NVIDIA L4 is SM89"):
        tensorrt.check_target(("SM80", "SM120"), here)


def test_where_the_weights_are_follows_from_the_profile() -> None:
    assert tensorrt.form(cast("Graph", Small()), Profile(weights="constant")) == "constant"
    assert tensorrt.form(cast("Graph", Small()), Profile(weights="constant", targets=("SM89",))) == "constant"
    assert tensorrt.form(cast("Graph", Small()), Profile()) == "refit"
    assert tensorrt.form(cast("Graph", Small()), Profile(targets=("SM89",))) == "input"


def test_profiles_are_one_span_for_rtx_and_one_per_batch_size_for_the_other() -> None:
    assert profiles({"x": (4, 8)}, (8, 1, 2), one=True) == [{"x": ((1, 4, 8), (8, 4, 8), (8, 4, 8))}]
    assert profiles({"x": (4, 8), "t": ()}, (4, 1), one=False) == [
        {"x": ((rows, 4, 8),) * 3, "t": ((rows,),) * 3} for rows in (1, 4)
    ]


HERE = Gpu("NVIDIA L4", "SM89", "13.0")
ORDER = Order("refit", (1, 4), "bf16", ())
WEIGHTS = {"a": torch.zeros(3), "b": torch.ones(2, 2)}


@pytest.mark.parametrize(
    "changed",
    [
        {"order": dataclasses.replace(ORDER, form="input")},
        {"order": dataclasses.replace(ORDER, batches=(1, 8))},
        {"order": dataclasses.replace(ORDER, precision="fp32")},
        {"order": dataclasses.replace(ORDER, targets=("SM89",))},
        {"order": dataclasses.replace(ORDER, exponents=(("a", 1),))},
        {"order": dataclasses.replace(ORDER, streamed=True)},
        {"library": libraries.Library(None, "tensorrt", "11.4.0")},
        {"library": libraries.Library(None, "tensorrt_rtx", "10.16.1")},
        {"here": dataclasses.replace(HERE, cuda="13.1")},
        {"here": dataclasses.replace(HERE, name="NVIDIA L40S")},
        {"here": dataclasses.replace(HERE, capability="SM120")},
        {"here": None},
        {"weights": None},
        {"weights": WEIGHTS | {"a": torch.tensor([0.0, 0.0, 1.0])}},
        {"weights": WEIGHTS | {"b": torch.zeros(2, 2)}},
        {"weights": WEIGHTS | {"a": torch.zeros(3, dtype=torch.int32)}},
        {"weights": {"a": torch.ones(2, 2), "b": torch.zeros(3)}},
    ],
    ids=str,
)
def test_a_plan_is_kept_by_all_that_it_depends_on(changed: dict[str, Any]) -> None:
    plain: dict[str, Any] = {
        "library": libraries.Library(None, "tensorrt", "10.16.1"), "order": ORDER, "here": HERE, "weights": WEIGHTS
    }  # fmt: skip
    assert tensorrt.depends_on(**plain) == tensorrt.depends_on(**plain)
    assert tensorrt.depends_on(**plain | changed) != tensorrt.depends_on(**plain)
