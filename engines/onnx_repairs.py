"""What torch's exporter writes that ONNX forbids or that compilers cannot read, written as what is meant."""

from typing import Any

_SMALL = 1e-7


def repaired(model: Any) -> Any:
    """A model fresh from the exporter, which still says the shape of every tensor; changed in place."""
    without_idle_squeezes(model)
    without_sequences(model)
    with_small_terms_kept(model)
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


def with_small_terms_kept(model: Any) -> None:
    """The optimizer takes a scalar below 1e-8 for 0 and leaves the sum out, and with it what keeps 0 / (0 + 1e-15) from
    being no number; a vector of one value it lets be."""
    import onnx

    constants = _constants(model, kinds=(1,))
    for node in model.graph.node:
        if node.op_type in ("Add", "Sub"):
            for i, name in enumerate(node.input):
                if name in constants and constants[name].ndim == 0 and 0 < abs(float(constants[name])) <= _SMALL:
                    node.input[i] = f"{node.name or node.output[0]}:term"
                    kept = onnx.numpy_helper.from_array(constants[name].reshape(1), node.input[i])
                    model.graph.initializer.append(kept)


def _parts(split: Any, length: int) -> list[int]:
    """Lengths of the parts: a number is that of each but the last, a list is those of all."""
    if split.ndim:
        return [int(size) for size in split]
    size = int(split)
    return [min(size, length - start) for start in range(0, length, size)]


def _shapes(model: Any) -> dict[str, Any]:
    return {port.name: port.type.tensor_type.shape.dim for port in [*model.graph.value_info, *model.graph.input]}


def _constants(model: Any, kinds: tuple[int, ...] = (6, 7)) -> dict[str, Any]:
    """By name, those of these element types; int32 and int64 if none are named."""
    import onnx

    values = {init.name: init for init in model.graph.initializer}
    values |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    return {name: onnx.numpy_helper.to_array(value) for name, value in values.items() if value.data_type in kinds}
