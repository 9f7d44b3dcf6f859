"""Turns students of a registry into loaded students: graphs compiled once, engines shared by what they hold.

Two students with the same encoder blob have one encoder engine. A graph is compiled, and an engine open, for as long as
somebody holds a version that needs it. What is heavy (`compile`, `fill`) needs no thread of its own here: the caller
chooses one; engines themselves are only run by whoever was given the student.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from engines import memory, plugins, process
from engines.backends.base import SCALED, Choice, Engine, Padded, Precision, Profile, device_of, load_backend
from engines.cache import DiskCache
from engines.errors import CorruptBlob, GraphMismatch, InvalidRequest
from engines.families.base import PICTURES
from engines.graph import ComponentGraph, GraphStore, spec
from engines.manifest import Component, StudentManifest, shown
from engines.registry.base import Registry
from engines.streams import tuned
from engines.student import LoadedStudent

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineKey:
    graph: str
    weights: str


@dataclass(frozen=True, slots=True)
class _Parts:
    """By component: its graph, and which engine holds its weights, whether or not that is there yet.

    `pictures` is the engine that makes latents of pictures, once somebody wants one.
    """

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


class Loader:
    """Loads students for one backend, precision and profile."""

    def __init__(
        self,
        registry: Registry,
        choice: Choice,
        profile: Profile,
        graphs: GraphStore,
        *,
        tune: bool = False,
        room_bytes: int = 0,
    ) -> None:
        """With `tune` the first denoiser that is loaded decides into how many streams the profile's threads are cut.

        `room_bytes`: of the weights of a student; the largest engines of one that takes more are told to keep less on
        their device. 0: there is room for any.
        """
        self.registry, self.choice, self.profile = registry, choice, profile
        self._tune, self._room_bytes = tune, room_bytes
        self._levels: dict[str, int] = {}  # by graph: bytes of the weights that may be on the device
        self._backend = load_backend(choice.backend)
        self._graphs = graphs
        self._compiled: dict[str, Any] = {}
        self._engines: dict[EngineKey, Padded] = {}
        self._specialised: set[EngineKey] = set()
        self._held: dict[str, _Parts] = {}  # by version
        self._holders: Counter[str] = Counter()
        self._lock = threading.Lock()  # of who holds what
        self._building = threading.Lock()  # one graph and one engine at a time, whoever asks

    @property
    def settled(self) -> bool:
        """Whether the profile stays as it is."""
        return not self._tune

    @property
    def most_streams(self) -> int:
        """What the streams of the profile are, or may become when it is settled."""
        return self.profile.threads if self._tune else self.profile.streams

    def check(self, manifest: StudentManifest) -> None:
        """Reads every blob of a student against its hash.

        Raises:
            CorruptBlob, NotFound: one is not what it should be.
        """
        for sha in sorted(manifest.blobs):
            self.registry.read_blob(sha)

    def graphs(self, manifest: StudentManifest) -> Mapping[str, ComponentGraph]:
        return self._parts(manifest).graphs

    def is_known(self, manifest: StudentManifest, role: str, graph: ComponentGraph) -> bool:
        """Whether this component needs no more than weights set, if that."""
        key = EngineKey(graph.key, manifest.components[role].weights)
        return key in self._engines or (graph.key in self._compiled and self._profile(graph).weights == "set")

    def tune(self, graph: ComponentGraph) -> None:
        """Settles the profile by this denoiser, unless it is settled; takes a build or two, the first time."""
        with self._building:
            if self._tune:
                self.profile = tuned(self._backend, graph, self.profile)
                log.info("streams", extra={"streams": self.profile.streams, "threads_each": self.profile.threads})
            self._tune = False

    def compile(self, graph: ComponentGraph) -> Any:
        """The graph, compiled; the heavy part, once per graph."""
        with self._building:
            compiled = self._compiled.get(graph.key)
            if compiled is None:
                compiled = self._compiled[graph.key] = self._backend.build(graph, self._profile(graph))
            return compiled

    def hold(self, manifest: StudentManifest) -> None:
        """What is compiled and loaded for this student, now or later, stays until `let_go`. Nothing is built by it."""
        with self._lock:
            self._held[manifest.version] = self._parts(manifest)
            self._holders[manifest.version] += 1

    def let_go(self, manifest: StudentManifest) -> frozenset[str]:
        """Ends one `hold`. Closes and forgets what nobody holds any more; returns the blobs that are gone with it."""
        version = manifest.version
        with self._lock:
            self._holders[version] -= 1
            if self._holders[version] > 0:
                return frozenset()
            del self._holders[version]
            gone = self._held.pop(version).all
            held = {key for parts in self._held.values() for key in parts.all}
            for key in gone - held:
                self._specialised.discard(key)
                if engine := self._engines.pop(key, None):
                    engine.close()
            for graph in {key.graph for key in gone} - {key.graph for key in held}:
                self._compiled.pop(graph, None)
                self._levels.pop(graph, None)
                self._graphs.forget(graph)
            return frozenset({key.weights for key in gone} - {key.weights for key in held})

    def fill(self, manifest: StudentManifest) -> LoadedStudent:
        """A student that is held, with engines of its own or shared.

        Raises:
            GraphMismatch: weights that do not belong to their graph.
        """
        parts = self._held[manifest.version]
        for role, key in parts.keys.items():
            self._ensure(key, parts.graphs[role], manifest.components[role])
        return self._student(manifest, {role: self._engines[key] for role, key in parts.keys.items()})

    def load(self, manifest: StudentManifest) -> LoadedStudent:
        """Holds and fills a student; give it back with `release`. Raises as `fill` does."""
        self.hold(manifest)
        try:
            return self.fill(manifest)
        except BaseException:
            self.let_go(manifest)
            raise

    def release(self, student: LoadedStudent) -> None:
        """Lets go of a student that was loaded."""
        self.let_go(student.manifest)

    def pictures(self, manifest: StudentManifest) -> Padded:
        """The engine that makes latents of pictures, of a student that is loaded.

        Most students never edit: it is compiled when it is first asked for, which is heavy, and goes with the student.

        Raises:
            InvalidRequest: the VAE's weights lack the half that encodes.
        """
        parts = self._held.get(manifest.version)
        if parts and parts.pictures and (engine := self._engines.get(parts.pictures)):
            return engine
        component = manifest.components["decoder"]
        graph = self._graphs.graph(spec(manifest, PICTURES, reader(self.registry, manifest)))
        key = EngineKey(graph.key, component.weights)
        self.hold(manifest)  # nothing of it is let go of meanwhile
        with self._lock:
            self._held[manifest.version] = replace(self._held[manifest.version], pictures=key)
        try:
            self._ensure(key, graph, component)
            return self._engines[key]
        except GraphMismatch as error:
            raise InvalidRequest(
                f"{shown(manifest.version)} cannot edit pictures, its VAE has weights for decoding only: ask a "
                f"deployment whose student was imported with the whole VAE ({error.message})",
                param="image",
            ) from error
        finally:
            self.let_go(manifest)

    def engine(self, manifest: StudentManifest, role: str) -> Padded:
        """The engine of one component of a student that is loaded."""
        return self._engines[self._held[manifest.version].keys[role]]

    def weight_bytes(self, manifest: StudentManifest, *, specialised: bool = False) -> dict[EngineKey, int]:
        """What the weights of each engine of a student take in memory, loaded or not, or once it is specialised.

        Constants are held once per stream: a profile that is not settled is settled first, which takes a build or two.
        """
        parts = self._parts(manifest)
        if not self.settled and "denoiser" in parts.graphs:
            self.tune(parts.graphs["denoiser"])
        sizes = {key: self._engine_bytes(key, parts.graphs[role], specialised) for role, key in parts.keys.items()}
        with self._lock:  # having looked at a student that nobody holds leaves nothing here
            held = {key.graph for each in self._held.values() for key in each.keys.values()}
            for graph in {key.graph for key in sizes} - held:
                self._graphs.forget(graph)
        return sizes

    def loaded_bytes(self) -> int:
        """What the weights of all engines here take."""
        with self._lock:
            graphs = {key: parts.graphs[role] for parts in self._held.values() for role, key in parts.keys.items()}
        return sum(self._engine_bytes(key, graph) for key, graph in graphs.items() if key in self._engines)

    def blobs(self, graph: ComponentGraph) -> frozenset[str]:
        """The weights that students have for this graph who are held."""
        with self._lock:
            keys = {key for parts in self._held.values() for key in parts.keys.values()}
        return frozenset(key.weights for key in keys if key.graph == graph.key)

    def unspecialised(self, manifest: StudentManifest) -> list[str]:
        """The components of a loaded student whose weights are set, though calls would be cheaper with constants."""
        if not self._backend.constants_pay and not self.scaled:
            return []
        parts = self._held[manifest.version]
        new = [role for role, key in parts.keys.items() if key not in self._specialised]
        return [role for role in new if self._profile(parts.graphs[role]).weights == "set"]

    @property
    def scaled(self) -> bool:
        """Whether specialised engines compute in a precision that takes scales of the student's own."""
        return self.choice.precision in SCALED

    def specialised(self, manifest: StudentManifest, role: str, largest: Mapping[str, float] | None = None) -> Engine:
        """A component once more, its weights compiled in: the heavy part before `replace`. It is the caller's.

        `largest` is what `scaled` precisions take: see `engines.scales`.
        """
        graph = self.graphs(manifest)[role]
        compiled = self._backend.build(graph, self._specialised_profile(graph))
        if self.scaled:
            compiled = replace(compiled, largest=largest)
        return self._backend.load(compiled, graph.select(load_weights(self.registry, manifest.components[role])))

    def beside(self, manifest: StudentManifest, engines: Mapping[str, Engine]) -> LoadedStudent:
        """A loaded student with these engines instead of its own ones, to try them; it is not to be released."""
        own = {role: self._engines[key] for role, key in self._held[manifest.version].keys.items()}
        engines = own | {role: Padded(one, self.profile.batches) for role, one in engines.items()}
        return self._student(manifest, engines, self.choice.precision)

    def replace(self, manifest: StudentManifest, role: str, engine: Engine) -> None:
        """From the next call on `engine` answers for all who use this component.

        A call of the one before that still runs holds it until it ends.
        """
        key = self._held[manifest.version].keys[role]
        self._engines[key].engine = engine
        self._specialised.add(key)

    def _engine_bytes(self, key: EngineKey, graph: ComponentGraph, specialised: bool = False) -> int:
        profile = self._profile(graph)
        if profile.weights == "set" and (specialised or key in self._specialised):
            profile = self._specialised_profile(graph)
        return self._backend.weight_bytes(graph, profile)

    def _profile(self, graph: ComponentGraph) -> Profile:
        """In which a graph goes live."""
        return replace(profile_of(self.profile, graph), weight_room=self._levels.get(graph.key, 0))

    def _specialised_profile(self, graph: ComponentGraph) -> Profile:
        return replace(self.profile, weights="constant", weight_room=self._levels.get(graph.key, 0))

    def _ensure(self, key: EngineKey, graph: ComponentGraph, component: Component) -> None:
        compiled = self.compile(graph)
        with self._building:
            if key not in self._engines:
                weights = graph.select(load_weights(self.registry, component))
                self._engines[key] = Padded(self._backend.load(compiled, weights), self.profile.batches)

    def _parts(self, manifest: StudentManifest) -> _Parts:
        if held := self._held.get(manifest.version):
            return held
        read = reader(self.registry, manifest)
        graphs = {role: self._graphs.graph(spec(manifest, role, read)) for role in manifest.components}
        if self._room_bytes:
            self._fit(graphs.values())
        return _Parts(graphs, {role: EngineKey(graphs[role].key, manifest.components[role].weights) for role in graphs})

    def _fit(self, graphs: Iterable[ComponentGraph]) -> None:
        """Says to the largest of a student's engines how little they may keep on their device, if not all fit."""
        sizes = {graph.key: self._backend.weight_bytes(graph, profile_of(self.profile, graph)) for graph in graphs}
        most = memory.level(sizes.values(), self._room_bytes)
        if most is not None:
            self._levels |= {key: most for key, size in sizes.items() if size > most}

    def _student(
        self, manifest: StudentManifest, engines: Mapping[str, Engine], precision: Precision | None = None
    ) -> LoadedStudent:
        make = plugins.load("engines.families", manifest.family, "FAMILY")
        family = make(
            engines["encoder"],
            {role: engine for role, engine in engines.items() if role not in ("encoder", "decoder")},
            engines["decoder"],
            tokenizer=make.tokenizer(reader(self.registry, manifest), sorted(manifest.components["encoder"].files)),
            inputs=manifest.inputs,
            pictures=partial(self.pictures, manifest),
        )
        made = process.make(manifest.process)
        live = SCALED.get(self.choice.precision, self.choice.precision)
        return LoadedStudent(manifest, family, made, self.choice.backend, precision or live)


def profile_of(profile: Profile, graph: ComponentGraph) -> Profile:
    """Every student brings a denoiser; encoder and decoder are its teacher's, so theirs need not be replaceable.

    What takes scales of a student's own is for specialised engines.
    """
    live = replace(profile, precision=SCALED.get(profile.precision, profile.precision))
    return live if graph.spec.role == "denoiser" else replace(live, weights="constant")


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
    return Loader(registry, choice, profile or Profile(device=device_of(choice.backend)), graphs).load(manifest)
