"""Builds a plan, in a process of its own: parsing and building hold the GIL that live traffic needs.

The process imports neither torch nor diffusers. It is given a folder with the graph, the order and, where they are to
be constants, the weights; it leaves `plan.bin` and `plan.json`, or an error with its code.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engines import elsewhere, errors
from engines.backends._tensorrt_library import Library, find
from engines.errors import BackendUnavailable, InternalError, InvalidRequest, UnsupportedGraph

Form = Literal["constant", "refit", "input"]
"""Where a plan's weights are: in it for good, in it until they are refitted, or outside as inputs of the network."""
PLAN, FACTS = "plan.bin", "plan.json"
_GRAPH, _ORDER, _WEIGHTS, _ERROR = "graph.onnx", "order.json", "weights.safetensors", "error.json"


@dataclass(frozen=True, slots=True)
class Order:
    """What to build. `targets` are names of compute capabilities; none means the GPU here.

    `exponents`, for fp8: each weight with that of the scale of what it is multiplied with. Weights that are `streamed`
    may stay on the host while the plan runs.
    """

    form: Form
    batches: tuple[int, ...]
    precision: str
    targets: tuple[str, ...]
    exponents: tuple[tuple[str, int], ...] = ()
    streamed: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Order":
        given = json.loads(text)
        lists = {name: tuple(given.pop(name)) for name in ("batches", "targets")}
        return cls(**given | lists | {"exponents": tuple((name, own) for name, own in given["exponents"])})


def build_elsewhere(onnx: bytes, order: Order, weights: Mapping[str, Any] | None, out: Path) -> None:
    """Has a niced process write the plan of `onnx` into `out`. `weights` are torch tensors, for constants alone.

    Raises:
        UnsupportedGraph: the library cannot parse or build it: which node, and why.
        BackendUnavailable: no library, or it needs a GPU for this and there is none.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        asked = Path(name)
        (asked / _GRAPH).write_bytes(onnx)
        (asked / _ORDER).write_text(order.to_json())
        if weights is not None:
            save_file({key: value.float().contiguous() for key, value in weights.items()}, asked / _WEIGHTS)
        done = elsewhere.run("engines.backends._tensorrt_build", str(asked), str(out))
        if done.returncode:
            raise _told(asked / _ERROR, done)


def build(asked: Path, out: Path) -> None:
    """The plan that the folder `asked` describes."""
    import onnx

    from engines.backends import _tensorrt_graph as graphs
    from engines.backends._tensorrt_fp8 import in_fp8

    begun = time.perf_counter()
    order = Order.from_json((asked / _ORDER).read_text())
    model = onnx.load_from_string((asked / _GRAPH).read_bytes())
    if order.precision != "fp32":
        model = graphs.in_bf16(model)
    weights = _weights(asked, order, model)
    if order.precision == "fp8" and weights is not None:
        weights = in_fp8(model, weights, dict(order.exponents))
    types = graphs.weight_types(model)
    path = graphs.write(model, asked, weights)
    plan = serialized(find(), path, order, sorted(types), out.parent)
    (out / PLAN).write_bytes(plan)
    seconds = {"build_s": time.perf_counter() - begun, "cpu_s": time.process_time()}
    facts = {"form": order.form, "weights": types, "bytes": len(plan)} | seconds
    (out / FACTS).write_text(json.dumps(facts, sort_keys=True))


def serialized(library: Library, path: Path, order: Order, weights: Sequence[str], timings: Path) -> memoryview:
    """The plan of the ONNX file at `path`. `timings` is the folder in which the datacenter library keeps its timings.

    Raises:
        UnsupportedGraph, BackendUnavailable: see `build_elsewhere`.
    """
    api, messages = library.api, library.messages()
    builder = api.Builder(messages)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, messages)
    if not parser.parse_from_file(str(path)):
        raise UnsupportedGraph(_refused([parser.get_error(i) for i in range(parser.num_errors)], messages.lines))
    config = builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)
    for shapes in profiles(_inputs(network), order.batches, one=library.rtx):
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    _aim(api, config, order.targets)
    if order.form == "refit":
        _make_refittable(api, config, network, weights)
    if order.streamed:
        _stream(library, config)
    kept = None if library.rtx else _with_timings(config, timings / f"tensorrt-{library.version}.timings")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(messages.lines)
    if kept is not None:
        _keep(config.get_timing_cache(), kept)
    return memoryview(plan)


def profiles(
    inputs: Mapping[str, tuple[int, ...]], batches: Sequence[int], *, one: bool
) -> list[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]]:
    """Least, best and largest shape of each input, per profile. `inputs`: name -> shape without its rows.

    `one`: a single profile for all batch sizes; else one for each, in ascending order.
    """
    sizes = sorted(batches)
    spans = [(sizes[0], sizes[-1], sizes[-1])] if one else [(size, size, size) for size in sizes]
    return [
        {name: ((least, *rest), (best, *rest), (most, *rest)) for name, rest in inputs.items()}
        for least, best, most in spans
    ]


def _weights(asked: Path, order: Order, model: Any) -> dict[str, Any] | None:
    """By name; drawn at random where they are only there to be refitted."""
    if order.form == "input":
        return None
    if order.form == "constant":
        from safetensors.numpy import load_file

        return dict(load_file(asked / _WEIGHTS))
    draw = np.random.default_rng(0)
    found = {}
    for port in model.graph.input:
        if port.name.startswith("weight:"):
            shape = [size.dim_value for size in port.type.tensor_type.shape.dim]
            found[port.name.removeprefix("weight:")] = 0.05 * draw.standard_normal(shape, dtype=np.float32)
    return found


def _inputs(network: Any) -> dict[str, tuple[int, ...]]:
    ports = [network.get_input(i) for i in range(network.num_inputs)]
    return {port.name: tuple(port.shape)[1:] for port in ports if not port.name.startswith("weight:")}


def _aim(api: Any, config: Any, targets: Sequence[str]) -> None:
    """Sets what the plan is for. The datacenter library knows no targets and is asked for none."""
    known = getattr(api, "ComputeCapability", None)
    if known is None:
        if targets:
            raise BackendUnavailable("TensorRT builds for the GPU it finds: only TensorRT-RTX builds for others")
        return
    names = targets or ("CURRENT",)
    if unknown := [name for name in names if name not in known.__members__]:
        allowed = ", ".join(name for name in known.__members__ if name.startswith("SM"))
        raise InvalidRequest(f"no plan can be built for {', '.join(unknown)}: choose from {allowed}", param="targets")
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(known.__members__[name], i)


def _make_refittable(api: Any, config: Any, network: Any, weights: Sequence[str]) -> None:
    """The weights, and they alone: constants of the graph stay what the builder may fold.

    Raises:
        UnsupportedGraph: the parser has made something else of a weight, so that it could not be set by its name.
    """
    config.set_flag(api.BuilderFlag.REFIT_INDIVIDUAL)
    if lost := [name for name in weights if not network.mark_weights_refittable(f"weight:{name}")]:
        raise UnsupportedGraph(f"{len(lost)} weights cannot be refitted, first {lost[:3]}: build them in as constants")


def _stream(library: Library, config: Any) -> None:
    """
    Raises:
        BackendUnavailable: a library that cannot.
    """
    if "WEIGHT_STREAMING" not in library.api.BuilderFlag.__members__:
        raise BackendUnavailable(
            f"{library.name} {library.version} streams no weights, and this network's do not fit: raise "
            "WORKER_RESIDENT_BYTES, or install TensorRT 10 or later or TensorRT-RTX"
        )
    config.set_flag(library.api.BuilderFlag.WEIGHT_STREAMING)


def _with_timings(config: Any, path: Path) -> Path:
    config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.exists() else b""), False)
    return path


def _keep(timing_cache: Any, path: Path) -> None:
    """Whoever ends last wins: the file only saves time."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(memoryview(timing_cache.serialize()))
    part.replace(path)


def _refused(found: Sequence[Any], lines: Sequence[str]) -> str:
    if not found:
        return f"TensorRT cannot read the graph: {_last(lines)}"
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"TensorRT cannot take node {first.node_name()!r} ({first.node_operator()}): {first.desc()}{more}"


def _failed(lines: Sequence[str]) -> errors.FewstepError:
    text = _last(lines)
    if any("HW-specific datatypes" in line for line in lines):
        return UnsupportedGraph(
            f"a GPU that the plan is for does not compute in its precision (fp8 takes SM89 or later, bf16 SM80): {text}"
        )
    if any("CUDA driver" in line for line in lines):
        return BackendUnavailable(f"TensorRT needs a GPU to build this plan: name targets instead. It says: {text}")
    return UnsupportedGraph(f"TensorRT cannot build the graph: {text}")


def _last(lines: Sequence[str]) -> str:
    return lines[-1].strip()[:600] if lines else "it gives no reason"


def _told(path: Path, done: "subprocess.CompletedProcess[str]") -> errors.FewstepError:
    if path.exists():
        told = json.loads(path.read_text())
        return errors.by_code(told["code"])(told["message"], param=told["param"])
    return InternalError(f"the process that builds plans died ({done.returncode}): {done.stderr.strip()[-800:]}")


def _main(asked: Path, out: Path) -> int:
    try:
        build(asked, out)
    except errors.FewstepError as error:
        told = {"code": error.code, "message": error.message, "param": error.param}
        (asked / _ERROR).write_text(json.dumps(told))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
