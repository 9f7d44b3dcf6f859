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

from engines import frames, golden, plugins, policy, shipped
from engines.directory import component, family_of, read_json, reads_configs, refuse_more
from engines.errors import InvalidManifest, InvalidRequest, NotBuilt
from engines.families.base import FamilyClass
from engines.graph import ComponentGraph, spec
from engines.grid import SCALES, Grid
from engines.loader import load_student
from engines.manifest import Component, Guidance, Kind, ProcessSpec, Schedule, StudentManifest, shown
from engines.parts import load_weights, reader
from engines.registry.base import Registry

GOLDEN_PROMPTS = ("a red circle", "a small blue square on the left", "two shapes on white", "")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FRESH = ("second_time.", "guidance.")
"""Layers of a denoiser that a teacher has not: they begin at zero, where the student is its teacher."""
ADAPTER = "pytorch_lora_weights.safetensors"
"""The file of a student's denoiser that holds its LoRA, by the name that diffusers looks for."""
_BESIDE = (ADAPTER, SCALES)


def import_diffusers(
    directory: Path,
    registry: Registry,
    *,
    name: str,
    kind: Literal["teacher", "full"] = "teacher",
    schedules: Mapping[int, Schedule] | Iterable[Schedule | int],
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    inputs: Iterable[Literal["s", "w"]] = (),
    solver: str | None = None,
    process: ProcessSpec | None = None,
    prediction: Kind | None = None,
    resolution: tuple[int, int] | None = None,
    num_frames: int | None = None,
    licence: str = "apache-2.0",
    task: str | None = None,
    golden_prompts: Sequence[str] = GOLDEN_PROMPTS,
) -> str:
    """Publishes a diffusers directory and returns its version; the same directory gives the same version.

    What is not given is read from the scheduler's config. A schedule that is a number has as many steps, at the times
    of that scheduler. Of a pipeline that makes videos, `num_frames` is their length, its own if left out, and 1 makes a
    student of pictures. `inputs` are those that the network has of itself, as FLUX.1-dev reads its guidance weight w.

    Raises:
        NotBuilt: its pipeline class has no family file here, or its scheduler cannot be followed.
        InvalidManifest: it is not what its class says.
    """
    manifest = describe(
        directory,
        registry,
        name=name,
        kind=kind,
        schedules=schedules,
        guidance=guidance,
        inputs=inputs,
        solver=solver,
        process=process,
        prediction=prediction,
        resolution=resolution,
        num_frames=num_frames,
        licence=licence,
        task=task,
    )
    return publish(registry, manifest, golden_prompts)


def describe(
    directory: Path,
    registry: Registry,
    *,
    name: str,
    kind: Literal["teacher", "full"] = "teacher",
    schedules: Mapping[int, Schedule] | Iterable[Schedule | int],
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    inputs: Iterable[Literal["s", "w"]] = (),
    solver: str | None = None,
    process: ProcessSpec | None = None,
    prediction: Kind | None = None,
    resolution: tuple[int, int] | None = None,
    num_frames: int | None = None,
    licence: str = "apache-2.0",
    task: str | None = None,
) -> StudentManifest:
    """A diffusers directory as a manifest that is not published: its blobs are in the registry, golden samples are not.

    The arguments are those of `import_diffusers`, which raises the same.
    """
    index = read_json(directory / "model_index.json")
    family = family_of(str(index.get("_class_name")))
    folders: dict[str, tuple[str, ...]] = plugins.load("engines.families", family, "FOLDERS")
    refuse_more(index, folders["denoiser"])
    family_class: FamilyClass = plugins.load("engines.families", family, "FAMILY")
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    geometry = family_class.geometry(reads_configs(directory, folders))
    width, height = resolution or (geometry.width * geometry.downscale, geometry.height * geometry.downscale)
    if width % geometry.downscale or height % geometry.downscale:
        raise InvalidRequest(f"{width}x{height} are no multiples of {geometry.downscale}, the VAE's scale")
    own = shipped.read(scheduler, process, prediction)
    latent = (height // geometry.downscale, width // geometry.downscale)
    asked = list(schedules.values() if isinstance(schedules, Mapping) else schedules)
    if process and any(isinstance(one, int) for one in asked):
        raise InvalidManifest("the scheduler's own times are of its own process: give times, or no process")
    made = [
        shipped.schedule(scheduler, one, latent, family_class.sigmas(one)) if isinstance(one, int) else one
        for one in asked
    ]
    return StudentManifest(
        name=name,
        family=family,
        kind=kind,
        components={role: component(directory, role, names, registry) for role, names in folders.items()},
        process=own.process,
        prediction=own.prediction,
        solver=solver or own.solver,
        schedules=_by_steps(made),
        inputs=frozenset(inputs),
        guidance=guidance,
        resolutions=((width, height),),
        latent_channels=geometry.channels,
        downscale=geometry.downscale,
        frames=frames.of(geometry.frames, num_frames),
        licence=licence,
        task=task,
    )


def make_student(
    registry: Registry,
    base: str | StudentManifest,
    name: str,
    *,
    denoiser_weights: Mapping[str, Tensor] | None = None,
    experts: Mapping[str, Mapping[str, Tensor]] | None = None,
    adapter: Mapping[str, Tensor] | None = None,
    denoiser_config: Mapping[str, Any] | None = None,
    grid: Grid | None = None,
    points: int = 1,
    schedules: Mapping[int, Schedule] | Iterable[Schedule],
    guidance: Guidance | None = None,
    inputs: Iterable[Literal["s", "w"]] | None = None,
    solver: str | None = None,
    prediction: Kind | None = None,
    process: ProcessSpec | None = None,
    licence: str | None = None,
    kind: Literal["full", "schedule"] | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16",
    parents: Sequence[str] = (),
    golden_prompts: Sequence[str] | None = None,
) -> str:
    """Publishes a student of `base` and returns its version; what is not given is the base's. A base that is no version
    of the registry, only described, is not named in it.

    Without weights it is a schedule-only student. Weights may lack the layers of `inputs`: those begin at zero,
    where the student is its base. Golden samples are of the base's prompts, unless others are given. `adapter` is the
    LoRA that `denoiser_weights` were merged with, by peft's names (alpha = rank): served are the full weights, on the
    graph that every other student has, and the LoRA is kept beside them. `denoiser_config` is that of another network
    than the base's, such as a slimmed one; of several `points` it is a policy, whose weights have the wider last layer.
    `grid` says which of the weights are multiples of scales, which are kept beside them. `experts` are the weights of
    further networks like that of `denoiser_weights`, by the names that `nets` of the schedules call them.

    Raises:
        GraphMismatch: the weights are not those of the base's network.
        InvalidRequest: weights are not on their grid.
    """
    origin = registry.student(base).version if isinstance(base, str) else None
    base = registry.student(base) if isinstance(base, str) else base
    reads = base.inputs if inputs is None else frozenset(inputs)
    changed: dict[str, Any] = {
        "name": name,
        "kind": kind or ("schedule" if denoiser_weights is None else "full" if adapter is None else "lora"),
        "base": origin,
        "schedules": _by_steps(schedules),
        "inputs": reads,
        "points": points,
        "guidance": guidance or base.guidance,
        "solver": solver or ("dx" if points > 1 else base.solver),
        "prediction": prediction or base.prediction,
        "process": process or base.process,
        "licence": licence or base.licence,
        "parents": tuple(parents) or ((origin,) if origin else ()),
        "golden": None,
    }
    if points > 1:
        config = denoiser_config or json.loads(registry.read_blob(base.components["denoiser"].files["config.json"]))
        denoiser_config = policy.widened(config, points)
    if denoiser_weights is not None or reads != base.inputs:
        kept = {role: part for role, part in base.components.items() if role not in base.experts}
        changed["components"] = kept | {
            net: _with_weights(registry, base, reads, weights, dtype, adapter, denoiser_config, grid)
            for net, weights in {"denoiser": denoiser_weights, **(experts or {})}.items()
        }
        changed["dtype"] = dtype
    bits = base.weight_bits if "components" not in changed else None if grid is None else grid.bits
    manifest = StudentManifest.model_validate(base.model_dump() | _dumped(changed) | {"weight_bits": bits})
    return publish(registry, manifest, golden_prompts or prompts_of(registry, base))


def prompts_of(registry: Registry, manifest: StudentManifest) -> tuple[str, ...]:
    """The prompts of a version's golden samples, which its network can read; the usual ones where it has none."""
    if manifest.golden is None:
        return GOLDEN_PROMPTS
    return tuple(dict.fromkeys(golden.Golden.from_bytes(registry.read_blob(manifest.golden)).prompts))


def export_diffusers(registry: Registry, version: str, directory: Path) -> None:
    """Writes a student as a diffusers directory's component folders, beside which a pipeline's index may stand.

    Raises:
        NotBuilt: its network reads inputs that diffusers' own has not, or it has several networks.
    """
    manifest = registry.student(version)
    if manifest.experts:
        raise NotBuilt(f"{shown(version)} has further denoisers ({', '.join(manifest.experts)}): a pipeline has one")
    if manifest.inputs or manifest.points > 1:
        odd = f"reads {sorted(manifest.inputs)}" if manifest.inputs else f"gives {manifest.points} x0 at once"
        raise NotBuilt(f"a network that {odd} is no plain diffusers network")
    folders: dict[str, tuple[str, ...]] = plugins.load("engines.families", manifest.family, "FOLDERS")
    for role, names in folders.items():
        part = manifest.components[role]
        for name, sha in part.files.items():
            if name in _BESIDE:  # what they say is in the weights already
                continue
            _write(directory / (name if "/" in name else f"{names[0]}/{name}"), registry.read_blob(sha))
        file = "model.safetensors" if role == "encoder" else "diffusion_pytorch_model.safetensors"
        if len(names) == 1:
            _write(directory / names[0] / file, registry.read_blob(part.weights))
            continue
        weights = load_weights(registry, part)
        for folder in names:
            own = {n.removeprefix(f"{folder}."): w for n, w in weights.items() if n.startswith(f"{folder}.")}
            _write(directory / folder / file, save(own, {"format": "pt"}))


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


def publish(registry: Registry, manifest: StudentManifest, prompts: Sequence[str]) -> str:
    """Draws a manifest's golden samples with the reference backend, publishes it and returns its version."""
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
    config: Mapping[str, Any] | None,
    grid: Grid | None,
) -> Component:
    """The base's denoiser with other weights, checked against the network that the student will have."""
    old = base.components["denoiser"]
    files = {name: sha for name, sha in old.files.items() if name not in _BESIDE}
    if config is not None:
        files["config.json"] = registry.put_blob(json.dumps(config, indent=1).encode())
    components = base.components | {"denoiser": old.model_copy(update={"files": files})}
    shaped = base.model_copy(update={"inputs": inputs, "components": components})
    network = ComponentGraph(spec(shaped, "denoiser", reader(registry, shaped)), Path).module()
    network.load(load_weights(registry, old) if weights is None else weights, fresh=FRESH)
    stored = {name: value.to(_DTYPES[dtype]).contiguous() for name, value in network.state_dict().items()}
    if bad := [name for name, value in stored.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise InvalidManifest(
            f"{len(bad)} weights are not finite in {dtype}, first {bad[0]}: look at the strength of the LoRA, or store "
            "them as bf16 or fp32"
        )
    if adapter is not None:
        (folder,) = plugins.load("engines.families", base.family, "FOLDERS")["denoiser"]  # as diffusers calls it
        named = {f"{folder}.{name}": value.contiguous() for name, value in adapter.items()}
        files[ADAPTER] = registry.put_blob(save(named, {"format": "pt"}))
    if grid is not None:
        grid.check(stored)
        files[SCALES] = registry.put_blob(save({name: scales.contiguous() for name, scales in grid.scales.items()}))
    return Component(weights=registry.put_blob(save(stored)), files=files)


def _by_steps(schedules: Mapping[int, Schedule] | Iterable[Schedule]) -> dict[int, Schedule]:
    if isinstance(schedules, Mapping):
        return dict(schedules)
    return {schedule.steps: schedule for schedule in schedules}


def _dumped(changed: Mapping[str, Any]) -> dict[str, Any]:
    """As `model_dump` writes it, so that the whole is validated again."""
    return StudentManifest.model_construct(**changed).model_dump(include=set(changed), warnings=False)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
