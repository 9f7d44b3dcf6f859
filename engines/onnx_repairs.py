"""What torch's exporter writes that ONNX forbids or that compilers cannot read, written as what is meant."""

from typing import Any


def repaired(model: Any) -> Any:
    """A model fresh from the exporter, which still says the shape of every tensor; changed in place."""
    without_idle_squeezes(model)
    without_sequences(model)
    return model


def without_idle_squeezes(model: Any) -> None:
    """torch leaves an axis longer than 1 as it is when told to squeeze it; ONNX forbids to squeeze it."""
    shapes, constants = _shapes(model), _constants(model)
    for node in model.graph.node:
        if node.op_type == "Squeeze" and node.input[0] in shapes and node.input[-1] in constants:
            axes = constants[node.input[-1]].flatten()
            if any(shapes[node.input[0]][int(axis)].dim_value > 1 for axis in axes):
                node.op_type = "Identity"
                del node.input[1:]


def without_sequences(model: Any) -> None:
    """torch's split makes a sequence, of which TensorRT reads none: one Split makes the parts that are asked for."""
    import onnx

    shapes, constants = _shapes(model), _constants(model)
    made = {}
    for node in model.graph.node:
        if node.op_type == "SplitToSequence" and node.input[0] in shapes and node.input[-1] in constants:
            (axis,) = (attribute.i for attribute in node.attribute if attribute.name == "axis")
            sizes = _parts(constants[node.input[-1]], shapes[node.input[0]][axis].dim_value)
            made[node.output[0]] = [f"{node.output[0]}:{i}" for i in range(len(sizes))]
            model.graph.initializer.append(onnx.helper.make_tensor(f"{node.output[0]}:sizes", 7, [len(sizes)], sizes))
            split = onnx.helper.make_node(
                "Split", [node.input[0], f"{node.output[0]}:sizes"], made[node.output[0]], name=node.name, axis=axis
            )
            node.CopyFrom(split)
        elif node.op_type == "SequenceAt" and node.input[0] in made:
            part = made[node.input[0]][int(constants[node.input[1]])]
            node.CopyFrom(onnx.helper.make_node("Identity", [part], list(node.output), name=node.name))


def _parts(split: Any, length: int) -> list[int]:
    """Lengths of the parts: a number is that of each but the last, a list is those of all."""
    if split.ndim:
        return [int(size) for size in split]
    size = int(split)
    return [min(size, length - start) for start in range(0, length, size)]


def _shapes(model: Any) -> dict[str, Any]:
    return {port.name: port.type.tensor_type.shape.dim for port in [*model.graph.value_info, *model.graph.input]}


def _constants(model: Any) -> dict[str, Any]:
    import onnx

    values = {init.name: init for init in model.graph.initializer}
    values |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    return {name: onnx.numpy_helper.to_array(value) for name, value in values.items() if value.data_type in (6, 7)}
