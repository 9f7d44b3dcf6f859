"""How large what a network multiplies with its weights gets: what a precision with few exponents is scaled by.

The samples are the golden ones of the student, drawn again by `eager`, which has to reproduce them too.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.base import Choice, Profile, load_backend
from engines.errors import GoldenMismatch
from engines.golden import Golden, verification
from engines.graph import LAYERS, ComponentGraph, GraphStore
from engines.loader import Loader
from engines.manifest import StudentManifest, shown
from engines.registry.base import Registry


def largest(registry: Registry, manifest: StudentManifest, role: str, device: str) -> dict[str, float]:
    """Weight name -> largest magnitude of what a layer of a component multiplies with it, of the layers that are run.

    Takes the student in fp32 once more on `device`, until it returns.

    Raises:
        GoldenMismatch: the student has no golden samples, or `eager` does not reproduce them.
    """
    if manifest.golden is None:
        raise GoldenMismatch(f"{shown(manifest.version)} has no golden samples to measure scales with")
    golden = Golden.from_bytes(registry.read_blob(manifest.golden))
    loader = Loader(registry, Choice("eager", "fp32"), Profile(device=device), GraphStore(None))
    student = loader.load(manifest)
    try:
        engine: Any = loader.engine(manifest, role).engine
        with ExitStack() as watching:
            found = watched(engine.module, loader.graphs(manifest)[role].graph_names, watching.enter_context)
            for call in verification(student, golden):
                call()
        return {name: float(value) for name, value in found.items()}
    finally:
        loader.release(student)
        torch.cuda.empty_cache()  # torch keeps what it has freed, and no other library can have it


def student_bytes(graphs: Mapping[str, ComponentGraph]) -> int:
    """What `largest` takes on its device."""
    eager, profile = load_backend("eager"), Profile()
    return sum(eager.weight_bytes(graph, profile) for graph in graphs.values())


def watched(
    module: nn.Module, graph_names: Mapping[str, str], keep: Callable[[AbstractContextManager[Any]], object]
) -> dict[str, Tensor]:
    """Is filled as `module` is called. `keep` is given what ends that, `graph_names` are its parameters by weight."""
    found: dict[str, Tensor] = {}
    names = {inner: name for name, inner in graph_names.items()}
    for path, layer in module.named_modules():
        name = names.get(f"{path}.weight")
        if name is not None and isinstance(layer, LAYERS):
            keep(layer.register_forward_pre_hook(partial(_look, found, name)))
    return found


def _look(found: dict[str, Tensor], name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
    size = given[0].detach().abs().amax()
    found[name] = torch.maximum(found[name], size) if name in found else size
