"""The ONNX graph as TensorRT is given it: strongly typed, so every precision stands in the graph itself.

bf16 follows the rule of `torch.autocast`. Products of matrices and convolutions read and write bf16. fp32 stays what
adds up or takes roots, exponentials and sinusoids; what leads to a Sin or Cos, since 1000·t would be rounded before
its sinusoid; and operators that ONNX has not in bf16. The rest takes the widest type of its inputs; weights and
constants have no say in that and come in the type that their readers have. Casts are put where types meet; the inputs
and outputs of the network stay fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.errors import UnsupportedGraph

WEIGHT = "weight:"
_FP32, _BF16 = int(TensorProto.FLOAT), int(TensorProto.BFLOAT16)
_KINDS = {"fp32": _FP32, "bf16": _BF16, "fp8": int(TensorProto.FLOAT8E4M3FN)}
_NARROW = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_WIDE = frozenset(
    {
        "Cast", "Cos", "CumSum", "Exp", "Log", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
        "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sin", "Softplus", "Sqrt",
    }
)  # fmt: skip
# Inputs of these that are float, but say sizes and not values: they have to be fp32.
_FP32_ONLY = {"Resize": (1, 2), "Upsample": (1,)}
# The first in which convolutions may be bf16; nothing else changed from 21.
_BF16_OPSET = 22
_DATA = "weights.bin"


def is_weight(name: str) -> bool:
    return name.startswith(WEIGHT)


def weight_types(model: onnx.ModelProto) -> dict[str, str]:
    """Weight name (without its prefix) -> "fp32", "bf16" or "fp8", as the graph reads it."""
    kinds = {kind: name for name, kind in _KINDS.items()}
    return {
        port.name.removeprefix(WEIGHT): kinds[port.type.tensor_type.elem_type]
        for port in model.graph.input
        if is_weight(port.name)
    }


def in_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with its products in bf16.

    Raises:
        UnsupportedGraph: it holds control flow, whose types depend on what flows.
    """
    if nested := [node for node in model.graph.node if any(a.HasField("g") or a.graphs for a in node.attribute)]:
        raise UnsupportedGraph(f"{named(nested[0])}: control flow cannot be typed as bf16; serve this network in fp32")
    _Typing(model.graph, onnx.shape_inference.infer_shapes(model).graph).rewrite()
    next(one for one in model.opset_import if not one.domain).version = _BF16_OPSET
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return model


def write(model: onnx.ModelProto, folder: Path, weights: Mapping[str, np.ndarray[Any, Any]] | None) -> Path:
    """Writes `model` with its weights as constants of their own names in one file beside it; None leaves them inputs.

    The names stay `weight:<name>`, by which a refit sets them. A file, since a protocol buffer ends at 2 GB.
    """
    if weights is not None:
        types = weight_types(model)
        kept = [port for port in model.graph.input if not is_weight(port.name)]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        with (folder / _DATA).open("wb") as data:
            for name in sorted(types):
                model.graph.initializer.append(_outside(WEIGHT + name, _as(weights[name], types[name]), data))
    path = folder / "network.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _as(array: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    return array.astype(helper.tensor_dtype_to_np_dtype(_KINDS[kind]))


def _outside(name: str, array: np.ndarray[Any, Any], data: Any) -> TensorProto:
    made = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("location", _DATA), ("offset", data.tell()), ("length", array.nbytes)):
        made.external_data.add(key=key, value=str(value))
    data.write(np.ascontiguousarray(array).tobytes())
    return made


@dataclass
class _Typing:
    """Which type each float tensor of a graph gets, and the casts that this takes."""

    graph: onnx.GraphProto
    inferred: onnx.GraphProto
    types: dict[str, int] = field(default_factory=dict)  # of every float tensor
    casts: dict[tuple[str, int], str] = field(default_factory=dict)
    emitted: list[onnx.NodeProto] = field(default_factory=list)

    def rewrite(self) -> None:
        nodes, floats = list(self.graph.node), self._floats()
        leaves = self._leaves(floats)
        free = self._free(nodes, floats, set(leaves))
        for node, kind in zip(nodes, self._kinds(nodes, floats, free, leaves), strict=True):
            for i, name in enumerate(node.input):
                if name in self.types:
                    node.input[i] = self._cast(name, _FP32 if i in _FP32_ONLY.get(node.op_type, ()) else kind)
            self.emitted.append(node)
        self._outputs()
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.emitted)

    def _floats(self) -> set[str]:
        ports = [*self.inferred.input, *self.inferred.output, *self.inferred.value_info]
        known = {port.name for port in ports} | {init.name for init in self.graph.initializer}
        for node in self.graph.node:
            if lost := [name for name in node.output if name and name not in known]:
                raise UnsupportedGraph(f"{named(node)}: nothing says what type {lost[0]!r} has")
        found = {port.name for port in ports if port.type.tensor_type.elem_type == _FP32}
        return found | {init.name for init in self.graph.initializer if init.data_type == _FP32}

    def _leaves(self, floats: set[str]) -> dict[str, Any]:
        """Weights and constants: what holds the type of each."""
        found: dict[str, Any] = {p.name: p for p in self.graph.input if is_weight(p.name) and p.name in floats}
        return (
            found | {init.name: init for init in self.graph.initializer if init.name in floats} | _constants(self.graph)
        )

    def _free(self, nodes: list[onnx.NodeProto], floats: set[str], free: set[str]) -> set[str]:
        """Names that come from weights and constants alone, such as a transposed weight."""
        for node in nodes:
            given = [name for name in node.input if name in floats]
            if given and free.issuperset(given) and node.op_type not in _NARROW and not _is_wide(node):
                free |= {name for name in node.output if name in floats}
        return free

    def _kinds(
        self, nodes: list[onnx.NodeProto], floats: set[str], free: set[str], leaves: dict[str, Any]
    ) -> list[int]:
        """The type that each node computes in. Fills `types`."""
        kinds, wide = [_FP32] * len(nodes), _leading_to_sinusoids(nodes)
        self.types = {port.name: _FP32 for port in self.graph.input if port.name in floats - free}
        asked: dict[str, set[int]] = {name: set() for name in free}
        for i, node in enumerate(nodes):
            if not free.intersection(node.output):
                kinds[i] = self._kind(node, i in wide)
                self.types |= {name: kinds[i] for name in node.output if name in floats}
                _ask(asked, node, kinds[i])
        for i, node in reversed(list(enumerate(nodes))):
            if free.intersection(node.output) - leaves.keys():
                kinds[i] = _BF16 if set().union(*(asked[name] for name in node.output)) == {_BF16} else _FP32
                self.types |= {name: kinds[i] for name in node.output}
                _ask(asked, node, kinds[i])
        for name, holder in leaves.items():
            self.types[name] = _BF16 if asked[name] == {_BF16} else _FP32
            if self.types[name] == _BF16:
                _narrow(holder)
        return kinds

    def _kind(self, node: onnx.NodeProto, wide: bool) -> int:
        if wide or _is_wide(node):
            return _FP32
        if node.op_type in _NARROW:
            return _BF16
        given = {self.types[name] for name in node.input if name in self.types}
        return _BF16 if given == {_BF16} else _FP32

    def _cast(self, name: str, kind: int) -> str:
        if self.types[name] == kind:
            return name
        if (name, kind) not in self.casts:
            made = self.casts[name, kind] = f"{name}:{'bf16' if kind == _BF16 else 'fp32'}"
            self.emitted.append(helper.make_node("Cast", [name], [made], name=f"cast:{made}", to=kind))
        return self.casts[name, kind]

    def _outputs(self) -> None:
        for port in self.graph.output:
            if self.types.get(port.name) == _BF16:
                inner = f"{port.name}:inner"
                for node in self.emitted:
                    node.input[:] = [inner if name == port.name else name for name in node.input]
                    node.output[:] = [inner if name == port.name else name for name in node.output]
                self.emitted.append(helper.make_node("Cast", [inner], [port.name], name=f"cast:{port.name}", to=_FP32))


def _is_wide(node: onnx.NodeProto) -> bool:
    return node.op_type in _WIDE or not _exists_in_bf16(node.op_type, node.domain)


@cache
def _exists_in_bf16(op: str, domain: str) -> bool:
    """Whether ONNX allows bf16 wherever this operator allows fp32 as a value."""
    schema = onnx.defs.get_schema(op, _BF16_OPSET, domain)
    sizes = _FP32_ONLY.get(op, ())
    used = {port.type_str for i, port in enumerate(schema.inputs) if i not in sizes}
    used |= {port.type_str for port in schema.outputs}
    allowed = [set(one.allowed_type_strs) for one in schema.type_constraints if one.type_param_str in used]
    return all("tensor(bfloat16)" in types for types in allowed if "tensor(float)" in types)


def _ask(asked: dict[str, set[int]], node: onnx.NodeProto, kind: int) -> None:
    for i, name in enumerate(node.input):
        if name in asked:
            asked[name].add(_FP32 if i in _FP32_ONLY.get(node.op_type, ()) else kind)


def _narrow(holder: Any) -> None:
    """Makes a weight's port, or a constant, bf16."""
    if isinstance(holder, onnx.ValueInfoProto):
        holder.type.tensor_type.elem_type = _BF16
    else:
        value = numpy_helper.to_array(holder).astype(helper.tensor_dtype_to_np_dtype(_BF16))
        holder.CopyFrom(numpy_helper.from_array(value, holder.name))


def _constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """Output of a Constant node -> its value, where that is a float tensor."""
    found = {}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_type == _FP32:
                    found[node.output[0]] = attribute.t
    return found


def _leading_to_sinusoids(nodes: list[onnx.NodeProto]) -> set[int]:
    """Positions of the nodes that a Sin or Cos depends on."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    waiting = [i for i, node in enumerate(nodes) if node.op_type in ("Sin", "Cos")]
    found: set[int] = set()
    while waiting:
        i = waiting.pop()
        if i not in found:
            found.add(i)
            waiting.extend(maker[name] for name in nodes[i].input if name in maker)
    return found


def named(node: onnx.NodeProto) -> str:
    return f"node {node.name or node.output[0]!r} ({node.op_type})"
