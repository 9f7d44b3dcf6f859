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
from engines.parts import load_weights, reader
from tests import tiny_families, tiny_sd


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
        _inductor.compile_elsewhere(graph.spec, _inductor.Order(4, 1, "cpu", "fp32"), tmp_path)


def test_an_unknown_precision_is_refused_before_anything_is_compiled(graph: ComponentGraph) -> None:
    with pytest.raises(UnknownPlugin, match="torch_compile has no fp16: choose from fp32, bf16"):
        TorchCompile().build(graph, Profile(precision="fp16"))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of a norm: it is not a product
@pytest.mark.parametrize("name", ["sana", "flux"])
def test_bf16_is_in_the_program_itself_and_asks_for_the_weights_of_products_in_bf16(name: str) -> None:
    own = tiny_families.shipped(name)
    graph = GraphStore(None).graph(spec(own.manifest, "denoiser", reader(own.registry, own.manifest)))
    weights = graph.select(load_weights(own.registry, own.manifest.components["denoiser"]))
    network = graph.module()
    network.load(weights)
    draw = torch.Generator().manual_seed(0)
    inputs = {name: torch.rand(zero.shape, generator=draw) for name, zero in graph.example(2).items()}
    with torch.no_grad():
        exact = network(**inputs)
        narrow = _inductor.narrow_products(network, "cpu")
        program = _inductor.exported(graph.spec, network, _inductor.Order(4, 1, "cpu", "bf16"))
        made = program.module()(**inputs)
    types = {name: value.dtype for name, value in program.state_dict.items()}
    assert {name for name, kind in types.items() if kind == torch.bfloat16} == set(narrow)
    assert set(narrow) == {
        f"{at}.{own}"
        for at, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for own in dict(module.named_parameters(recurse=False))
    }
    error = (made - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.06


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
        Profile(), Profile(threads=1), Profile(batches=(1, 32)), Profile(precision="bf16"),
        Profile(batches=(16,)), Profile(weights="constant"),
    ):  # fmt: skip
        TorchCompile().build(known, profile)  # type: ignore[arg-type]
    first, fewer_threads, larger, narrow, same_rows, constant = known.keys
    assert len({first, fewer_threads, larger, narrow}) == 4
    assert first == same_rows == constant


def test_a_compilation_that_fails_says_why(graph: ComponentGraph, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"(?s)compiling sd encoder failed.*no_such_device"):
        _inductor.compile_elsewhere(graph.spec, _inductor.Order(4, 1, "no_such_device", "fp32"), tmp_path)


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
