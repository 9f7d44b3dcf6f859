"""Plans of a student for GPUs that are not here: built on any machine, found by the workers that have one.

A worker finds them where it has the same engine cache, batch sizes, precision, targets and version of the library.
"""

from dataclasses import replace
from pathlib import Path

from engines import scales
from engines.backends import tensorrt
from engines.backends.base import SCALED, Profile
from engines.graph import GraphStore, spec
from engines.loader import profile_of
from engines.parts import load_weights, reader
from engines.registry.base import Registry


def build_ahead(registry: Registry, version: str, profile: Profile, graphs: GraphStore) -> dict[str, Path]:
    """Component -> the folder with its plan, for the targets of `profile`.

    Denoisers in fp8 have two: that in which they go live and, as `<component> fp8`, that in which they are specialised.

    Raises:
        BackendUnavailable: no TensorRT that builds for others.
        UnsupportedGraph: which node of a graph it cannot take.
    """
    manifest = registry.student(version)
    read, found = reader(registry, manifest), {}
    for role, component in manifest.components.items():
        graph = graphs.graph(spec(manifest, role, read))
        weights = graph.select(load_weights(registry, component))
        found[role] = tensorrt.plan(graph, profile_of(profile, graph), weights)
        if profile.precision in SCALED and graph.spec.role == "denoiser":
            largest = scales.largest(registry, manifest, role, "cpu")
            own = replace(profile, weights="constant")
            found[f"{role} {profile.precision}"] = tensorrt.plan(graph, own, weights, largest)
    return found
