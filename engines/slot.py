"""The engines of one deployment on one worker: staged beside those that serve, verified, then switched.

`stage` takes students through staged → building → warming → verifying as a series of pieces. Whatever is heavy and
touches no engine runs aside; every engine call is one small piece for the engine's own thread, which puts live steps
first. Nothing that serves is touched before `switch`, one assignment; what served stays warm until it is retired. A
version goes live with its weights set, which takes milliseconds; `specialise` then compiles them in, where that makes
its calls cheaper.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from engines import scales
from engines.backends.base import Engine, is_gpu
from engines.cost import CostKey, CostModel
from engines.errors import Conflict, FewstepError, GoldenMismatch, StudentNotFound
from engines.golden import Golden, verification
from engines.graph import ComponentGraph
from engines.loader import Loader, batches_of
from engines.manifest import StudentManifest, shown
from engines.parts import EngineKey
from engines.streams import ALONE_ROWS, alone
from engines.student import LoadedStudent

Phase = Literal["staged", "building", "warming", "verifying", "specialising", "ready", "rejected"]
STAGES = {"encoder": "encode", "decoder": "decode"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing to do for a staging. `on_engine`: in the engine's thread, else anywhere (`engines.aside`)."""

    phase: Phase
    call: Callable[[], object]
    on_engine: bool


@dataclass(slots=True)
class Staging:
    """Students on their way to ready. Iterate over its pieces and do each before asking for the next.

    An error of a piece or of the iteration is the rejection: hand it to `reject`, which lets go of what was loaded.
    """

    versions: tuple[str, ...]
    pieces: Iterator[Piece] = field(repr=False)
    undo: Callable[[], None] = field(repr=False)
    phase: Phase = "staged"
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _since_s: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.phase in ("ready", "rejected")

    def __iter__(self) -> Iterator[Piece]:
        for piece in self.pieces:
            self._enter(piece.phase)
            yield piece
        self._enter("ready")

    def run(self) -> "Staging":
        """All pieces in this thread: for a worker that starts, a gate or a test. Raises what would reject."""
        try:
            for piece in self:
                piece.call()
        except Exception as error:
            self.reject(error)
            raise
        return self

    def reject(self, error: BaseException) -> None:
        if not self.over:
            self._enter("rejected")
            code = error.code if isinstance(error, FewstepError) else type(error).__name__
            self.reason = f"{code}: {error}"
            self.undo()

    def _enter(self, phase: Phase) -> None:
        now_s = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now_s - self._since_s
        self.phase, self._since_s = phase, now_s


class EngineSlot:
    """Loaded students by version. `serving` is what the deployment serves now."""

    def __init__(self, loader: Loader, cost: CostModel | None = None) -> None:
        self.loader = loader
        self.cost = cost or CostModel()
        self.serving: frozenset[str] = frozenset()
        self.draining: frozenset[str] = frozenset()
        self._loaded: dict[str, LoadedStudent] = {}

    @property
    def versions(self) -> frozenset[str]:
        """All that is loaded and verified."""
        return frozenset(self._loaded)

    def family(self, version: str) -> LoadedStudent:
        """The student that answers for `version` here, whether serving or draining.

        Raises:
            StudentNotFound: it is not loaded.
        """
        if version not in self._loaded:
            raise StudentNotFound(f"{shown(version)} is not loaded on this worker: it holds {sorted(self._loaded)}")
        return self._loaded[version]

    def stage(self, versions: Iterable[str]) -> Staging:
        """Students that are to be served; those that are loaded already have nothing left to do."""
        new = [version for version in dict.fromkeys(versions) if version not in self._loaded]
        held: list[StudentManifest] = []

        def undo() -> None:
            while held:
                self._let_go(held.pop())

        return Staging(tuple(new), self._pieces(new, held), undo)

    def switch(self, versions: Iterable[str]) -> None:
        """From now on these are served; what was, drains.

        Raises:
            StudentNotFound: one of them is not ready.
        """
        wanted = frozenset(versions)
        for version in wanted:
            self.family(version)
        self.draining = (self.draining | self.serving) - wanted
        self.serving = wanted

    def specialise(self, version: str, measure_on: str | None = None) -> Staging:
        """Compiles the weights of a loaded version in and switches its engines, if they reproduce the golden samples.

        So do all that share them. It serves as it is meanwhile, and where this is rejected it goes on so. `measure_on`:
        the device for scales, where any are needed; the engines' own if none is named.
        """
        made: dict[str, Engine] = {}

        def undo() -> None:
            for engine in made.values():
                engine.close()

        device = measure_on or self.loader.profile.device
        return Staging((version,), self._specialising(self.family(version), device, made), undo)

    def drain(self, version: str) -> None:
        """Takes one version out of what is served; it still answers what it is pinned to."""
        self.family(version)
        self.serving, self.draining = self.serving - {version}, self.draining | {version}

    def retire(self, version: str) -> frozenset[str]:
        """Closes the engines that only this version uses; returns the blobs that no engine holds now.

        Call it when no call of its engines runs, nor can begin.

        Raises:
            Conflict: it is being served.
        """
        if version in self.serving:
            raise Conflict(f"{shown(version)} is being served: switch to another first")
        student = self._loaded.pop(version, None)
        self.draining -= {version}
        return frozenset() if student is None else self._let_go(student.manifest)

    def evict(self, version: str) -> Callable[[], frozenset[str]]:
        """Takes a version out at once, served or not: it is staged again when somebody asks for it.

        What is returned closes its engines and tells the blobs that no engine holds then. Where that may be called is
        as `retire` says.
        """
        student = self._loaded.pop(version, None)
        self.serving, self.draining = self.serving - {version}, self.draining - {version}
        return frozenset if student is None else partial(self._let_go, student.manifest)

    def weight_bytes(self, version: str, *, specialised: bool = False) -> dict[EngineKey, int]:
        """Memory of the weights of each engine that a version needs. Reads its manifest and configs.

        Raises:
            StudentNotFound, CorruptBlob, NotFound: it cannot be read.
        """
        return self.loader.weight_bytes(self._manifest(version), specialised=specialised)

    def specialising_bytes(self, version: str) -> dict[str, dict[Any, int]]:
        """What `specialise` takes beside a loaded version until it has ended: by the device for scales, fastest first.

        By itself each of what it makes, since what it replaces is there as well, and then the student in fp32.
        """
        manifest, device = self.family(version).manifest, self.loader.profile.device
        made: dict[Any, int] = {**self.loader.made_bytes(manifest)}
        if not self.loader.scaled or not made:
            return {device: made}
        measured = made | {"measured": scales.student_bytes(self.loader.graphs(manifest))}
        return {device: measured, "cpu": made} if is_gpu(device) else {device: measured}

    def cost_key(self, student: LoadedStudent, role: str) -> CostKey:
        blob = student.manifest.components[role].weights
        return CostKey(STAGES.get(role, "denoise"), blob, () if role == "encoder" else student.latent_shape)

    def _pieces(self, versions: list[str], held: list[StudentManifest]) -> Iterator[Piece]:
        """`held` is what has to be let go of, should this end early."""
        fresh: dict[str, LoadedStudent] = {}
        yield Piece("staged", partial(self._hold, versions, held), False)
        new = [(m, role, graph) for m in held for role, graph in self._new(m)]
        for _, _, graph in [each for each in new if each[1] == "denoiser" and not self.loader.settled][:1]:
            yield Piece("building", partial(self.loader.tune, graph), False)
        for manifest, role in {graph.key: (manifest, role) for manifest, role, graph in new}.values():
            yield Piece("building", partial(self.loader.compile, manifest, role), False)
        for manifest in held:
            yield Piece("building", partial(self._fill, manifest, fresh), False)
        for manifest, role, graph in {self.cost_key(fresh[each[0].version], each[1]): each for each in new}.values():
            yield from self._warming(fresh[manifest.version], role, graph)
        for student in fresh.values():
            self._inherit_costs(student)
        for student in list(fresh.values()):
            yield from self._verifying(student)
        while held:
            manifest = held.pop()
            student = fresh[manifest.version]
            if self._loaded.setdefault(manifest.version, student) is not student:  # another staging came first
                self._let_go(manifest)

    def _specialising(self, student: LoadedStudent, device: str, made: dict[str, Engine]) -> Iterator[Piece]:
        manifest = student.manifest
        roles = self.loader.unspecialised(manifest)
        for role in roles:
            yield Piece("specialising", partial(self._compile_in, manifest, role, device, made), False)
        tried: set[str] = set()
        while made:  # once more where another that shares them was loaded meanwhile
            for other in self.loader.beside(manifest, made):
                if other.version not in tried:
                    yield from self._verifying(other)
                    tried.add(other.version)
            yield Piece("specialising", partial(self._replace, manifest, made, tried), True)
        for role in roles:
            yield from self._warming(student, role, self.loader.graphs(manifest)[role])

    def _compile_in(self, manifest: StudentManifest, role: str, device: str, made: dict[str, Engine]) -> None:
        loader, largest = self.loader, None
        if loader.scaled:
            largest = scales.largest(loader.registry, manifest, role, device)
        made[role] = loader.specialised(manifest, role, largest)

    def _replace(self, manifest: StudentManifest, made: dict[str, Engine], tried: set[str]) -> None:
        if self.loader.replace(manifest, made, tried):
            made.clear()

    def _new(self, manifest: StudentManifest) -> list[tuple[str, ComponentGraph]]:
        """The components that have to be compiled, and so are warmed at every batch size."""
        graphs = self.loader.graphs(manifest).items()
        return [(role, graph) for role, graph in graphs if not self.loader.is_known(manifest, role, graph)]

    def _hold(self, versions: Iterable[str], held: list[StudentManifest]) -> None:
        for version in versions:
            manifest = self._checked(version)
            self.loader.hold(manifest)
            held.append(manifest)

    def _fill(self, manifest: StudentManifest, fresh: dict[str, LoadedStudent]) -> None:
        fresh[manifest.version] = self.loader.fill(manifest)

    def _let_go(self, manifest: StudentManifest) -> frozenset[str]:
        gone = self.loader.let_go(manifest)
        self.cost.forget(gone)
        return gone

    def _manifest(self, version: str) -> StudentManifest:
        student = self._loaded.get(version)
        return student.manifest if student else self.loader.registry.student(version)

    def _checked(self, version: str) -> StudentManifest:
        manifest = self.loader.registry.student(version)
        self.loader.check(manifest)
        if manifest.golden is None:
            raise GoldenMismatch(f"{shown(version)} has no golden samples: make it again with them")
        return manifest

    def _warming(self, student: LoadedStudent, role: str, graph: ComponentGraph) -> Iterator[Piece]:
        """Calls of every size, once per stream, since the first of each allocates, and once more to be measured."""
        streams = self.loader.profile.streams
        for size in batches_of(self.loader.profile, graph):
            call = partial(self._warm, student, role, graph.example(size))
            for left in range(streams, -1, -1):
                yield Piece("warming", partial(call, measured=not left), True)
            for measured in (False, True) if streams > 1 and size <= ALONE_ROWS else ():
                yield Piece("warming", partial(call, measured=measured, lone=True), True)

    def _warm(
        self, student: LoadedStudent, role: str, inputs: dict[str, Tensor], *, measured: bool, lone: bool = False
    ) -> None:
        engine, size = self.loader.engine(student.manifest, role), len(next(iter(inputs.values())))
        begun = time.perf_counter()
        with alone() if lone else nullcontext():
            engine.run(**inputs)
        if measured:
            seconds = time.perf_counter() - begun
            self.cost.observe(self.cost_key(student, role), size, seconds, lone=lone)

    def _inherit_costs(self, student: LoadedStudent) -> None:
        """Other weights of a known graph cost what those cost that are here."""
        for role, graph in self.loader.graphs(student.manifest).items():
            own = self.cost_key(student, role)
            for blob in sorted(self.loader.blobs(graph)):
                self.cost.inherit(own, replace(own, blob=blob))

    def _verifying(self, student: LoadedStudent) -> Iterator[Piece]:
        golden = Golden.from_bytes(self.loader.registry.read_blob(student.manifest.golden or ""))
        for call in verification(student, golden):
            yield Piece("verifying", call, True)
