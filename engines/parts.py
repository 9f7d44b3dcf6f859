"""What a student consists of: its components' graphs and blobs, and which engines those make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from engines.errors import CorruptBlob
from engines.graph import ComponentGraph
from engines.manifest import Component, StudentManifest
from engines.registry.base import Registry


@dataclass(frozen=True, slots=True)
class EngineKey:
    graph: str
    weights: str


@dataclass(frozen=True, slots=True)
class Parts:
    """A student's, by component: its graph, and which engine holds its weights, whether or not that is there yet.

    `pictures` is the engine that makes latents of pictures, once somebody wants one.
    """

    manifest: StudentManifest
    graphs: Mapping[str, ComponentGraph]
    keys: Mapping[str, EngineKey]
    pictures: EngineKey | None = None

    @property
    def all(self) -> frozenset[EngineKey]:
        return frozenset(self.keys.values()) | ({self.pictures} if self.pictures else frozenset())


def load_weights(registry: Registry, component: Component) -> dict[str, Tensor]:
    """All tensors of a component's blob, as they are stored.

    Raises:
        CorruptBlob: the bytes are not those of their name, or no safetensors.
    """
    try:
        tensors: dict[str, Tensor] = load_safetensors(registry.read_blob(component.weights))
    except SafetensorError as error:
        raise CorruptBlob(f"blob {component.weights[:12]} is no safetensors file: {error}") from error
    return tensors


def reader(registry: Registry, manifest: StudentManifest) -> Callable[[str], bytes]:
    """Reads `<component>/<file>` of a student."""

    def read(name: str) -> bytes:
        role, _, file = name.partition("/")
        return registry.read_blob(manifest.components[role].files[file])

    return read
