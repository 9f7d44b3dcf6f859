"""A component without its weights: what it is (`ComponentSpec`), its torch module, and its ONNX graph.

The ONNX model is exported from a config with random weights, and then every weight becomes a graph input named
`weight:<name in the blob>`. So one graph serves all weights of its shape, `graph_id` says which those are, and a
student of a known config needs no export at all: graphs are kept by the hash of what goes into an export.
An export holds the GIL for seconds; a worker therefore has it made in a process of its own (`in_process=False`).
"""

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines import elsewhere, plugins
from engines.cache import DiskCache
from engines.errors import InternalError
from engines.families.base import PICTURES, ComponentNetwork, ReadFile
from engines.manifest import StudentManifest
from engines.onnx_repairs import repaired

OPSET = 21
WEIGHT = "weight:"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What multiplies something with a weight."""
_GRAPH = "graph.onnx"
_EXAMPLE_ROWS = 2
_REVISION = 4  # counts up when the same network would be exported otherwise


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """All that an export depends on. `files` are the configs that the family reads, as text."""

    family: str
    role: str
    files: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]
    latent: tuple[int, ...]

    @property
    def key(self) -> str:
        """Hash of the spec; config entries that begin with `_`, but for the class name, say nothing about a network."""
        files = [(name, _essential(text)) for name, text in self.files]
        return _sha([self.family, self.role, files, self.inputs, self.latent])

    def network(self) -> ComponentNetwork:
        files = dict(self.files)
        made: ComponentNetwork = plugins.load("engines.families", self.family, "FAMILY").network(
            self.role, lambda name: files[name].encode(), inputs=frozenset(self.inputs), latent=self.latent
        )
        return made

    def to_json(self) -> str:
        return json.dumps([self.family, self.role, self.files, self.inputs, self.latent])

    @classmethod
    def from_json(cls, text: str) -> "ComponentSpec":
        family, role, files, inputs, latent = json.loads(text)
        return cls(family, role, tuple((n, t) for n, t in files), tuple(inputs), tuple(latent))


def spec(manifest: StudentManifest, role: str, read: ReadFile) -> ComponentSpec:
    """What `role` of a student is, at the student's first resolution."""
    family = plugins.load("engines.families", manifest.family, "FAMILY")
    denoiser = role not in ("encoder", "decoder", PICTURES)
    files = family.configs("decoder" if role == PICTURES else role)
    return ComponentSpec(
        family=manifest.family,
        role=role if not denoiser else "denoiser",
        files=tuple((_as_role(name, role), read(name).decode()) for name in files),
        inputs=tuple(sorted(manifest.inputs)) if denoiser else (),
        latent=manifest.latent_shape(*manifest.resolutions[0]),
    )


@dataclass(frozen=True)
class ComponentGraph:
    """One graph: `engines.backends.base.Graph`. The export happens when `id` or `onnx` is first asked for."""

    spec: ComponentSpec
    folder: Callable[[], Path] = field(repr=False, compare=False)
    cache: DiskCache | None = field(default=None, repr=False, compare=False)

    @cached_property
    def id(self) -> str:
        """Of what was exported; ops, attributes, shapes and constants, and no weight."""
        return graph_id(self.onnx())

    @property
    def key(self) -> str:
        return self.spec.key

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._empty.state_dict().items()}

    @cached_property
    def products(self) -> frozenset[str]:
        """The weights of linear layers and of convolutions that are not in groups."""
        layers = {path: one for path, one in self._empty.named_modules() if isinstance(one, LAYERS)}
        own = {f"{path}.weight" for path, one in layers.items() if getattr(one, "groups", 1) == 1}
        return frozenset(name for name, inner in self.graph_names.items() if inner in own)

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset(port.name for port in self._empty.ports)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._empty.outputs

    @cached_property
    def output_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape without the batch, from a run without memory."""
        inputs = {name: value.to("meta") for name, value in self.example(1).items()}
        with torch.no_grad():
            out = self._empty(**inputs)
        parts = out if isinstance(out, tuple) else (out,)
        return {name: tuple(part.shape[1:]) for name, part in zip(self.outputs, parts, strict=True)}

    def select(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a blob that this graph reads, under its names."""
        return self._empty.select(weights)

    def module(self) -> ComponentNetwork:
        return self.spec.network()

    def onnx(self) -> bytes:
        folder = self.folder()  # kept for as long as it is read
        return (folder / _GRAPH).read_bytes()

    @property
    def graph_names(self) -> Mapping[str, str]:
        return self._empty.graph_names()

    def kept(self, what: Sequence[str], build: Callable[[Path], None]) -> Path:
        if self.cache is None:
            raise InternalError("what is built from a graph needs a cache folder")
        return self.cache.get(_sha([self.key, *_versions(), *what]), build)

    def example(self, rows: int) -> dict[str, torch.Tensor]:
        """Zero inputs of `rows` rows, for a warm-up or an export."""
        return {p.name: torch.zeros((rows, *p.shape), dtype=p.dtype) for p in self._empty.ports}

    @cached_property
    def _empty(self) -> ComponentNetwork:
        """The module without memory for its weights."""
        with torch.device("meta"):
            return self.spec.network()


class GraphStore:
    """Graphs by spec, kept on disk; here until they are forgotten."""

    def __init__(self, cache: DiskCache | None, *, in_process: bool = True) -> None:
        self._cache = cache
        self._export = export if in_process else _export_elsewhere
        self._known: dict[str, ComponentGraph] = {}

    def graph(self, spec: ComponentSpec) -> ComponentGraph:
        def folder() -> Path:
            if self._cache is None:
                raise InternalError("an export needs a cache folder")
            return self._cache.get(_sha([spec.key, _versions()]), lambda to: self._export(spec, to))

        return self._known.setdefault(spec.key, ComponentGraph(spec, folder, self._cache))

    def forget(self, key: str) -> None:
        """Lets go of a graph that nobody uses; on disk it stays until it is evicted."""
        self._known.pop(key, None)


def export(spec: ComponentSpec, folder: Path) -> None:
    """Writes the ONNX graph of `spec`, without weights, into `folder`."""
    import onnx

    torch.manual_seed(0)
    network = spec.network()
    example = ComponentGraph(spec, Path).example(_EXAMPLE_ROWS)
    rows = torch.export.Dim("rows", min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={name: {0: rows} for name in example},
            input_names=list(example),
            output_names=list(network.outputs),
            verbose=False,
            optimize=False,
        )
    assert program is not None
    used = _used(program.exported_program)
    names = {inner: name for name, inner in network.graph_names().items() if inner in used}
    model = without_weights(repaired(program.model_proto), names)
    (folder / _GRAPH).write_bytes(onnx.ModelProto.SerializeToString(model, deterministic=True))


def _used(program: Any) -> set[str]:
    """The parameters and buffers that the output depends on: a text encoder's last layer is often not read."""
    signature = program.graph_signature
    named = signature.inputs_to_parameters | signature.inputs_to_buffers
    waiting, reached = [program.graph.output_node()], set()
    while waiting:
        node = waiting.pop()
        if node.name not in reached:
            reached.add(node.name)
            waiting.extend(node.all_input_nodes)
    return {named[name] for name in reached & named.keys()}


def without_weights(model: Any, names: Mapping[str, str]) -> Any:
    """The model with the initializers in `names` (initializer -> weight) as inputs `weight:<name>`, sorted by name.

    Only then is it optimised: what is left to fold holds no weight.

    Raises:
        InternalError: the exporter has folded weights away, so that they could not be set.
    """
    import onnx
    import onnxscript.optimizer

    graph = model.graph
    found = {init.name: init for init in graph.initializer if init.name in names}
    if lost := sorted(set(names) - set(found)):
        raise InternalError(f"the exporter folded {len(lost)} weights into constants, first {lost[:3]}")
    for node in graph.node:
        node.input[:] = [WEIGHT + names[i] if i in found else i for i in node.input]
        node.doc_string = ""
        del node.metadata_props[:]
    for old in sorted(found, key=lambda name: names[name]):
        init = found[old]
        graph.input.append(onnx.helper.make_tensor_value_info(WEIGHT + names[old], init.data_type, list(init.dims)))
    kept = [init for init in graph.initializer if init.name not in found]
    del graph.initializer[:], graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    graph.initializer.extend(sorted(kept, key=lambda init: init.name))
    return onnxscript.optimizer.optimize(model)


def graph_id(model: bytes) -> str:
    """sha256 of the weightless model: the same in every process that exports the same network."""
    return hashlib.sha256(model).hexdigest()


def _export_elsewhere(spec: ComponentSpec, folder: Path) -> None:
    """`export` in a niced process, so that the GIL of this one stays free."""
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "spec.json"
        asked.write_text(spec.to_json())
        done = elsewhere.run("engines.graph", str(asked), str(folder))
    if done.returncode:
        raise InternalError(f"the export of {spec.family} {spec.role} failed: {done.stderr.strip()[-800:]}")


def _essential(text: str) -> str:
    config = json.loads(text)
    return json.dumps({k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}, sort_keys=True)


def _as_role(name: str, role: str) -> str:
    """Every denoiser of a student is exported as `denoiser`, whatever the student calls it; the config of what encodes
    pictures is the decoder's."""
    if role == PICTURES:
        return name.replace("decoder/", f"{PICTURES}/")
    if role in ("encoder", "decoder") or not name.startswith(f"{role}/"):
        return name
    return f"denoiser/{name.removeprefix(f'{role}/')}"


def _versions() -> list[str]:
    from importlib.metadata import version

    names = ("torch", "onnx", "onnxscript", "diffusers", "transformers")
    return [f"export {_REVISION}", *(f"{name} {version(name)}" for name in names)]


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    export(ComponentSpec.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
