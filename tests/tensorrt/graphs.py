"""Every graph of every family, at most once: what the real library builds plans of in these tests."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from torch import Tensor

from engines.cache import DiskCache
from engines.families.base import PICTURES
from engines.graph import ComponentGraph, GraphStore, spec
from engines.parts import load_weights, reader
from tests import tiny_families
from tests.exported import graphs

ROLES = ("encoder", "denoiser", "decoder")
NO_GRAPH = {
    ("qwen_image", "denoiser"): "it turns positions as complex numbers, which ONNX has not",
    ("z_image", "denoiser"): "it reads a list of sequences of any length, which no one graph does",
}
# Names of `tiny_families` by the graphs that no other name has; so each is exported and built once.
_OWN = {"sd-edm": (), "sdxl-edm": ("decoder",), "flux-schnell": ("denoiser",), "wan-picture": ("denoiser", "decoder")}
GRAPHS = [
    (name, role) for name in tiny_families.FAMILIES for role in _OWN.get(name, ROLES) if (name, role) not in NO_GRAPH
] + [(name, PICTURES) for name in ("sd", "sana", "qwen_image", "wan-picture")]  # one of each kind of VAE


def each(graphs: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    """A test of each; processes that share the tests do not share a family, whose exports they would both make."""
    params = [pytest.param(*one, id="-".join(one), marks=pytest.mark.xdist_group(one[0])) for one in graphs]
    return pytest.mark.parametrize(("name", "role"), params)


_TEMPORARY = TemporaryDirectory(prefix="fewstep-tensorrt-")
FOLDER = Path(_TEMPORARY.name)


@dataclass(frozen=True)
class Case:
    graph: ComponentGraph
    weights: dict[str, Tensor]


@cache
def case(name: str, role: str) -> Case:
    """A graph and its weights. Its export is shared by all test processes, what is built of it is this one's own."""
    own = tiny_families.shipped(name)
    graph = graphs().graph(spec(own.manifest, role, reader(own.registry, own.manifest)))
    component = own.manifest.components["decoder" if role == PICTURES else role]
    return Case(replace(graph, cache=_built()), graph.select(load_weights(own.registry, component)))


@cache
def _built() -> DiskCache:
    return DiskCache(FOLDER)


@cache
def store() -> GraphStore:
    return GraphStore(_built())
