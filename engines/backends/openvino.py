"""OpenVINO on the CPU, fp32 or bf16: compiled graphs per batch size and stream, weights set from outside.

Weights are Parameters of the graph, so other weights are new infer requests of the same compiled model: nothing is
compiled and the engine that serves is not touched. The alternative is weights as constants, compiled in.
Milliseconds of processor time for one call, one thread, EPYC Zen 4 (avx512_bf16, no AMX), the embedded teacher
(4.0 M-parameter UNet at 4×4×16, VAE to 64×64 pixels), weights set / constant:
    denoiser  fp32 batch 1 5.1 / 2.4, batch 8 12.6 / 9.6 · bf16 5.3 / 1.2, 14.1 / 8.6 · eager 7.7, 20.5
    decoder   fp32 batch 1 3.4 / 1.8, batch 8 17.0 / 14.5 · bf16 3.5 / 1.0, 13.7 / 8.1 · eager 8.8, 21.8
Other weights cost 2–3.5 ms a graph when set, 260–440 ms (denoiser) or 110–270 ms (decoder) when compiled in. So
a denoiser's weights are set, since every student brings its own; encoders and decoders, which students share with
their teacher, hold constants (`engines.loader` decides). Set weights in bf16 are converted at each call, so without
AMX bf16 does not pay for the denoiser: `auto` is fp32 there.

The precision is asked for by name, because OpenVINO's default is bf16 where the processor has it. In bf16 the
plug-in would round 1000·t before its sinusoid (error of the prediction 4.1 % instead of 1.4 %), so whatever leads to a
Sin or Cos is cut into a model of its own, which runs in fp32.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.backends.base import (
    Graph,
    Precision,
    Profile,
    Tolerance,
    check_inputs,
    check_weights,
    machine,
    num_weights,
)
from engines.errors import GraphMismatch
from engines.streams import ALONE_ROWS, is_alone, whole

WEIGHT = "weight:"
_Array = npt.NDArray[np.float32]
TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(levels=1, share=1.0, psnr_db=50.0),
    "bf16": Tolerance(levels=4, share=0.99, psnr_db=42.0),
}
"""bf16 as measured on the embedded teacher, 16 pictures at 1 to 16 steps: 99.6 % within 2 levels, 99.8 % within 4,
52 to 55 dB. fp32: at most 1 level, 94 dB."""
_HINT = {"fp32": "f32", "bf16": "bf16"}


def automatic_precision(device: str) -> Precision:
    """bf16 where the processor multiplies matrices in it."""
    try:
        return "bf16" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "fp32"
    except OSError:
        return "fp32"


@dataclass(frozen=True, slots=True)
class _Shaped:
    """The graph for one batch size. `features` turns times into sinusoids in fp32; None where there are none."""

    main: Any
    features: Any | None

    @property
    def feature_names(self) -> tuple[str, ...]:
        return _feature_names(len(self.features.outputs)) if self.features else ()


@dataclass(frozen=True, slots=True)
class _Exported:
    """A compiled graph as bytes. To open them takes a third of what compiling takes, in whichever process."""

    main: bytes
    features: bytes | None

    @classmethod
    def of(cls, shaped: _Shaped) -> "_Exported":
        features = shaped.features and shaped.features.export_model().getvalue()
        return cls(shaped.main.export_model().getvalue(), features)

    @classmethod
    def read(cls, folder: Path) -> "_Exported":
        features = folder / "features"
        return cls((folder / "main").read_bytes(), features.read_bytes() if features.exists() else None)

    def write(self, folder: Path) -> None:
        (folder / "main").write_bytes(self.main)
        if self.features is not None:
            (folder / "features").write_bytes(self.features)

    def open(self, precision: Precision, threads: int) -> _Shaped:
        from engines.backends._openvino_library import core

        features = self.features and core.import_model(self.features, "CPU", _options("fp32", threads))
        return _Shaped(core.import_model(self.main, "CPU", _options(precision, threads)), features)


@dataclass(frozen=True, slots=True)
class _Forms:
    """The graph by batch size, once per stream, and of the small sizes for calls that are alone.

    One compiled model of several streams would compute in threads of its own, and every call be handed over twice: two
    calls at once of the denoiser and the decoder (batch 16) took 65 ms so, and 56 ms with a model for each stream.
    """

    streamed: Mapping[int, Sequence[_Shaped]]
    alone: Mapping[int, Sequence[_Shaped]]


@dataclass(frozen=True, slots=True)
class Compiled:
    """`forms` is None where the weights are constants: then `load` compiles."""

    graph: Graph
    profile: Profile
    forms: _Forms | None


class OpenVinoEngine:
    """An infer request of each form, all with the same weights. It owns copies of them."""

    def __init__(self, graph: Graph, forms: _Forms, weights: Mapping[str, _Array]) -> None:
        from engines.backends._openvino_library import ov

        self.inputs = graph.inputs
        self._outputs = graph.outputs
        self._kept = dict(weights)
        tensors = {name: ov.Tensor(value, shared_memory=True) for name, value in self._kept.items()}
        self._streamed = {rows: _requests(each, tensors) for rows, each in forms.streamed.items()}
        self._alone = {rows: _requests(each, tensors) for rows, each in forms.alone.items()}

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        check_inputs(self.inputs, inputs)
        rows = len(next(iter(inputs.values())))
        free = self._alone.get(rows, self._streamed[rows]) if is_alone() else self._streamed[rows]
        request = free.get()
        try:
            arrays = request.infer({name: value.contiguous().numpy() for name, value in inputs.items()})
        finally:
            free.put(request)
        return {name: torch.from_numpy(array) for name, array in zip(self._outputs, arrays, strict=True)}

    def close(self) -> None:
        self._streamed.clear()
        self._alone.clear()
        self._kept.clear()


class _Request:
    def __init__(self, shaped: _Shaped, weights: Mapping[str, Any]) -> None:
        self._main = shaped.main.create_infer_request()
        self._features = shaped.features.create_infer_request() if shaped.features else None
        self._feature_names = shaped.feature_names
        self._reads = {port.get_any_name() for port in shaped.main.inputs}
        self._times = {port.get_any_name() for port in shaped.features.inputs} if shaped.features else set()
        wanted = {name.removeprefix(WEIGHT) for name in self._reads if name.startswith(WEIGHT)}
        if unset := sorted(wanted - set(weights)):
            raise GraphMismatch(f"{len(unset)} weights of the graph were never set, first {unset[:3]}")
        for name in wanted:
            self._main.set_tensor(WEIGHT + name, weights[name])

    def infer(self, arrays: Mapping[str, Any]) -> list[Any]:
        """New arrays, one per output. The GIL is free meanwhile."""
        from engines.backends._openvino_library import ov

        tensors = {name: ov.Tensor(array, shared_memory=True) for name, array in arrays.items()}
        if self._features is not None:
            for name in self._times:
                self._features.set_tensor(name, tensors[name])
            self._features.infer()
            for i, name in enumerate(self._feature_names):
                tensors[name] = self._features.get_output_tensor(i)
        for name in tensors.keys() & self._reads:
            self._main.set_tensor(name, tensors[name])
        self._main.infer()
        return [tensor.data.copy() for tensor in self._main.output_tensors]


def _requests(forms: Sequence[_Shaped], weights: Mapping[str, Any]) -> "SimpleQueue[_Request]":
    free: SimpleQueue[_Request] = SimpleQueue()
    for shaped in forms:
        free.put(_Request(shaped, weights))
    return free


class OpenVino:
    name = "openvino"
    reload: Literal["refit", "recompile"] = "refit"
    constants_pay = True
    concurrent = True
    on_gpu = False

    def available(self) -> bool:
        return importlib.util.find_spec("openvino") is not None

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        if profile.weights == "constant":
            graph.onnx()
            return Compiled(graph, profile, None)

        def kept(rows: int) -> _Exported:
            def compile_into(folder: Path) -> None:
                _Exported.of(_compile(graph.onnx(), rows, profile.precision)).write(folder)

            what = (f"openvino {version(self.name)}", str(rows), profile.precision, machine(profile.device))
            return _Exported.read(graph.kept(what, compile_into))

        return Compiled(graph, profile, _forms(profile, kept))

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> OpenVinoEngine:
        graph, profile = compiled.graph, compiled.profile
        check_weights(graph.shapes, weights)
        arrays = {name: np.array(value.float().numpy(), order="C") for name, value in weights.items()}
        if compiled.forms is not None:
            return OpenVinoEngine(graph, compiled.forms, arrays)
        onnx = graph.onnx()
        forms = _forms(profile, lambda rows: _Exported.of(_compile(onnx, rows, profile.precision, arrays)))
        return OpenVinoEngine(graph, forms, {})

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        """Constants are held twice by each compiled form, once as they came and once as the kernels want them."""
        forms = profile.streams * len(profile.batches) + len(_alone_sizes(profile))
        copies = 1 if profile.weights == "set" else 2 * forms
        return copies * 4 * num_weights(graph)


def _forms(profile: Profile, exported: Callable[[int], _Exported]) -> _Forms:
    """Each batch size is compiled once, and opened as often as there are streams."""
    streamed, alone = {}, {}
    for rows in profile.batches:
        form = exported(rows)
        streamed[rows] = [form.open(profile.precision, profile.threads) for _ in range(profile.streams)]
        if rows in _alone_sizes(profile):
            alone[rows] = [form.open(profile.precision, whole(profile).threads)]
    return _Forms(streamed, alone)


def _alone_sizes(profile: Profile) -> list[int]:
    return [rows for rows in profile.batches if rows <= ALONE_ROWS and profile.streams > 1]


def _compile(onnx: bytes, rows: int, precision: Precision, constants: Mapping[str, _Array] | None = None) -> _Shaped:
    from engines.backends._openvino_library import core

    model = core.read_model(onnx)
    model.reshape({p.get_any_name(): [rows, *p.get_partial_shape()[1:]] for p in _data_inputs(model)})
    if constants is not None:
        model = _filled(model, constants)
    rest, features = _cut_features(model)
    main = core.compile_model(rest, "CPU", _options(precision))
    return _Shaped(main, features and core.compile_model(features, "CPU", _options("fp32")))


def _options(precision: Precision, threads: int = 1) -> dict[str, Any]:
    return {
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": _HINT[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


def _data_inputs(model: Any) -> list[Any]:
    return [port for port in model.inputs if not port.get_any_name().startswith(WEIGHT)]


def _filled(model: Any, weights: Mapping[str, _Array]) -> Any:
    """The model with its weights inside."""
    from engines.backends._openvino_library import ov

    for node in model.get_parameters():
        name = node.output(0).get_any_name()
        if name.startswith(WEIGHT):
            value = ov.opset13.constant(weights[name.removeprefix(WEIGHT)])
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(value.output(0))
    return ov.Model(model.get_results(), _sources(model.get_results()))


def _cut_features(model: Any) -> tuple[Any, Any | None]:
    """Cuts all that leads to a Sin or Cos out of `model`: (the rest, that). It comes back as `_feature_names`."""
    from engines.backends._openvino_library import ov

    ends = [node.output(0) for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]
    if not ends:
        return model, None
    names = _feature_names(len(ends))
    for name, end in zip(names, ends, strict=True):
        port = ov.opset13.parameter(end.get_partial_shape(), end.get_element_type(), name=name)
        port.output(0).get_tensor().set_names({name})
        for target in list(end.get_target_inputs()):
            target.replace_source_output(port.output(0))
    main = ov.Model(model.get_results(), _sources(model.get_results()))
    features = ov.Model([ov.opset13.result(end) for end in ends], _sources([end.get_node() for end in ends]))
    return main, features


def _feature_names(number: int) -> tuple[str, ...]:
    return tuple(f"feature:{i}" for i in range(number))


def _sources(nodes: list[Any]) -> list[Any]:
    """The parameters that `nodes` depend on."""
    seen: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in seen:
            seen[node.get_friendly_name()] = node
            waiting.extend(value.get_node() for value in node.input_values())
    return [node for node in seen.values() if node.get_type_name() == "Parameter"]


BACKEND = OpenVino
