"""A teacher out of the registry as torch modules: what training differentiates through and draws from.

The networks are the families' own, the same that are exported for serving, so that what a student learnt
here is what its engine computes there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distill_jobs.experts import networks
from engines import plugins, policy, process
from engines.artefact import FRESH
from engines.denoiser import AtWeight, BaseDenoiser, Denoiser, Guided
from engines.errors import NotBuilt
from engines.families.base import SEEN, ComponentNetwork, Family
from engines.graph import ComponentGraph, ComponentSpec, spec
from engines.manifest import Guidance, Schedule, StudentManifest, shown
from engines.parts import load_weights, reader
from engines.registry.base import Registry
from engines.slimming import Slimmed, slimmed
from engines.student import LoadedStudent

_PREFIX = "net."  # the name of a Denoiser's network inside it


@dataclass(frozen=True)
class Teacher:
    """One version's networks. `denoiser` is unguided and its own; `cond` rows are [B, L, D]. `graph` is what the
    denoiser is without its weights."""

    manifest: StudentManifest
    denoiser: Denoiser
    decoder: ComponentNetwork
    encoder: ComponentNetwork
    tokenizer: object
    graph: ComponentSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.manifest.latent_shape(*self.manifest.resolutions[0])

    def beginner(self, inputs: frozenset[str], slim: Slimmed | None = None, *, points: int = 1) -> Denoiser:
        """A student before its first update: the teacher's network, trainable, which reads `inputs` too. The layers
        for them begin at zero, so that it is still the teacher; with `slim` it is what is left of it. As a policy of
        several `points` it gives the same x0 at all of them.

        Raises:
            NotBuilt: this network cannot be a policy.
        """
        reads = inputs | self.denoiser.inputs
        spec = replace(self.graph, inputs=tuple(sorted(reads)))
        weights = blob_weights(self.denoiser.state_dict())
        if slim is not None:
            weights = {new: value for name, value in weights.items() if (new := slim.rename(name)) is not None}
        if points > 1:
            weights = policy.repeated(weights, points)
        if slim is not None or points > 1:
            config = json.loads(dict(spec.files)["denoiser/config.json"]) if slim is None else slim.config
            own = ("denoiser/config.json", json.dumps(policy.widened(config, points)))
            spec = replace(spec, files=tuple(own if file[0] == own[0] else file for file in spec.files))
        network = ComponentGraph(spec, Path).module()
        network.load(weights, fresh=FRESH)
        return Denoiser(network, self.denoiser.process, self.denoiser.kind, reads, points)

    def slimmed(self, layers: int | None, middle: bool) -> Slimmed:
        """The denoiser with fewer layers.

        Raises:
            InvalidRequest: it has none to leave out.
        """
        return slimmed(json.loads(dict(self.graph.files)["denoiser/config.json"]), layers, middle)

    def guided(self, w: float) -> BaseDenoiser:
        """u + w(c - u) where the family's own null conditioning is u; the plain network for w = 1. A network that reads
        its weight is asked with it."""
        return self.denoiser if w == 1.0 and "w" not in self.denoiser.inputs else self.guide(w)

    def guide(self, w: float) -> BaseDenoiser:
        """The same even for w = 1: rows may bring weights of their own."""
        if "w" in self.denoiser.inputs:
            return AtWeight(self.denoiser, w)
        return Guided(self.denoiser, self.null(), w)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 64) -> Tensor:
        """[B, L, D] fp32."""
        family = self._family(self.denoiser)
        return torch.cat([family.encode(prompts[i : i + batch]) for i in range(0, len(prompts), batch)])

    def student(self, student: BaseDenoiser, schedules: Mapping[int, Schedule], guidance: Guidance) -> LoadedStudent:
        """Networks in training as serving would run them: the same plans, solvers and family, on plain torch."""
        changed = {"schedules": dict(schedules), "guidance": guidance, "inputs": student.inputs, "kind": "full"}
        points = max(network.points for network in networks(student).values())
        if points > 1:
            changed |= {"points": points, "solver": "dx"}
        manifest = self.manifest.model_copy(update=changed)
        return LoadedStudent(manifest, self._family(student), student.process, "eager", "fp32")

    def null(self) -> Tensor:
        """[1, L, D]: the condition of no prompt, which guidance leads away from."""
        return self._family(self.denoiser).null()

    def _family(self, student: BaseDenoiser) -> Family:
        made = plugins.load("engines.families", self.manifest.family, "FAMILY")
        asked = {name: _Module(network.net) for name, network in networks(student).items()}
        family: Family = made(
            _Module(self.encoder), asked, _Module(self.decoder), tokenizer=self.tokenizer, inputs=student.inputs
        )
        return family

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] in levels 0..255, not rounded: rounding would add grain, and have no slope."""
        pictures: Tensor = self.decoder(latents.float())
        return pictures

    @torch.no_grad()
    def pictures(self, latents: Tensor, batch: int = 64) -> npt.NDArray[np.float32]:
        """The same of many."""
        starts = range(0, len(latents), batch)
        return torch.cat([self.decode(latents[start : start + batch]) for start in starts]).numpy()


class _Module:
    """A component network behind the face of an engine."""

    def __init__(self, module: Any) -> None:
        self._module: ComponentNetwork = module
        self.inputs = frozenset(port.name for port in module.ports)

    @torch.no_grad()
    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        out = self._module(**inputs)
        return dict(zip(self._module.outputs, out if isinstance(out, tuple) else (out,), strict=True))

    def close(self) -> None:
        """Nothing is held."""


def load(registry: Registry, version: str) -> Teacher:
    """A version's networks in fp32, frozen.

    Raises:
        StudentNotFound, CorruptBlob, GraphMismatch: as the registry and the loader say.
        NotBuilt: it has several networks, makes videos, or inpaints by what it reads.
    """
    manifest = registry.student(version)
    if manifest.experts:
        raise NotBuilt(f"{shown(version)} has further denoisers ({', '.join(manifest.experts)}): a teacher has one")
    if manifest.frames:
        raise NotBuilt(
            f"{shown(version)} makes videos of {manifest.frames.number} frames, and only pictures are distilled: "
            "import it with one frame"
        )
    read = reader(registry, manifest)
    graphs = {role: spec(manifest, role, read) for role in ("encoder", "denoiser", "decoder")}
    parts = {role: _network(registry, manifest, role, graph) for role, graph in graphs.items()}
    if any(port.name == SEEN for port in parts["denoiser"].ports):
        raise NotBuilt(f"{shown(version)} reads what it inpaints, and only networks that read x alone are distilled")
    family = plugins.load("engines.families", manifest.family, "FAMILY")
    denoiser = Denoiser(parts["denoiser"], process.make(manifest.process), manifest.prediction, manifest.inputs)
    denoiser.reads_instead = True
    return Teacher(
        manifest=manifest,
        denoiser=denoiser.requires_grad_(False).eval(),
        decoder=parts["decoder"],
        encoder=parts["encoder"],
        tokenizer=family.tokenizer(read, sorted(manifest.components["encoder"].files)),
        graph=graphs["denoiser"],
    )


def _network(registry: Registry, manifest: StudentManifest, role: str, graph: ComponentSpec) -> ComponentNetwork:
    network = ComponentGraph(graph, Path).module()
    network.load(load_weights(registry, manifest.components[role]))
    network.requires_grad_(False).eval()
    return network


def blob_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A denoiser's weights under the names that its blob has."""
    return {name.removeprefix(_PREFIX): value for name, value in weights.items()}
