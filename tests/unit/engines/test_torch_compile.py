from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engines.backends import _inductor
from engines.backends.base import Profile
from engines.backends.torch_compile import TorchCompile, TorchCompileEngine
from engines.cache import DiskCache
from engines.errors import BackendUnavailable, InternalError, UnknownPlugin
from engines.graph import ComponentGraph, GraphStore, spec
from engines.loader import reader
from tests import tiny_sd


@pytest.fixture(scope="module")
def graph() -> ComponentGraph:
    teacher = tiny_sd.teacher()
    return GraphStore(None).graph(spec(teacher.manifest, "encoder", reader(teacher.registry, teacher.manifest)))


def test_without_a_compiler_it_is_not_available_and_says_what_to_do(
    graph: ComponentGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TorchCompile().available()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not TorchCompile().available()
    with pytest.raises(BackendUnavailable, match=r"C\+\+ compiler .* install g\+\+"):
        _inductor.compile_elsewhere(graph.spec, _inductor.Order(4, 1, "cpu"), tmp_path)


def test_bf16_is_refused_before_anything_is_compiled(graph: ComponentGraph) -> None:
    with pytest.raises(UnknownPlugin, match="torch_compile has no bf16"):
        TorchCompile().build(graph, Profile(precision="bf16"))


class Known:
    """A graph that only says under which keys something was asked for."""

    spec = None

    def __init__(self) -> None:
        self.keys: list[Sequence[str]] = []

    def kept(self, what: Sequence[str], build: object) -> Path:
        self.keys.append(what)
        return Path()


def test_code_is_kept_by_all_that_is_baked_into_it() -> None:
    known = Known()
    for profile in (
        Profile(), Profile(threads=1), Profile(batches=(1, 32)), Profile(batches=(16,)), Profile(weights="constant")
    ):  # fmt: skip
        TorchCompile().build(known, profile)  # type: ignore[arg-type]
    first, fewer_threads, larger, same_rows, constant = known.keys
    assert len({first, fewer_threads, larger}) == 3
    assert first == same_rows == constant


def test_a_compilation_that_fails_says_why(graph: ComponentGraph, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"(?s)compiling sd encoder failed.*no_such_device"):
        _inductor.compile_elsewhere(graph.spec, _inductor.Order(4, 1, "no_such_device"), tmp_path)


def test_what_is_built_needs_a_cache(graph: ComponentGraph, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="cache folder"):
        graph.kept(("plan",), lambda folder: None)
    made = GraphStore(DiskCache(tmp_path)).graph(graph.spec)
    first = made.kept(("plan", "a"), lambda folder: (folder / "data").write_text("a"))
    assert made.kept(("plan", "b"), lambda folder: (folder / "data").write_text("b")) != first
    assert (made.kept(("plan", "a"), lambda folder: None) / "data").read_text() == "a"


def test_an_engine_answers_with_what_its_package_returns() -> None:
    class Encoder:
        inputs = frozenset({"x"})
        outputs = ("one", "two")

    engine = TorchCompileEngine(Encoder(), lambda x: (x, 2 * x), "cpu")  # type: ignore[arg-type]
    made = engine.run(x=torch.ones(1))
    assert (made["one"].item(), made["two"].item()) == (1, 2)
