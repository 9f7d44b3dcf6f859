"""The rules by which a graph is typed as bf16, on graphs small enough to read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.backends._tensorrt_graph import in_bf16, weight_types, write
from engines.errors import UnsupportedGraph

FLOAT, BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16


def graph(*nodes: Any, weights: tuple[str, ...] = (), constants: dict[str, Any] | None = None) -> onnx.ModelProto:
    """x [rows, 4] and t [rows, 1] -> y, by `nodes`; weights are [4, 4]."""
    made = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", FLOAT, ["rows", 4]), helper.make_tensor_value_info("t", FLOAT, ["rows", 1])]
        + [helper.make_tensor_value_info(f"weight:{name}", FLOAT, [4, 4]) for name in weights],
        [helper.make_tensor_value_info("y", FLOAT, ["rows", 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Type of each tensor, as ONNX itself infers it."""
    found = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    ports = [*found.input, *found.output, *found.value_info]
    return {port.name: port.type.tensor_type.elem_type for port in ports} | {
        init.name: init.data_type for init in found.initializer
    }


def node(op: str, given: str, made: str, **attributes: Any) -> Any:
    return helper.make_node(op, given.split(), [made], name=f"{op}.{made}", **attributes)


def test_products_and_what_follows_them_are_bf16_and_the_ends_stay_fp32() -> None:
    made = types(in_bf16(graph(node("MatMul", "x weight:a", "h"), node("Relu", "h", "y"), weights=("a",))))
    assert (made["x"], made["weight:a"], made["h"], made["y"]) == (FLOAT, BF16, BF16, FLOAT)


def test_all_that_leads_to_a_sinusoid_stays_fp32() -> None:
    model = graph(
        node("MatMul", "t weight:f", "angles"), node("Mul", "angles thousand", "turned"),
        node("Sin", "turned", "waves"),
        node("MatMul", "waves weight:a", "y"), weights=("a",), constants={"thousand": np.float32(1000)},
    )  # fmt: skip
    model.graph.input.append(helper.make_tensor_value_info("weight:f", FLOAT, [1, 4]))
    made = types(in_bf16(model))
    assert {made[name] for name in ("weight:f", "angles", "thousand", "turned", "waves")} == {FLOAT}
    assert made["weight:a"] == BF16


def test_sums_and_roots_stay_fp32_and_what_meets_them_is_widened() -> None:
    model = graph(
        node("MatMul", "x weight:a", "h"), node("Mul", "h h", "square"), node("ReduceMean", "square", "mean", axes=[1]),
        node("Sqrt", "mean", "root"), node("Div", "h root", "normed"), node("Mul", "normed weight:g", "y"),
        weights=("a", "g"),
    )  # fmt: skip
    model.opset_import[0].version = 17  # in which the axes of a mean are an attribute
    made = types(in_bf16(model))
    assert (made["h"], made["mean"], made["root"], made["normed"], made["weight:g"]) == (
        BF16,
        FLOAT,
        FLOAT,
        FLOAT,
        FLOAT,
    )


def test_a_weight_that_is_only_turned_before_a_product_is_turned_in_bf16() -> None:
    made = in_bf16(graph(node("Transpose", "weight:a", "turned"), node("MatMul", "x turned", "y"), weights=("a",)))
    assert weight_types(made) == {"a": "bf16"}
    assert [one.op_type for one in made.graph.node] == ["Transpose", "Cast", "MatMul", "Cast"]


def test_a_weight_that_both_kinds_read_stays_fp32_and_is_cast_once_for_all() -> None:
    made = in_bf16(
        graph(
            node("MatMul", "x weight:a", "h"), node("MatMul", "h weight:a", "i"), node("Exp", "weight:a", "e"),
            node("MatMul", "i e", "y"), weights=("a",),
        )
    )  # fmt: skip
    assert weight_types(made) == {"a": "fp32"}
    assert len([one for one in made.graph.node if one.op_type == "Cast" and one.input[0] == "weight:a"]) == 1


def test_constants_take_the_type_of_what_they_meet() -> None:
    made = types(
        in_bf16(
            graph(
                node("MatMul", "x weight:a", "h"), node("Add", "h one", "i"), node("Exp", "i", "e"),
                node("Mul", "e two", "y"),
                weights=("a",), constants={"one": np.float32(1), "two": np.float32(2)},
            )
        )
    )  # fmt: skip
    assert (made["one"], made["i"], made["two"]) == (BF16, BF16, FLOAT)


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [node("Identity", "x", "inner")], "b", [], [helper.make_tensor_value_info("inner", FLOAT, None)]
    )
    model = graph(node("If", "so", "y", then_branch=branch, else_branch=branch), constants={"so": np.asarray(True)})
    with pytest.raises(UnsupportedGraph, match=r"If\.y.*control flow"):
        in_bf16(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_written_as_constants_of_their_names_beside_the_graph(bf16: bool, tmp_path: Path) -> None:
    model = graph(
        node("MatMul", "x weight:a", "h"), node("Exp", "h", "e"), node("Add", "e weight:b", "y"), weights=("a", "b")
    )
    values = {name: np.random.default_rng(i).standard_normal((4, 4), dtype=np.float32) for i, name in enumerate("ab")}
    read = onnx.load(write(in_bf16(model) if bf16 else model, tmp_path, values))
    found = {init.name: numpy_helper.to_array(init) for init in read.graph.initializer}
    assert [port.name for port in read.graph.input] == ["x", "t"]
    kind = helper.tensor_dtype_to_np_dtype(BF16) if bf16 else np.float32
    np.testing.assert_array_equal(found["weight:a"], values["a"].astype(kind))
    np.testing.assert_array_equal(found["weight:b"], values["b"])


def test_without_values_the_weights_stay_inputs(tmp_path: Path) -> None:
    read = onnx.load(write(graph(node("MatMul", "x weight:a", "y"), weights=("a",)), tmp_path, None))
    assert [port.name for port in read.graph.input] == ["x", "t", "weight:a"]
    assert not read.graph.initializer
