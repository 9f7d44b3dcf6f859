"""ONNX Runtime, fp32, on the CPU or by its CUDA provider.

Weights that are set are inputs of the graph, bound once per engine where they lie: other weights are another binding
of the same session, and the engine that serves is not touched. Weights as constants are initializers given from
outside to a graph that names them; then ONNX Runtime lays them out for its kernels, which is what makes a call cheaper
and a session cost a pass over the graph. Milliseconds of processor time, one thread, EPYC Zen 4, the embedded teacher's
denoiser (4.0 M parameters), set / constant: batch 1 4.7 / 3.6, batch 8 16.7 / 13.4, eager 9.1 and 21.4.

There is no bf16: the CPU kernels have none, and a CUDA session would need a graph whose own types are bf16, all but
the path of times. Idle threads do not spin, for the server has other work for the cores. One session takes every batch
size: one per size (`add_free_dimension_override_by_name`) was not faster, nor were other settings of the arena. An
optimised graph is not kept on disk, because where optimising takes time its outcome holds the weights.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engines.backends.base import (
    Graph,
    Precision,
    Profile,
    Tolerance,
    check_inputs,
    check_weights,
    num_weights,
    tolerance,
)
from engines.errors import BackendUnavailable
from engines.streams import is_alone, whole

WEIGHT = "weight:"
TOLERANCE: dict[Precision, Tolerance] = {"fp32": Tolerance(levels=1, share=1.0, psnr_db=50.0)}
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}


def automatic_precision(device: str) -> Precision:
    return "fp32"


@dataclass(frozen=True, slots=True)
class _Sessions:
    """For calls in a stream, and for those that are alone: they have all threads."""

    streamed: Any
    alone: Any


@dataclass(frozen=True, slots=True)
class Compiled:
    """`sessions` read their weights as inputs. Where they are constants there are none yet, and `model` names them."""

    graph: Graph
    profile: Profile
    sessions: _Sessions | None
    model: bytes = b""
    names: tuple[str, ...] = ()


_Bound = tuple[Any, Any]  # a session and a binding of it


class OnnxRuntimeEngine:
    """Bindings of sessions, one per stream, which several engines may share. It owns copies of the weights."""

    def __init__(self, graph: Graph, sessions: _Sessions, weights: Mapping[str, Any], streams: int) -> None:
        self.inputs = graph.inputs
        self._outputs = {port.name: tuple(port.shape[1:]) for port in sessions.streamed.get_outputs()}
        self._reads = {port.name for port in sessions.streamed.get_inputs()}
        self._weights = {name: value for name, value in weights.items() if name in self._reads}
        self._streamed: SimpleQueue[_Bound] | None = self._bound(sessions.streamed, streams)
        self._alone: SimpleQueue[_Bound] | None = self._bound(sessions.alone, 1) if streams > 1 else self._streamed

    def _bound(self, session: Any, count: int) -> "SimpleQueue[_Bound]":
        free: SimpleQueue[_Bound] = SimpleQueue()
        for _ in range(count):
            binding = session.io_binding()
            for name, value in self._weights.items():
                binding.bind_ortvalue_input(name, value)
            free.put((session, binding))
        return free

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The session reads the caller's tensors and writes new ones: nothing is copied on the way."""
        check_inputs(self.inputs, inputs)
        held = {name: value.contiguous() for name, value in inputs.items()}
        first = next(iter(held.values()))
        made = {name: torch.empty((len(first), *shape), device=first.device) for name, shape in self._outputs.items()}
        free = self._alone if is_alone() else self._streamed
        assert free is not None, "a closed engine"
        session, binding = bound = free.get()
        try:
            for name in held.keys() & self._reads:
                binding.bind_input(name, *_place(held[name]))
            for name, value in made.items():
                binding.bind_output(name, *_place(value))
            session.run_with_iobinding(binding)
        finally:
            free.put(bound)
        return made

    def close(self) -> None:
        self._streamed = self._alone = None
        self._weights = {}


class OnnxRuntime:
    name = "onnxruntime"
    reload: Literal["refit", "recompile"] = "refit"
    constants_pay = True
    concurrent = True

    @property
    def on_gpu(self) -> bool:
        import onnxruntime

        return _CUDA in onnxruntime.get_available_providers()

    def available(self) -> bool:
        return importlib.util.find_spec("onnxruntime") is not None

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        tolerance(self.name, profile.precision)
        if profile.weights == "constant":
            return Compiled(graph, profile, None, *_with_named_constants(graph.onnx()))
        return Compiled(graph, profile, _sessions(graph.onnx(), profile, {}))

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> OnnxRuntimeEngine:
        check_weights(compiled.graph.shapes, weights)
        device = "cpu" if compiled.sessions is None else torch.device(compiled.profile.device).type
        values = {WEIGHT + name: _value(value, device) for name, value in weights.items()}
        if compiled.sessions is not None:
            return OnnxRuntimeEngine(compiled.graph, compiled.sessions, values, compiled.profile.streams)
        sessions = _sessions(compiled.model, compiled.profile, {name: values[name] for name in compiled.names})
        return OnnxRuntimeEngine(compiled.graph, sessions, {}, compiled.profile.streams)

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        """Constants are held once as they came and once by each session as its kernels want them."""
        copies = 1 if profile.weights == "set" else 1 + min(profile.streams, 2)
        return copies * 4 * num_weights(graph)


def providers(device: str, installed: Sequence[str]) -> list[Any]:
    """What a session may run on, best first. TF32 is off: fp32 has to be fp32.

    Raises:
        BackendUnavailable: a GPU is asked of a package that has no provider for one.
    """
    if torch.device(device).type == "cpu":
        return [_CPU]
    if _CUDA not in installed:
        raise BackendUnavailable(f"onnxruntime has {', '.join(installed)} here: for {device} install onnxruntime-gpu")
    return [(_CUDA, {"device_id": str(torch.device(device).index or 0), "use_tf32": "0"}), _CPU]


def _sessions(model: bytes, profile: Profile, constants: Mapping[str, Any]) -> _Sessions:
    streamed = _session(model, profile, constants)
    return _Sessions(streamed, _session(model, whole(profile), constants) if profile.streams > 1 else streamed)


def _session(model: bytes, profile: Profile, constants: Mapping[str, Any]) -> Any:
    """`constants` (name -> OrtValue) are all that the model names. This holds the GIL.

    Raises:
        BackendUnavailable: the provider that was asked for did not start; ONNX Runtime itself would take the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = profile.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if constants:
        options.add_external_initializers(list(constants), list(constants.values()))
    wanted = providers(profile.device, onnxruntime.get_available_providers())
    session = onnxruntime.InferenceSession(model, options, providers=wanted)
    if session.get_providers() != [name if isinstance(name, str) else name[0] for name in wanted]:
        raise BackendUnavailable(f"onnxruntime did not start on {profile.device}: it offers {session.get_providers()}")
    return session


def _value(weight: Tensor, device: str) -> Any:
    """A copy: ONNX Runtime would read the caller's own memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.array(weight.float().cpu().numpy(), order="C"), device)


def _place(value: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Device, its number, element type, shape and address, as a binding asks for them."""
    return value.device.type, value.device.index or 0, _NUMPY[value.dtype], tuple(value.shape), value.data_ptr()


def _with_named_constants(model: bytes) -> tuple[bytes, tuple[str, ...]]:
    """The graph whose weights are no inputs but initializers without bytes, to be given to each session; their names.

    Initializers with bytes must not be replaced so: `add_initializer` over those gives wrong pictures in silence.
    """
    import onnx

    made = onnx.load_from_string(model)
    weights = [port for port in made.graph.input if port.name.startswith(WEIGHT)]
    kept = [port for port in made.graph.input if not port.name.startswith(WEIGHT)]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    for port in weights:
        kind = port.type.tensor_type
        named = made.graph.initializer.add(name=port.name, data_type=kind.elem_type)
        named.dims.extend(one.dim_value for one in kind.shape.dim)
        named.data_location = onnx.TensorProto.EXTERNAL
        named.external_data.add(key="location", value="given to the session")
    return bytes(made.SerializeToString()), tuple(port.name for port in weights)


BACKEND = OnnxRuntime
