"""Makes a student out of a checkpoint or a LoRA that somebody else distilled, with the schedule that it was made for.

What a file does not say is asked for: a network knows neither its times nor its noise share, and sampled otherwise it
makes other pictures. A recipe (`engines.recipes`) knows them for the kinds that people have.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engines import adapter, plugins
from engines.artefact import ADAPTER, GOLDEN_PROMPTS, describe, make_student, prompts_of, publish
from engines.backends.base import check_weights
from engines.contract import Contract, Sampling, contract
from engines.directory import family_of, read_json, read_tensors, weight_files
from engines.errors import InvalidManifest, InvalidRequest, NotBuilt
from engines.graph import spec
from engines.manifest import Guidance, Schedule, StudentManifest, shown
from engines.parts import load_weights, reader
from engines.registry.base import Registry

_OWN_GUIDANCE = ("time_cond_proj_dim", "guidance_embeds")  # of a network's config: it reads the weight itself
_INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class Imported:
    """`files` are the sha256 of what was read, by name; `ranks` those of a LoRA."""

    version: str
    source: Literal["pipeline", "denoiser", "lora"]
    files: Mapping[str, str]
    ranks: tuple[int, ...] = ()
    layers: int = 0


def import_student(
    registry: Registry,
    source: Path,
    name: str,
    *,
    sampling: Sampling,
    base: str | Path | None = None,
    strength: float = 1.0,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16",
    licence: str | None = None,
    golden_prompts: Sequence[str] = (),
    num_frames: int | None = None,
) -> Imported:
    """Publishes the student that `source` is: a diffusers directory, the folder or safetensors file of a denoiser, or a
    LoRA, which is merged `strength` times.

    `base` is a version of the registry or a diffusers directory. A denoiser and a LoRA need one; of a whole directory
    it is what it was distilled from, and its denoiser is compared with that one's. `num_frames` is the length of the
    videos of a directory and 1 for pictures; left out, it is that of a version as base, else the pipeline's.

    Raises:
        InvalidRequest: the schedule is missing or contradicts itself, or a base is needed.
        InvalidManifest: no such files, or a schedule that the solver cannot do.
        GraphMismatch: the weights are not those of the base's network: the first names.
        NotBuilt: a family, a LoRA or a base that is not built.
    """
    if not source.exists():
        raise InvalidManifest(
            f"{source} is not there: give a diffusers directory, a denoiser's folder or a LoRA's file"
        )
    if source.is_dir() and (source / _INDEX).exists():
        return _pipeline(registry, source, name, sampling, base, licence, golden_prompts, num_frames)
    files = _files(source)
    tensors = read_tensors(files)
    if base is None:
        what = "a LoRA" if adapter.is_adapter(tensors) else "a denoiser"
        raise InvalidRequest(f"{source.name} is {what}, which is no whole pipeline: give its --base", param="base")
    origin = _base(registry, base, num_frames)
    known: dict[str, Any] = {"dtype": dtype, "licence": licence, "golden_prompts": golden_prompts or None}
    if not adapter.is_adapter(tensors):
        return _denoiser(registry, origin, base, files, tensors, name, sampling, known)
    if len(files) > 1:
        raise InvalidManifest(f"{source} has {len(files)} files: give the LoRA's own")
    made = contract(sampling, origin, origin.inputs)
    weights = {key: value.float() for key, value in load_weights(registry, origin.components["denoiser"]).items()}
    lora = adapter.read(files[0], weights, strength)
    version = make_student(
        registry,
        origin if isinstance(base, Path) else origin.version,
        name,
        denoiser_weights=lora.merged(weights),
        adapter=lora.portable(),
        **_asked(made),
        **known,
    )
    return Imported(version, "lora", _hashes(files), lora.ranks, len(lora.layers))


def _base(registry: Registry, base: str | Path, num_frames: int | None) -> StudentManifest:
    """The base as a version, or as a directory that is only described."""
    if isinstance(base, str):
        found = registry.student(base)
        if found.experts or found.points > 1 or "s" in found.inputs:
            raise NotBuilt(f"{shown(found.version)} is no plain network: give the teacher that it was made from")
        if num_frames not in (None, found.frames.number if found.frames else 1):
            raise InvalidRequest(
                f"num_frames={num_frames}: a student has as many as its base, {shown(found.version)}: leave it out",
                param="num_frames",
            )
        return found
    return _described(registry, base, "base", num_frames)


def _described(
    registry: Registry, directory: Path, name: str, num_frames: int | None, licence: str | None = None
) -> StudentManifest:
    """A directory with the schedule of a single step, which says nothing yet."""
    index = read_json(directory / _INDEX)
    folders = plugins.load("engines.families", family_of(str(index.get("_class_name"))), "FOLDERS")
    config = read_json(directory / folders["denoiser"][0] / "config.json")
    weighs = any(config.get(key) for key in _OWN_GUIDANCE)
    return describe(
        directory,
        registry,
        name=name,
        kind="full",
        schedules=[Schedule(times=(1.0, 0.0))],
        solver="ddim",
        inputs=("w",) if weighs else (),
        guidance=Guidance(mode="embedded") if weighs else Guidance(),
        num_frames=num_frames,
        licence=licence or "unknown",
    )


def _pipeline(
    registry: Registry,
    source: Path,
    name: str,
    sampling: Sampling,
    base: str | Path | None,
    licence: str | None,
    prompts: Sequence[str],
    num_frames: int | None,
) -> Imported:
    """A whole directory: its own encoder and decoder, which need not be those of the base."""
    origin = None if base is None else _base(registry, base, num_frames)
    if num_frames is None and isinstance(base, str) and origin is not None:
        num_frames = origin.frames.number if origin.frames else 1
    own = _described(registry, source, name, num_frames, licence or (origin.licence if origin else None))
    files = sorted(source.glob("*/*.safetensors"))
    weights = load_weights(registry, own.components["denoiser"])
    named: str | None = None
    if origin is not None:
        if own.family != origin.family:
            raise InvalidRequest(f"{source.name} is of family {own.family}, its base of {origin.family}", param="base")
        _check(registry, origin, weights)
        named = origin.version if isinstance(base, str) else None
    made = contract(sampling, own, own.inputs)
    changed = _asked(made) | {"base": named, "parents": (named,) if named else (), "task": origin and origin.task}
    whole = StudentManifest.model_validate(own.model_dump() | changed)
    told = tuple(prompts) or (prompts_of(registry, origin) if origin else GOLDEN_PROMPTS)
    return Imported(publish(registry, whole, told), "pipeline", _hashes(files))


def _denoiser(
    registry: Registry,
    origin: StudentManifest,
    base: str | Path,
    files: Sequence[Path],
    tensors: Mapping[str, Tensor],
    name: str,
    sampling: Sampling,
    known: Mapping[str, Any],
) -> Imported:
    """Full weights for the base's network, which may read a guidance weight where the base does not."""
    config, inputs = _check(registry, origin, tensors)
    made = contract(sampling, origin, inputs)
    version = make_student(
        registry,
        origin if isinstance(base, Path) else origin.version,
        name,
        denoiser_weights=tensors,
        denoiser_config=config,
        **_asked(made),
        **known,
    )
    return Imported(version, "denoiser", _hashes(files))


def _check(
    registry: Registry, origin: StudentManifest, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any] | None, frozenset[Literal["s", "w"]]]:
    """The base's config as these weights need it (None: as it is), and what their network reads.

    Raises:
        GraphMismatch: they are of another network than the base's.
    """
    read = reader(registry, origin)
    config: dict[str, Any] = json.loads(read("denoiser/config.json"))
    inputs: frozenset[Literal["s", "w"]] = origin.inputs
    width = weights.get("time_embedding.cond_proj.weight")
    changed = None
    if width is not None and not config.get("time_cond_proj_dim"):
        changed, inputs = config | {"time_cond_proj_dim": width.shape[1]}, frozenset({"w"})
    elif not any(config.get(key) for key in _OWN_GUIDANCE):
        inputs = frozenset()

    def given(file: str) -> bytes:
        return json.dumps(changed).encode() if changed and file == "denoiser/config.json" else read(file)

    with torch.device("meta"):  # for its names and shapes alone
        network = spec(origin.model_copy(update={"inputs": inputs}), "denoiser", given).network()
    check_weights({key: tuple(value.shape) for key, value in network.state_dict().items()}, network.select(weights))
    return changed, inputs


def _asked(made: Contract) -> dict[str, Any]:
    return {
        "schedules": dict(made.schedules),
        "solver": made.solver,
        "prediction": made.prediction,
        "guidance": made.guidance,
        "inputs": made.inputs,
    }


def _files(source: Path) -> list[Path]:
    """The safetensors files of a denoiser or a LoRA; of a folder that exports a LoRA, that one."""
    if source.is_file():
        return [source]
    return [source / ADAPTER] if (source / ADAPTER).exists() else weight_files(source)


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    found = {}
    for file in files:
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found
