"""Types the products of a bf16 graph that have a weight as fp8 (e4m3), by explicit quantisation.

One scale a tensor, a power of two: of a floating-point grid that costs range alone, bf16 holds it exactly, and what
a measurement changes in its last digits makes no other plan. Weights are held in fp8; what they are multiplied with is
rounded at run time, and saturates where it is larger than its scale foresees. What stays bf16: products of two
activations (attention), convolutions in groups, weights that are read twice and those of which no scale is known.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.backends._tensorrt_graph import WEIGHT, is_weight
from engines.backends._tensorrt_scale import exponent

_BF16, _FP8 = int(TensorProto.BFLOAT16), int(TensorProto.FLOAT8E4M3FN)
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
Weights = dict[str, np.ndarray[Any, Any]]


def in_fp8(model: onnx.ModelProto, weights: Weights, given: Mapping[str, int]) -> Weights:
    """Rewrites a model that is typed as bf16. Returns `weights`, those that are fp8 now divided by their scales.

    `given`: weight name -> exponent of the scale of what it is multiplied with.
    """
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    ports = {port.name.removeprefix(WEIGHT): port for port in graph.input if is_weight(port.name)}
    scaled, emitted, scales = dict(weights), _Nodes(), set()
    dequantised: dict[str, str] = {}
    for node in graph.node:
        name = _weight_of(node, made, uses)
        if name is not None and name in given and _is_bf16(ports[name]):
            largest = float(np.abs(weights[name]).max())
            if 0 < largest < math.inf:
                own = exponent(largest)
                scaled[name] = np.ldexp(weights[name].astype(np.float32), -own)
                ports[name].type.tensor_type.elem_type = _FP8
                dequantised[WEIGHT + name] = emitted.dequantised(WEIGHT + name, own)
                node.input[0] = emitted.rounded(node.input[0], given[name])
                scales |= {own, given[name]}
        emitted.nodes.append(node)
    for node in emitted.nodes:
        node.input[:] = [dequantised.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(emitted.in_order())
    graph.initializer.extend(numpy_helper.from_array(_power(each), _scale(each)) for each in sorted(scales))
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return scaled


class _Nodes:
    """What a graph becomes. `first` takes weights alone, which may be turned before the product that reads them."""

    def __init__(self) -> None:
        self.first: list[onnx.NodeProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self._rounded: dict[tuple[str, int], str] = {}

    def in_order(self) -> list[onnx.NodeProto]:
        return [*self.first, *self.nodes]

    def dequantised(self, name: str, own: int) -> str:
        self.first.append(helper.make_node("DequantizeLinear", [name, _scale(own)], [f"{name}:dq"], name=f"dq:{name}"))
        return f"{name}:dq"

    def rounded(self, name: str, own: int) -> str:
        """An activation in fp8 and back; once for all products that read it so."""
        if (name, own) not in self._rounded:
            low, back = f"{name}:fp8:{own}", f"{name}:dq:{own}"
            quantise = helper.make_node(
                "QuantizeLinear", [name, _scale(own)], [low], name=f"q:{low}", output_dtype=_FP8
            )
            self.nodes += [quantise, helper.make_node("DequantizeLinear", [low, _scale(own)], [back], name=f"dq:{low}")]
            self._rounded[name, own] = back
        return self._rounded[name, own]


def _weight_of(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], uses: Mapping[str, int]) -> str | None:
    """The weight that a product alone reads, turned or not."""
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    if node.op_type not in _PRODUCTS or groups != 1:
        return None
    name = node.input[1]
    while uses[name] == 1 and name in made and made[name].op_type == "Transpose":
        name = made[name].input[0]
    return name.removeprefix(WEIGHT) if uses[name] == 1 and is_weight(name) else None


def _is_bf16(port: onnx.ValueInfoProto) -> bool:
    return bool(port.type.tensor_type.elem_type == _BF16)


def _scale(own: int) -> str:
    return f"scale:2^{own}"


def _power(own: int) -> np.ndarray[Any, Any]:
    return np.asarray(2.0**own, np.float32).astype(helper.tensor_dtype_to_np_dtype(_BF16))
