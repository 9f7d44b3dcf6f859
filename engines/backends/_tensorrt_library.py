"""Which TensorRT is installed: the datacenter library (10 or 11) or TensorRT-RTX. One API under several module names.

What differs, and how it is met here:
    timing cache        datacenter only; RTX does not use one, and asking for it needs a GPU
    targets             RTX alone builds for named GPUs without having one; the other builds for the GPU here
    profiles            RTX makes kernels for the very shape at run time, so one profile spans all batch sizes; the
                        other tunes for a profile's optimum, so it gets one for each batch size
    CUDA graphs         RTX captures by itself when asked to; around the other we capture
    removed in 11       see `REMOVED`: nothing of it is used
"""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

from engines.errors import BackendUnavailable

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
REMOVED = {
    "BuilderFlag": (
        "FP16",
        "BF16",
        "INT8",
        "FP8",
        "INT4",
        "OBEY_PRECISION_CONSTRAINTS",
        "PREFER_PRECISION_CONSTRAINTS",
    ),
    "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",),
    "Builder": ("platform_has_fast_fp16", "platform_has_fast_int8"),
    "ICudaEngine": ("device_memory_size", "create_execution_context_without_device_memory"),
    "OnnxParser": ("supports_model",),
}  # fmt: skip
"""Of the API of 10, by class."""
_HELP = "install `tensorrt`, or `fewstep[tensorrt]` for TensorRT-RTX, on Linux x86-64, or choose another backend"


@dataclass(frozen=True, slots=True)
class Library:
    """`api` is the module. `name` is tensorrt or tensorrt_rtx, whatever the module is called."""

    api: Any
    name: str
    version: str

    @property
    def rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    def messages(self) -> Any:
        """A logger for the library that keeps its errors: `lines`."""
        api = self.api

        class Messages(api.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= api.ILogger.Severity.ERROR:
                    self.lines.append(message)

        return Messages()


def installed() -> bool:
    return any(importlib.util.find_spec(name) for name in MODULES)


@cache
def find() -> Library:
    """The library that is installed, the datacenter one first.

    Raises:
        BackendUnavailable: none is, or it cannot be loaded.
    """
    reasons = []
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            api = importlib.import_module(name)
        except (ImportError, OSError) as error:  # a shared library or a driver that is not there
            reasons.append(f"{name}: {error}")
            continue
        return Library(api, "tensorrt_rtx" if "rtx" in name else "tensorrt", api.__version__)
    found = f"it cannot be loaded ({'; '.join(reasons)})" if reasons else "it is not installed here"
    raise BackendUnavailable(f"TensorRT: {found}; {_HELP}")


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU of this process."""

    name: str
    capability: str  # such as SM89
    cuda: str  # the version that torch was built with


def gpu() -> Gpu | None:
    """None where there is none, or torch cannot use it."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"SM{major}{minor}", str(torch.version.cuda))


def need_gpu(what: str) -> Gpu:
    """
    Raises:
        BackendUnavailable: there is none here.
    """
    found = gpu()
    if found is None:
        raise BackendUnavailable(
            f"TensorRT: {what} needs an NVIDIA GPU and a build of torch with CUDA, and this process has none; "
            "plans can be built here, but not run"
        )
    return found
