"""Turns students of a registry into loaded students: graphs compiled once, engines shared by what they hold.

Two students with the same encoder blob have one encoder engine. What is heavy (`compile`, `load`) needs no thread of
its own here: the caller chooses one; engines themselves are only run by whoever was given the student.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from engines import plugins, process
from engines.backends.base import Choice, Engine, Padded, Profile, automatic_device, load_backend
from engines.cache import DiskCache
from engines.errors import CorruptBlob
from engines.graph import ComponentGraph, GraphStore, spec
from engines.manifest import Component, StudentManifest, shown
from engines.registry.base import Registry
from engines.student import LoadedStudent


@dataclass(frozen=True, slots=True)
class EngineKey:
    graph: str
    weights: str


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


class Loader:
    """Loads students for one backend, precision and profile."""

    def __init__(self, registry: Registry, choice: Choice, profile: Profile, graphs: GraphStore) -> None:
        self.registry, self.choice, self.profile = registry, choice, profile
        self._backend = load_backend(choice.backend)
        self._graphs = graphs
        self._compiled: dict[str, Any] = {}
        self._engines: dict[EngineKey, Padded] = {}
        self._specialised: set[EngineKey] = set()
        self._users: Counter[EngineKey] = Counter()
        self._lock = threading.Lock()  # of the counts
        self._building = threading.Lock()  # one graph and one engine at a time, whoever asks

    def check(self, manifest: StudentManifest) -> None:
        """Reads every blob of a student against its hash.

        Raises:
            CorruptBlob, NotFound: one is not what it should be.
        """
        for sha in sorted(manifest.blobs):
            self.registry.read_blob(sha)

    def graphs(self, manifest: StudentManifest) -> dict[str, ComponentGraph]:
        read = reader(self.registry, manifest)
        return {role: self._graphs.graph(spec(manifest, role, read)) for role in manifest.components}

    def is_known(self, manifest: StudentManifest, role: str, graph: ComponentGraph) -> bool:
        """Whether this component needs no more than weights set, if that."""
        key = EngineKey(graph.key, manifest.components[role].weights)
        return key in self._engines or (
            graph.key in self._compiled and profile_of(self.profile, graph).weights == "set"
        )

    def compile(self, graph: ComponentGraph) -> Any:
        """The graph, compiled; the heavy part, once per graph."""
        with self._building:
            compiled = self._compiled.get(graph.key)
            if compiled is None:
                compiled = self._compiled[graph.key] = self._backend.build(graph, profile_of(self.profile, graph))
            return compiled

    def load(self, manifest: StudentManifest) -> LoadedStudent:
        """A student with engines of its own or shared; give it back with `release`.

        Raises:
            GraphMismatch: weights that do not belong to their graph.
        """
        graphs = self.graphs(manifest)
        keys = self._keys(manifest, graphs)
        with self._lock:
            self._users.update(keys.values())
        try:
            for role, key in keys.items():
                self._ensure(key, graphs[role], manifest.components[role])
            return self._student(manifest, {role: self._engines[key] for role, key in keys.items()})
        except BaseException:
            self._let_go(keys.values())
            raise

    def engine(self, manifest: StudentManifest, role: str) -> Padded:
        """The engine of one component of a student that is loaded."""
        return self._engines[self._keys(manifest, self.graphs(manifest))[role]]

    def unspecialised(self, manifest: StudentManifest) -> list[str]:
        """The components of a loaded student whose weights are set, though calls would be cheaper with constants."""
        if not self._backend.constants_pay:
            return []
        graphs = self.graphs(manifest)
        new = [role for role, key in self._keys(manifest, graphs).items() if key not in self._specialised]
        return [role for role in new if profile_of(self.profile, graphs[role]).weights == "set"]

    def specialised(self, manifest: StudentManifest, role: str) -> Engine:
        """A component once more, its weights compiled in: the heavy part before `replace`. It is the caller's."""
        graph = self.graphs(manifest)[role]
        compiled = self._backend.build(graph, replace(self.profile, weights="constant"))
        return self._backend.load(compiled, graph.select(load_weights(self.registry, manifest.components[role])))

    def beside(self, manifest: StudentManifest, engines: Mapping[str, Engine]) -> LoadedStudent:
        """A loaded student with these engines instead of its own ones, to try them; it is not to be released."""
        own = {role: self._engines[key] for role, key in self._keys(manifest, self.graphs(manifest)).items()}
        return self._student(manifest, own | {role: Padded(one, self.profile.batches) for role, one in engines.items()})

    def replace(self, manifest: StudentManifest, role: str, engine: Engine) -> None:
        """From the next call on `engine` answers for all who use this component. Call it in the engine's thread."""
        key = self._keys(manifest, self.graphs(manifest))[role]
        padded = self._engines[key]
        before, padded.engine = padded.engine, engine
        self._specialised.add(key)
        before.close()

    def _ensure(self, key: EngineKey, graph: ComponentGraph, component: Component) -> None:
        compiled = self.compile(graph)
        with self._building:
            if key not in self._engines:
                weights = graph.select(load_weights(self.registry, component))
                self._engines[key] = Padded(self._backend.load(compiled, weights), self.profile.batches)

    def release(self, student: LoadedStudent) -> None:
        """Closes the engines that no other loaded student uses."""
        self._let_go(self._keys(student.manifest, self.graphs(student.manifest)).values())

    def forget(self, graphs: Iterable[ComponentGraph]) -> None:
        """Lets go of what was compiled of graphs that no loaded student uses, and so of its cache entries."""
        with self._lock:
            used = {key.graph for key in self._users}
            for key in {graph.key for graph in graphs} - used:
                self._compiled.pop(key, None)

    def _let_go(self, keys: Iterable[EngineKey]) -> None:
        given = list(keys)
        with self._lock:
            self._users.subtract(given)
            for key in {key for key in given if self._users[key] <= 0}:
                del self._users[key]
                self._specialised.discard(key)
                if engine := self._engines.pop(key, None):
                    engine.close()

    def _keys(self, manifest: StudentManifest, graphs: Mapping[str, ComponentGraph]) -> dict[str, EngineKey]:
        return {role: EngineKey(graphs[role].key, part.weights) for role, part in manifest.components.items()}

    def _student(self, manifest: StudentManifest, engines: Mapping[str, Engine]) -> LoadedStudent:
        make = plugins.load("engines.families", manifest.family, "FAMILY")
        family = make(
            engines["encoder"],
            {role: engine for role, engine in engines.items() if role not in ("encoder", "decoder")},
            engines["decoder"],
            tokenizer=make.tokenizer(reader(self.registry, manifest), sorted(manifest.components["encoder"].files)),
            inputs=manifest.inputs,
        )
        made = process.make(manifest.process)
        return LoadedStudent(manifest, family, made, self.choice.backend, self.choice.precision)


def profile_of(profile: Profile, graph: ComponentGraph) -> Profile:
    """Every student brings a denoiser; encoder and decoder are its teacher's, so theirs need not be replaceable."""
    return profile if graph.spec.role == "denoiser" else replace(profile, weights="constant")


def load_student(
    registry: Registry,
    manifest: StudentManifest,
    *,
    choice: Choice = Choice("eager", "fp32"),  # noqa: B008 - frozen
    profile: Profile | None = None,
    cache: Path | None = None,
) -> LoadedStudent:
    """One student by itself, for golden samples, a gate or a test, by itself on the GPU where there is one.

    `cache` is needed by backends that export.
    """
    if cache is None and choice.backend != "eager":
        raise ValueError(f"loading {shown(manifest.version)} on {choice.backend} needs a cache folder")
    graphs = GraphStore(DiskCache(cache) if cache else None)
    return Loader(registry, choice, profile or Profile(device=automatic_device()), graphs).load(manifest)
