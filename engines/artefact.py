"""Makes students: imports a diffusers directory, or puts new weights or schedules on an existing one.

Weights go in as they are, configs and tokenizer files beside them, all by content; then golden samples are drawn
with the reference backend, and the manifest is published last.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from engines import golden, plugins
from engines.errors import InvalidManifest, InvalidRequest, NotBuilt
from engines.graph import ComponentGraph, spec
from engines.loader import load_student, load_weights, reader
from engines.manifest import Component, Guidance, Kind, ProcessSpec, Schedule, StudentManifest, shown
from engines.registry.base import Registry

GOLDEN_PROMPTS = ("a red circle", "a small blue square on the left", "two shapes on white", "")
_PREDICTIONS: dict[str, Kind] = {"flow_prediction": "flow", "epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FRESH = ("second_time.", "guidance.")
"""Layers of a denoiser that a teacher has not: they begin at zero, where the student is its teacher."""
ADAPTER = "pytorch_lora_weights.safetensors"
"""The file of a student's denoiser that holds its LoRA, by the name that diffusers looks for."""


def import_diffusers(
    directory: Path,
    registry: Registry,
    *,
    name: str,
    kind: Literal["teacher", "full"] = "teacher",
    schedules: Mapping[int, Schedule] | Iterable[Schedule],
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    solver: str = "ddim",
    process: ProcessSpec | None = None,
    prediction: Kind | None = None,
    licence: str = "apache-2.0",
    task: str | None = None,
    golden_prompts: Sequence[str] = GOLDEN_PROMPTS,
) -> str:
    """Publishes a diffusers directory and returns its version; the same directory gives the same version.

    `process` and `prediction` are read from the scheduler's config, which must be a flow, unless they are given.

    Raises:
        NotBuilt: its pipeline class has no family file here.
        InvalidManifest: it is not what its class says.
    """
    index = _json(directory / "model_index.json")
    family = _family_of(str(index.get("_class_name")))
    folders: dict[str, str] = plugins.load("engines.families", family, "FOLDERS")
    scheduler = _json(directory / "scheduler" / "scheduler_config.json")
    unet, vae = (
        _json(directory / folders["denoiser"] / "config.json"),
        _json(directory / folders["decoder"] / "config.json"),
    )
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    manifest = StudentManifest(
        name=name,
        family=family,
        kind=kind,
        components={role: _component(directory, role, folder, registry) for role, folder in folders.items()},
        process=process or _process(scheduler),
        prediction=prediction or _prediction(scheduler),
        solver=solver,
        schedules=_by_steps(schedules),
        guidance=guidance,
        resolutions=((width * downscale, height * downscale),),
        latent_channels=unet["in_channels"],
        downscale=downscale,
        licence=licence,
        task=task,
    )
    return _publish(registry, manifest, golden_prompts)


def make_student(
    registry: Registry,
    base_version: str,
    name: str,
    *,
    denoiser_weights: Mapping[str, Tensor] | None = None,
    adapter: Mapping[str, Tensor] | None = None,
    schedules: Mapping[int, Schedule] | Iterable[Schedule],
    guidance: Guidance | None = None,
    inputs: Iterable[Literal["s", "w"]] | None = None,
    solver: str | None = None,
    prediction: Kind | None = None,
    process: ProcessSpec | None = None,
    kind: Literal["full", "schedule"] | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16",
    parents: Sequence[str] = (),
    golden_prompts: Sequence[str] = GOLDEN_PROMPTS,
) -> str:
    """Publishes a student of `base_version` and returns its version; what is not given is the base's.

    Without weights it is a schedule-only student. Weights may lack the layers of `inputs`: those begin at zero,
    where the student is its base. `adapter` is the LoRA that `denoiser_weights` were merged with, by peft's names
    (alpha = rank): served are the full weights, on the graph that every other student has, and the LoRA is kept
    beside them.

    Raises:
        GraphMismatch: the weights are not those of the base's network.
    """
    base = registry.student(base_version)
    reads = base.inputs if inputs is None else frozenset(inputs)
    changed: dict[str, Any] = {
        "name": name,
        "kind": kind or ("schedule" if denoiser_weights is None else "full" if adapter is None else "lora"),
        "base": base.version,
        "schedules": _by_steps(schedules),
        "inputs": reads,
        "guidance": guidance or base.guidance,
        "solver": solver or base.solver,
        "prediction": prediction or base.prediction,
        "process": process or base.process,
        "parents": tuple(parents) or (base.version,),
        "golden": None,
    }
    if denoiser_weights is not None or reads != base.inputs:
        changed["components"] = base.components | {
            "denoiser": _with_weights(registry, base, reads, denoiser_weights, dtype, adapter)
        }
        changed["dtype"] = dtype
    manifest = StudentManifest.model_validate(base.model_dump() | _dumped(changed))
    return _publish(registry, manifest, golden_prompts)


def export_diffusers(registry: Registry, version: str, directory: Path) -> None:
    """Writes a student as a diffusers directory's component folders, beside which a pipeline's index may stand.

    Raises:
        NotBuilt: its network reads inputs that diffusers' own has not.
    """
    manifest = registry.student(version)
    if manifest.inputs:
        raise NotBuilt(f"a network that reads {sorted(manifest.inputs)} is no plain diffusers network")
    folders: dict[str, str] = plugins.load("engines.families", manifest.family, "FOLDERS")
    for role, folder in folders.items():
        part = manifest.components[role]
        for name, sha in part.files.items():
            if name == ADAPTER:  # its weights are merged already
                continue
            _write(directory / (name if name.startswith("tokenizer/") else f"{folder}/{name}"), registry.read_blob(sha))
        file = "model.safetensors" if role == "encoder" else "diffusion_pytorch_model.safetensors"
        _write(directory / folder / file, registry.read_blob(part.weights))


def export_lora(registry: Registry, version: str, directory: Path) -> Path:
    """Writes a student's LoRA as the file that diffusers' `load_lora_weights(directory)` reads, and returns its path.

    It belongs on the pipeline of the student's base, sampled as the manifest's schedules say.

    Raises:
        InvalidRequest: the student has none.
    """
    files = registry.student(version).components["denoiser"].files
    if ADAPTER not in files:
        raise InvalidRequest(f"{shown(version)} was not trained as a LoRA: export it as a diffusers directory")
    _write(directory / ADAPTER, registry.read_blob(files[ADAPTER]))
    return directory / ADAPTER


def _publish(registry: Registry, manifest: StudentManifest, prompts: Sequence[str]) -> str:
    student = load_student(registry, manifest)
    samples = golden.make(student, tuple(prompts))
    whole = manifest.model_copy(update={"golden": registry.put_blob(samples.to_bytes())})
    return registry.publish(StudentManifest.model_validate(whole.model_dump()))


def _with_weights(
    registry: Registry,
    base: StudentManifest,
    inputs: frozenset[str],
    weights: Mapping[str, Tensor] | None,
    dtype: str,
    adapter: Mapping[str, Tensor] | None,
) -> Component:
    """The base's denoiser with other weights, checked against the network that the student will have."""
    old = base.components["denoiser"]
    shaped = base.model_copy(update={"inputs": inputs})
    network = ComponentGraph(spec(shaped, "denoiser", reader(registry, base)), Path).module()
    network.load(load_weights(registry, old) if weights is None else weights, fresh=FRESH)
    stored = {name: value.to(_DTYPES[dtype]).contiguous() for name, value in network.state_dict().items()}
    files = {name: sha for name, sha in old.files.items() if name != ADAPTER}
    if adapter is not None:
        network = plugins.load("engines.families", base.family, "FOLDERS")["denoiser"]  # as diffusers calls it
        named = {f"{network}.{name}": value.contiguous() for name, value in adapter.items()}
        files[ADAPTER] = registry.put_blob(save(named, {"format": "pt"}))
    return Component(weights=registry.put_blob(save(stored)), files=files)


def _component(directory: Path, role: str, folder: str, registry: Registry) -> Component:
    files = {"config.json": directory / folder / "config.json"}
    if role == "encoder":
        files |= {f"tokenizer/{p.name}": p for p in sorted((directory / "tokenizer").iterdir()) if p.is_file()}
    return Component(
        weights=registry.put_blob(_weights_file(directory / folder)),
        files={name: registry.put_blob(path) for name, path in files.items()},
    )


def _weights_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    plain = [path for path in found if ".fp16." not in path.name] or found
    if len(plain) != 1:
        raise InvalidManifest(f"{folder} has {len(plain)} safetensors files: one is needed, not sharded")
    return plain[0]


def _family_of(pipeline: str) -> str:
    for family in plugins.names("engines.families"):
        if plugins.load("engines.families", family, "PIPELINE") == pipeline:
            return family
    raise NotBuilt(f"no file of engines/families is for {pipeline}: add one")


def _process(scheduler: Mapping[str, Any]) -> ProcessSpec:
    if scheduler.get("use_flow_sigmas") or "FlowMatch" in str(scheduler.get("_class_name")):
        return ProcessSpec(kind="rf")
    raise NotBuilt(f"the noise of {scheduler.get('_class_name')} has no process here: give `process` and `prediction`")


def _prediction(scheduler: Mapping[str, Any]) -> Kind:
    if "FlowMatch" in str(scheduler.get("_class_name")):
        return "flow"
    return _PREDICTIONS[str(scheduler.get("prediction_type"))]


def _by_steps(schedules: Mapping[int, Schedule] | Iterable[Schedule]) -> dict[int, Schedule]:
    if isinstance(schedules, Mapping):
        return dict(schedules)
    return {schedule.steps: schedule for schedule in schedules}


def _dumped(changed: Mapping[str, Any]) -> dict[str, Any]:
    """As `model_dump` writes it, so that the whole is validated again."""
    return StudentManifest.model_construct(**changed).model_dump(include=set(changed), warnings=False)


def _json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidManifest(f"{path} cannot be read: {error}; give a diffusers directory") from error
    return read


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
