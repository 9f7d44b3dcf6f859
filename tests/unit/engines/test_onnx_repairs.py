"""What torch's exporter writes and what is made of it, on graphs small enough to read."""

from typing import Any

import numpy as np
import onnx
import onnxscript.optimizer
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.onnx_repairs import repaired


def model(
    nodes: list[Any], width: int, constants: dict[str, Any], outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width, 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None, None]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(("axis", "length", "left"), [(1, 16, "Identity"), (-2, 16, "Identity"), (1, 1, "Squeeze")])
def test_only_a_squeeze_that_torch_would_not_do_is_left_out(axis: int, length: int, left: str) -> None:
    made = repaired(model([helper.make_node("Squeeze", ["x", "axes"], ["y"])], length, {"axes": [axis]}))
    (node,) = made.graph.node
    assert node.op_type == left
    assert list(node.input) == (["x"] if left == "Identity" else ["x", "axes"])


@pytest.mark.parametrize(("split", "sizes"), [(16, [16, 16, 8]), ([10, 30], [10, 30])], ids=str)
def test_a_sequence_of_parts_becomes_one_split(split: Any, sizes: list[int]) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "split"], ["parts"], axis=1),
        *(helper.make_node("SequenceAt", ["parts", f"at{i}"], [f"y{i}"]) for i in (0, 1)),
    ]
    given = model(nodes, 40, {"split": split, "at0": 0, "at1": 1}, ("y0", "y1"))
    x = np.random.default_rng(0).standard_normal((2, 40, 32), dtype=np.float32)
    expected = ReferenceEvaluator(given).run(None, {"x": x})
    made = repaired(given)
    assert [node.op_type for node in made.graph.node] == ["Split", "Identity", "Identity"]
    onnx.checker.check_model(made, full_check=True)
    found = ReferenceEvaluator(made).run(None, {"x": x})
    assert [part.shape[1] for part in found] == sizes[:2]
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("term", [1e-15, 1e-9, 0.5])
def test_a_small_term_of_a_divisor_outlives_the_optimizer(term: float) -> None:
    nodes = [
        helper.make_node("Sub", ["x", "x"], ["zero"]),
        helper.make_node("Add", ["zero", "term"], ["divisor"]),
        helper.make_node("Div", ["zero", "divisor"], ["y"]),
    ]
    made = onnxscript.optimizer.optimize(repaired(model(nodes, 4, {"term": np.float32(term)})))
    assert any(node.op_type == "Add" for node in made.graph.node)
    (found,) = ReferenceEvaluator(made).run(None, {"x": np.ones((2, 4, 32), np.float32)})
    np.testing.assert_array_equal(found, np.zeros((2, 4, 32), np.float32))
