"""Turns students of a registry into loaded students: graphs compiled once, engines shared by what they hold.

Two students with the same encoder blob have one encoder engine. A graph is compiled, and an engine open, for as long as
somebody holds a version that needs it. What is heavy (`compile`, `fill`) needs no thread of its own here: the caller
chooses one; engines themselves are only run by whoever was given the student.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engines import memory, plugins, process
from engines.backends.base import SCALED, Choice, Engine, Padded, Precision, Profile, device_of, load_backend
from engines.cache import DiskCache
from engines.errors import GraphMismatch, InvalidRequest
from engines.families.base import PICTURES, SEEN
from engines.graph import ComponentGraph, GraphStore, spec
from engines.manifest import Component, StudentManifest, shown
from engines.parts import EngineKey, Parts, load_weights, reader
from engines.registry.base import Registry
from engines.streams import tuned
from engines.student import LoadedStudent

log = logging.getLogger(__name__)


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
        self._levels: dict[EngineKey, int] = {}  # bytes of weights on the device, of engines that stream the rest
        self._backend = load_backend(choice.backend)
        self._graphs = graphs
        self._compiled: dict[tuple[str, int], Any] = {}  # by graph and level
        self._engines: dict[EngineKey, Padded] = {}
        self._specialised: set[EngineKey] = set()
        self._held: dict[str, Parts] = {}  # by version
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
        """Whether this component of a held student needs no more than weights set, if that: streamed ones are built."""
        key = EngineKey(graph.key, manifest.components[role].weights)
        settable = self._profile(key, graph).weights == "set" and key not in self._levels
        return key in self._engines or (settable and (graph.key, 0) in self._compiled)

    def tune(self, graph: ComponentGraph) -> None:
        """Settles the profile by this denoiser, unless it is settled; takes a build or two, the first time."""
        with self._building:
            if self._tune:
                self.profile = tuned(self._backend, graph, self.profile)
                log.info("streams", extra={"streams": self.profile.streams, "threads_each": self.profile.threads})
            self._tune = False

    def compile(self, manifest: StudentManifest, role: str) -> None:
        """Compiles the graph of a held student's component; the heavy part, once per graph."""
        parts = self._held[manifest.version]
        self._compile(parts.keys[role], parts.graphs[role])

    def hold(self, manifest: StudentManifest) -> None:
        """What is compiled and loaded for this student, now or later, stays until `let_go`. Nothing is built by it."""
        parts = self._parts(manifest)  # reads the registry, for which nobody has to wait
        with self._lock:
            self._levels |= self._fit(parts)
            self._held.setdefault(manifest.version, parts)
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
            held = self._held_keys()
            for key in gone - held:
                self._specialised.discard(key)
                self._levels.pop(key, None)
                if engine := self._engines.pop(key, None):
                    engine.close()
            for build in list(self._compiled.keys() - {self._build(key) for key in held}):
                del self._compiled[build]
            for graph in {key.graph for key in gone} - {key.graph for key in held}:
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
        if any(SEEN in graph.inputs for graph in parts.graphs.values()):
            self.pictures(manifest)  # what is seen where nothing is given is encoded too
        with self._lock:  # what is replaced is so before this, or after it and then only having tried this student
            scaled = not self._specialised.isdisjoint(parts.keys.values())
            engines = self._own(parts)
        live = SCALED.get(self.choice.precision, self.choice.precision)
        return self._student(manifest, engines, self.choice.precision if scaled else live)

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
        with self._lock:
            levels = self._levels | self._fit(parts)
            sizes = {
                key: self._engine_bytes(key, parts.graphs[role], levels.get(key, 0), specialised)
                for role, key in parts.keys.items()
            }
            for graph in {key.graph for key in sizes} - {key.graph for key in self._held_keys()}:
                self._graphs.forget(graph)  # having looked at a student that nobody holds leaves nothing here
        return sizes

    def made_bytes(self, manifest: StudentManifest) -> dict[EngineKey, int]:
        """What the engines take by themselves that specialising a loaded student makes."""
        sizes, keys = self.weight_bytes(manifest, specialised=True), self._held[manifest.version].keys
        return {keys[role]: sizes[keys[role]] for role in self.unspecialised(manifest)}

    def loaded_bytes(self) -> int:
        """What the weights of all engines here take."""
        with self._lock:
            graphs = {key: parts.graphs[role] for parts in self._held.values() for role, key in parts.keys.items()}
            here = {key: graph for key, graph in graphs.items() if key in self._engines}
            return sum(self._engine_bytes(key, graph, self._levels.get(key, 0)) for key, graph in here.items())

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
        new = {role: key for role, key in parts.keys.items() if key not in self._specialised}
        return [role for role, key in new.items() if self._profile(key, parts.graphs[role]).weights == "set"]

    @property
    def scaled(self) -> bool:
        """Whether specialised engines compute in a precision that takes scales of the student's own."""
        return self.choice.precision in SCALED

    def specialised(self, manifest: StudentManifest, role: str, largest: Mapping[str, float] | None = None) -> Engine:
        """A component once more, its weights compiled in: the heavy part before `replace`. It is the caller's.

        `largest` is what `scaled` precisions take: see `engines.scales`.
        """
        parts = self._parts(manifest)
        graph = parts.graphs[role]
        compiled = self._backend.build(graph, self._profile(parts.keys[role], graph, specialised=True))
        if self.scaled:
            compiled = replace(compiled, largest=largest)
        return self._backend.load(compiled, graph.select(load_weights(self.registry, manifest.components[role])))

    def beside(self, manifest: StudentManifest, engines: Mapping[str, Engine]) -> list[LoadedStudent]:
        """All loaded students whose components `replace` would give these engines, with them instead of their own.

        To try them; they are not to be released.
        """
        with self._lock:
            made = {self._held[manifest.version].keys[role]: engine for role, engine in engines.items()}
            new = {key: Padded(engine, self._engines[key].batches) for key, engine in made.items()}
            using = [(parts.manifest, self._own(parts, new)) for parts in self._using(made.keys())]
        return [self._student(one, its, self.choice.precision) for one, its in using]

    def replace(self, manifest: StudentManifest, engines: Mapping[str, Engine], tried: AbstractSet[str]) -> bool:
        """From the next call on these answer for all who use their components; a call that runs holds the one before.

        Nothing is replaced, and False returned, where one of those is no version that was `tried`.
        """
        with self._lock:
            made = {self._held[manifest.version].keys[role]: engine for role, engine in engines.items()}
            if {parts.manifest.version for parts in self._using(made.keys())} - tried:
                return False
            for key, engine in made.items():
                self._engines[key].engine = engine
            self._specialised |= made.keys()
            return True

    def _own(self, parts: Parts, others: dict[EngineKey, Padded] | None = None) -> dict[str, Padded]:
        """A student's engines by component, but for these others."""
        engines = self._engines | (others or {})
        return {role: engines[key] for role, key in parts.keys.items()}

    def _using(self, keys: AbstractSet[EngineKey]) -> list[Parts]:
        """Of the students all of whose engines are here, those that have one of these."""
        here = [parts for parts in self._held.values() if self._engines.keys() >= set(parts.keys.values())]
        return [parts for parts in here if not keys.isdisjoint(parts.keys.values())]

    def _held_keys(self) -> set[EngineKey]:
        return {key for parts in self._held.values() for key in parts.all}

    def _engine_bytes(self, key: EngineKey, graph: ComponentGraph, level: int, specialised: bool = False) -> int:
        own = specialised or key in self._specialised
        return self._backend.weight_bytes(graph, replace(self._profile(key, graph, specialised=own), weight_room=level))

    def _profile(self, key: EngineKey, graph: ComponentGraph, *, specialised: bool = False) -> Profile:
        """In which an engine goes live, or is specialised if there is anything to it."""
        live = profile_of(self.profile, graph)
        if specialised and live.weights == "set":
            live = replace(live, precision=self.profile.precision, weights="constant")
        return replace(live, weight_room=self._levels.get(key, 0))

    def _build(self, key: EngineKey) -> tuple[str, int]:
        return key.graph, self._levels.get(key, 0)

    def _compile(self, key: EngineKey, graph: ComponentGraph) -> Any:
        with self._building:
            build = self._build(key)
            if build not in self._compiled:
                self._compiled[build] = self._backend.build(graph, self._profile(key, graph))
            return self._compiled[build]

    def _ensure(self, key: EngineKey, graph: ComponentGraph, component: Component) -> None:
        compiled = self._compile(key, graph)
        with self._building:
            if key not in self._engines:
                weights = graph.select(load_weights(self.registry, component))
                self._engines[key] = Padded(self._backend.load(compiled, weights), compiled.profile.batches)

    def _parts(self, manifest: StudentManifest) -> Parts:
        if held := self._held.get(manifest.version):
            return held
        read = reader(self.registry, manifest)
        graphs = {role: self._graphs.graph(spec(manifest, role, read)) for role in manifest.components}
        keys = {role: EngineKey(graphs[role].key, manifest.components[role].weights) for role in graphs}
        return Parts(manifest, graphs, keys)

    def _fit(self, parts: Parts) -> dict[EngineKey, int]:
        """How little a student's largest engines may keep on their device so that all fit, where the backend can.

        An engine that somebody holds stays as it is.
        """
        graphs = {key: parts.graphs[role] for role, key in parts.keys.items()}
        held = graphs.keys() & self._held_keys()
        if not self._room_bytes or held == graphs.keys():
            return {}
        sizes = {key: self._engine_bytes(key, graphs[key], 0) for key in graphs.keys() - held}
        taken = sum(self._engine_bytes(key, graphs[key], self._levels.get(key, 0)) for key in held)
        most = memory.level(sizes.values(), self._room_bytes - taken)
        if most is None or most <= 0:  # where nothing is left, `Residency` refuses it with its whole size
            return {}
        return {key: most for key, size in sizes.items() if self._engine_bytes(key, graphs[key], most) < size}

    def _student(self, manifest: StudentManifest, engines: Mapping[str, Engine], precision: Precision) -> LoadedStudent:
        make = plugins.load("engines.families", manifest.family, "FAMILY")
        family = make(
            engines["encoder"],
            {role: engine for role, engine in engines.items() if role not in ("encoder", "decoder")},
            engines["decoder"],
            tokenizer=make.tokenizer(reader(self.registry, manifest), sorted(manifest.components["encoder"].files)),
            inputs=manifest.inputs,
            pictures=partial(self.pictures, manifest),
            downscale=manifest.downscale,
        )
        made = process.make(manifest.process)
        return LoadedStudent(manifest, family, made, self.choice.backend, precision)


def profile_of(profile: Profile, graph: ComponentGraph) -> Profile:
    """Every student brings a denoiser; encoder and decoder are its teacher's, so theirs need not be replaceable.

    What takes scales of a student's own is for specialised engines.
    """
    precision = SCALED.get(profile.precision, profile.precision)
    live = replace(profile, batches=batches_of(profile, graph), precision=precision)
    return live if graph.spec.role == "denoiser" else replace(live, weights="constant")


def batches_of(profile: Profile, graph: ComponentGraph) -> tuple[int, ...]:
    """The batch sizes of a graph. Of videos, whose decoder holds all frames of a row at once, the smallest."""
    of_videos = graph.spec.role == "decoder" and len(graph.spec.latent) > 3
    return (min(profile.batches),) if of_videos else profile.batches


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
