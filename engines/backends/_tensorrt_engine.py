"""A plan on the GPU: its weights, and one execution context with a CUDA graph for every batch size.

Contexts run one after another in one thread, so they share one scratch memory. What an engine is given may be on any
device, what it returns is on the GPU; the copies to and from its own buffers are part of a call.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.backends._tensorrt_build import Form
from engines.backends._tensorrt_library import Library
from engines.backends.base import Graph, check_inputs
from engines.errors import BackendUnavailable, GraphMismatch, InternalError, InvalidRequest

WEIGHT = "weight:"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_shapes(expected: Mapping[str, tuple[int, ...]], batches: tuple[int, ...], given: Mapping[str, Tensor]) -> int:
    """The number of rows. `expected`: shape of each input without its rows.

    Raises:
        InvalidRequest: an input of another shape than the plan was built for, or a batch size that has no profile.
    """
    rows = len(next(iter(given.values())))
    for name, value in given.items():
        if tuple(value.shape) != (rows, *expected[name]):
            raise InvalidRequest(f"{name} is {tuple(value.shape)}: this plan takes {(rows, *expected[name])}")
    if rows not in batches:
        raise InvalidRequest(f"{rows} rows: this plan has profiles for {sorted(batches)}")
    return rows


class TensorRtEngine:
    """`types` says which precision the plan wants of each weight.

    `room`: bytes of the weights that may be on the GPU; the rest comes from the host at each call. None: all are there.
    """

    def __init__(
        self,
        library: Library,
        graph: Graph,
        plan: bytes,
        weights: Mapping[str, Tensor],
        *,
        form: Form,
        types: Mapping[str, str],
        batches: tuple[int, ...],
        room: int | None = None,
    ) -> None:
        self.inputs = graph.inputs
        self._messages = library.messages()
        self._runtime = library.api.Runtime(self._messages)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendUnavailable(f"TensorRT cannot load the plan here: {' '.join(self._messages.lines)[:600]}")
        if room is not None:
            limit(engine, room)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        fixed = {}
        if form != "constant":
            fixed = {name: weights[name].to("cuda", DTYPES[kind]).contiguous() for name, kind in types.items()}
        if form == "refit":
            refit(library, engine, fixed, self._stream)
            fixed = {}
        scratch = torch.empty(engine.device_memory_size_v2, dtype=torch.uint8, device="cuda")
        self._kept: tuple[Any, ...] = (engine, fixed, scratch)
        self._calls = {
            rows: _Call(
                library, engine, graph, rows, 0 if library.rtx else i, fixed, scratch, self._stream, room is None
            )
            for i, rows in enumerate(sorted(batches))
        }
        self._shapes = {name: tuple(value.shape[1:]) for name, value in next(iter(self._calls.values())).given.items()}

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        check_inputs(self.inputs, inputs)
        call = self._calls[check_shapes(self._shapes, tuple(self._calls), inputs)]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, value in inputs.items():
                call.given[name].copy_(value, non_blocking=True)
            call.launch()
            out = {name: value.clone() for name, value in call.made.items()}
        self._stream.synchronize()
        return out

    def close(self) -> None:
        self._calls.clear()
        self._kept = ()


class _Call:
    """Everything of one batch size: the context, its buffers `given` and `made`, and what launches it."""

    def __init__(
        self,
        library: Library,
        engine: Any,
        graph: Graph,
        rows: int,
        profile: int,
        fixed: Mapping[str, Tensor],
        scratch: Tensor,
        stream: torch.cuda.Stream,
        recorded: bool,
    ) -> None:
        self._stream = stream
        self._context = context = engine.create_execution_context(_settings(library, engine, recorded))
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        self.given = {name: value.to("cuda") for name, value in graph.example(rows).items()}
        self.made = {
            name: torch.empty((rows, *shape), dtype=torch.float32, device="cuda")
            for name, shape in graph.output_shapes.items()
        }
        for name, value in self.given.items():
            context.set_input_shape(name, tuple(value.shape))
        weights = {WEIGHT + name: value for name, value in fixed.items()}
        for name, value in {**self.given, **self.made, **weights}.items():
            if not context.set_tensor_address(name, value.data_ptr()):
                raise InternalError(f"TensorRT does not know {name!r}, which the graph has")
        if unknown := context.infer_shapes():
            raise InternalError(f"TensorRT lacks the shapes of {unknown}")
        self._graph: torch.cuda.CUDAGraph | None = None
        self.launch()
        stream.synchronize()
        if recorded and not library.rtx:
            self._capture()

    def launch(self) -> None:
        """Enqueues the network on the stream."""
        if self._graph is not None:
            self._graph.replay()
        elif not self._context.execute_async_v3(self._stream.cuda_stream):
            raise InternalError("TensorRT could not enqueue the network: see the log of the driver")

    def _capture(self) -> None:
        """Records one launch. Of this thread alone: another may be serving."""
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made, stream=self._stream, capture_error_mode="thread_local"):
            self.launch()
        self._graph = made


def limit(engine: Any, room: int) -> None:
    """At most `room` bytes of the weights stay on the GPU. To be called before there are contexts.

    Raises:
        BackendUnavailable: the library keeps more there.
    """
    wanted = min(room, engine.streamable_weights_size)
    engine.weight_streaming_budget_v2 = wanted
    if (held := engine.weight_streaming_budget_v2) != wanted:
        raise BackendUnavailable(
            f"TensorRT keeps {held} bytes of weights on the GPU, of which {wanted} were allowed: "
            "give it more by WORKER_RESIDENT_BYTES"
        )


def _settings(library: Library, engine: Any, recorded: bool) -> Any:
    """How contexts run. RTX captures CUDA graphs by itself, and makes the kernels of a shape before its first call.

    Calls whose weights are streamed are not recorded: what is copied differs from call to call.
    """
    api, settings = library.api, engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(api.ExecutionContextAllocationStrategy.USER_MANAGED)
    if library.rtx:
        whole, none = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, api.CudaGraphStrategy.DISABLED
        settings.cuda_graph_strategy = whole if recorded else none
        settings.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
    return settings


def refit(library: Library, engine: Any, weights: Mapping[str, Tensor], stream: torch.cuda.Stream) -> None:
    """Sets every weight of `engine`: never a difference, since nobody knows what the plan held before.

    `weights` are on the GPU, each in the type that the plan has.

    Raises:
        GraphMismatch: a weight that the plan cannot set, or one that it still lacks.
    """
    api, messages = library.api, library.messages()
    refitter = api.Refitter(engine, messages)
    if lost := sorted({WEIGHT + name for name in weights} - set(refitter.get_all_weights())):
        raise GraphMismatch(f"{len(lost)} weights cannot be set in the plan, first {lost[:3]}")
    kinds = {torch.float32: api.DataType.FLOAT, torch.bfloat16: api.DataType.BF16}
    for name, value in weights.items():
        given = api.Weights(kinds[value.dtype], value.data_ptr(), value.numel())
        if not refitter.set_named_weights(WEIGHT + name, given, api.TensorLocation.DEVICE):
            raise GraphMismatch(f"the plan refuses the weight {name}: {' '.join(messages.lines)[:300]}")
    if missing := refitter.get_missing_weights():
        raise GraphMismatch(f"{len(missing)} weights of the plan were never set, first {missing[:3]}")
    if not refitter.refit_cuda_engine_async(stream.cuda_stream):
        raise GraphMismatch(f"the plan could not be refitted: {' '.join(messages.lines)[:300]}")
    stream.synchronize()
