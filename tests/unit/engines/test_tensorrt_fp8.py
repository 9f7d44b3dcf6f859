"""Which products of a graph become fp8, and that they stay the same products, on graphs small enough to read."""

import sys
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.backends import tensorrt
from engines.backends._tensorrt_fp8 import in_fp8
from engines.backends._tensorrt_graph import in_bf16, weight_types, write
from engines.backends._tensorrt_scale import exponent
from tests.unit.engines.test_tensorrt_graph import graph, node

DRAW = np.random.default_rng(0)
WEIGHTS = {name: DRAW.standard_normal((4, 4)).astype(np.float32) for name in "abc"}


def typed(model: onnx.ModelProto, given: dict[str, int]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    made = in_bf16(model)
    names = set(weight_types(made))
    return made, in_fp8(made, {name: WEIGHTS[name] for name in names}, given)


def ops(model: onnx.ModelProto) -> list[str]:
    return [one.op_type for one in model.graph.node]


@pytest.mark.parametrize(("largest", "expected"), [(448.0, 0), (449.0, 1), (224.0, -1), (1.0, -8), (3e4, 7)])
def test_a_scale_is_the_least_power_of_two_that_holds_all(largest: float, expected: int) -> None:
    assert exponent(largest) == expected
    assert largest / 2.0**expected <= 448 < largest / 2.0 ** (expected - 1) + 1e-9 * largest or largest == 448.0


def test_who_serves_takes_scales_without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "engines.backends._tensorrt_fp8")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert tensorrt.exponents({"w": 1.0}) == (("w", exponent(2.0)),)


def test_a_product_reads_its_weight_and_what_it_multiplies_in_fp8() -> None:
    made, _ = typed(graph(node("MatMul", "x weight:a", "y"), weights=("a",)), {"a": -3})
    assert weight_types(made) == {"a": "fp8"}
    product = next(one for one in made.graph.node if one.op_type == "MatMul")
    makers = {name: one for one in made.graph.node for name in one.output}
    assert [makers[name].op_type for name in product.input] == ["DequantizeLinear"] * 2
    quantise = makers[makers[product.input[0]].input[0]]
    scales = {init.name: float(numpy_helper.to_array(init).astype(np.float32)) for init in made.graph.initializer}
    assert (quantise.op_type, scales[quantise.input[1]]) == ("QuantizeLinear", 2.0**-3)
    assert scales[makers[product.input[1]].input[1]] == 2.0 ** exponent(float(np.abs(WEIGHTS["a"]).max()))


def test_a_weight_is_dequantised_before_it_is_turned() -> None:
    model = graph(node("Transpose", "weight:a", "turned"), node("MatMul", "x turned", "y"), weights=("a",))
    made, _ = typed(model, {"a": 0})
    turn = next(one for one in made.graph.node if one.op_type == "Transpose")
    assert turn.input[0] == "weight:a:dq"


def test_what_several_products_read_is_rounded_once() -> None:
    model = graph(
        node("MatMul", "x weight:a", "h"), node("MatMul", "x weight:b", "i"), node("Add", "h i", "y"),
        weights=("a", "b"),
    )  # fmt: skip
    made, _ = typed(model, {"a": 0, "b": 0})
    assert ops(made).count("QuantizeLinear") == 1
    assert weight_types(made) == {"a": "fp8", "b": "fp8"}


def test_what_has_no_scale_or_two_readers_or_groups_or_no_weight_stays_bf16() -> None:
    model = graph(
        node("MatMul", "x weight:a", "h"), node("MatMul", "h weight:b", "i"), node("Mul", "i weight:b", "j"),
        node("MatMul", "j h", "y"), weights=("a", "b"),
    )  # fmt: skip
    made, scaled = typed(model, {"b": 0})
    assert weight_types(made) == {"a": "bf16", "b": "bf16"}
    assert "QuantizeLinear" not in ops(made)
    assert all(np.array_equal(scaled[name], WEIGHTS[name]) for name in "ab")
    grouped = helper.make_node("Conv", ["x", "weight:a"], ["y"], group=2)
    model = graph(grouped, weights=("a",))
    shapes = zip((*model.graph.input[::2], model.graph.output[0]), ((1, 4, 4), (4, 2, 1), (1, 4, 4)), strict=True)
    for port, shape in shapes:
        port.CopyFrom(helper.make_tensor_value_info(port.name, TensorProto.FLOAT, shape))
    assert weight_types(typed(model, {"a": 0})[0]) == {"a": "bf16"}


def test_a_weight_that_is_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS, "a", np.zeros((4, 4), np.float32))
    assert weight_types(typed(graph(node("MatMul", "x weight:a", "y"), weights=("a",)), {"a": 0})[0]) == {"a": "bf16"}


def test_it_computes_what_rounding_to_fp8_by_hand_does(tmp_path: Any) -> None:
    """Run by ONNX's own reference, activations within the scale and one far beyond, which saturates."""
    model = graph(node("Transpose", "weight:a", "turned", perm=[1, 0]), node("MatMul", "x turned", "y"), weights=("a",))
    made, scaled = typed(model, {"a": -7})
    x = np.array([[0.3, -1.7, 2.9, 100.0]], np.float32)
    read = onnx.load(write(made, tmp_path, scaled))
    (out,) = ReferenceEvaluator(read).run(None, {"x": x, "t": np.zeros((1, 1), np.float32)})
    own = exponent(float(np.abs(WEIGHTS["a"]).max()))

    def rounded(value: Any, scale: float) -> Any:
        return np.clip(value / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale

    narrow = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = rounded(narrow, 2.0**-7) @ rounded(WEIGHTS["a"], 2.0**own).T
    np.testing.assert_allclose(out, expected, rtol=2e-2, atol=2e-2)
    assert np.abs(rounded(narrow, 2.0**-7)).max() == 448 * 2.0**-7
