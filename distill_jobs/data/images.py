"""Captioned pictures as training rows: a folder of the operator's or a task's own, as latents of the teacher's VAE.

A folder has the layout of Hugging Face's image folders: pictures, and `metadata.jsonl` with a `file_name` and a `text`
a line. Encoded once for each teacher and content, and found again after a death.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_jobs import folders
from distill_jobs.data.prompts import PromptSource
from distill_jobs.forgetting import Forget, holds, instead
from distill_jobs.tasks import base as tasks
from distill_jobs.tasks.base import Task
from distill_jobs.teachers.diffusers import Teacher
from engines import plugins
from engines.errors import InvalidRequest, NotBuilt
from engines.parts import load_weights, reader
from engines.registry.base import Registry

COUNT = 8192
METADATA = "metadata.jsonl"
_VAES = ("AutoencoderKL", "AutoencoderTiny")
_BATCH = 32
_DRAWN_SEED = 5_000_000  # far from the seeds of evaluations
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Captioned:
    """`digest` names the content; `read(i, j)` gives pictures i..j as uint8 [j - i, H, W, 3] of the asked size."""

    captions: tuple[str, ...]
    digest: str
    read: Callable[[int, int], Pixels]


def captioned(name: str, folder: Path | None, size: tuple[int, int], *, count: int = COUNT, seed: int = 0) -> Captioned:
    """The pictures that a job calls `name`: a task's, or those of a folder below `folder`; `size` is (W, H).

    Raises:
        InvalidRequest: there are none of this name, or a line of the metadata names no readable picture.
    """
    drawn = plugins.names(tasks.PACKAGE)
    if name in drawn:
        return _drawn(tasks.load(name), count, seed, size)
    own = folders.holding(METADATA, folder)
    if folder is None or name not in own:
        known = ", ".join([*drawn, *own])
        hint = "" if folder else "; folders need DISTILLER_DATA_DIR"
        raise InvalidRequest(f"data.images={name!r} is not here: choose from {known}{hint}", param="data.images")
    return _of_folder(folder / name, size)


def relabelled(pictures: Captioned, rules: Sequence[Forget]) -> Captioned:
    """The same without the pictures of what is to be forgotten, whose prompts get others: each picture of a
    replacement is there again under the concept's name. What has no replacement gets any pictures, as prompts do that
    ask for nothing.

    Raises:
        InvalidRequest: every picture is of something to forget.
    """
    captions = pictures.captions
    kept = [i for i, caption in enumerate(captions) if not holds(caption, rules)]
    shown = [(i, captions[i]) for i in kept]
    shown += [(i, rule.renamed(captions[i])) for rule in rules for i in kept if rule.is_instead_in(captions[i])]
    nameless = [caption for caption in captions if holds(caption, rules) and instead(caption, rules) is None]
    shown += zip(cycle(kept), nameless, strict=False)
    if not shown:
        raise InvalidRequest("every caption of data.images names what is to be forgotten", param="data.images")
    said = json.dumps([pictures.digest, *(rule.model_dump() for rule in rules)])

    def read(start: int, end: int) -> Pixels:
        return np.concatenate([pictures.read(i, i + 1) for i, _ in shown[start:end]])

    return Captioned(tuple(caption for _, caption in shown), hashlib.sha256(said.encode()).hexdigest(), read)


def encoded(teacher: Teacher, registry: Registry, pictures: Captioned, cache: Path, *, seed: int = 0) -> PromptSource:
    """Rows of latents [C, h, w] and encoded captions; from `cache` if they were made before.

    Raises:
        NotBuilt: the teacher's VAE is none of those known here.
    """
    blobs = [teacher.manifest.components[role].weights for role in ("encoder", "decoder")]
    asked = json.dumps([*blobs, *teacher.manifest.resolutions[0], pictures.digest]).encode()
    path = cache / f"images-{hashlib.sha256(asked).hexdigest()[:32]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"x": _latents(teacher, registry, pictures), "cond": teacher.encode(pictures.captions)}
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        partial.replace(path)
    kept = load_file(path)
    return PromptSource(pictures.captions, kept["cond"], teacher.shape, seed, x=kept["x"])


@torch.no_grad()
def _latents(teacher: Teacher, registry: Registry, pictures: Captioned) -> Tensor:
    """The means of the VAE's posterior, scaled as the denoiser sees them."""
    vae = _autoencoder(teacher, registry)
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    mean, deviation = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and deviation is not None:
        shift, scale = torch.tensor(mean).view(-1, 1, 1), scale / torch.tensor(deviation).view(-1, 1, 1)
    made = []
    for start in range(0, len(pictures.captions), _BATCH):
        pixels = pictures.read(start, min(start + _BATCH, len(pictures.captions)))
        given = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        out = vae.encode(given)
        mean = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        made.append((mean - shift) * scale)
    found = torch.cat(made)
    if tuple(found.shape[1:]) != teacher.shape:
        raise NotBuilt(f"the VAE gives latents {tuple(found.shape[1:])}, the denoiser reads {teacher.shape}")
    return found


def _autoencoder(teacher: Teacher, registry: Registry) -> Any:
    """The whole VAE, of which serving keeps the decoder: its blob holds both halves."""
    config = json.loads(reader(registry, teacher.manifest)("decoder/config.json"))
    name = config.get("_class_name")
    if name not in _VAES:
        raise NotBuilt(f"pictures cannot be encoded with a {name}: data.images needs {' or '.join(_VAES)}")
    vae = getattr(diffusers, name).from_config(config)
    vae.load_state_dict(
        {key: w.float() for key, w in load_weights(registry, teacher.manifest.components["decoder"]).items()}
    )
    return vae.requires_grad_(False).eval()


def _of_folder(folder: Path, size: tuple[int, int]) -> Captioned:
    content = hashlib.sha256()
    files, captions = [], []
    try:
        lines = (folder / METADATA).read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{METADATA} of {folder.name} is not UTF-8: {error}", param="data.images") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            file, caption = _row(folder, number, line)
            content.update(json.dumps([caption, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
            files.append(file)
            captions.append(caption)
    if not files:
        raise InvalidRequest(f"{METADATA} of {folder.name} names no picture", param="data.images")
    return Captioned(tuple(captions), content.hexdigest(), lambda i, j: np.stack([_open(f, size) for f in files[i:j]]))


def _row(folder: Path, number: int, line: str) -> tuple[Path, str]:
    where = f"{folder.name}/{METADATA} line {number}"
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row["text"]
        if not isinstance(name, str) or not isinstance(caption, str):
            raise TypeError("both are text")
        file = (folder / name).resolve()
    except (ValueError, KeyError, TypeError) as error:
        message = f'{where} is not {{"file_name": …, "text": …}}: {line[:80]}'
        raise InvalidRequest(message, param="data.images") from error
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise InvalidRequest(f"{where}: {name!r} is no file of the folder", param="data.images")
    return file, caption


def _open(file: Path, size: tuple[int, int]) -> Pixels:
    """The middle of a picture at the teacher's size."""
    try:
        with Image.open(file) as picture:
            fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"{file.name} is no picture that can be read: {error}", param="data.images") from error
    return np.asarray(fitted, dtype=np.uint8)


def _drawn(task: Task, count: int, seed: int, size: tuple[int, int]) -> Captioned:
    scenes = task.scenes(count, _DRAWN_SEED + seed, "train")
    side = max(size)

    def read(start: int, end: int) -> Pixels:
        return np.moveaxis(task.draw(scenes[start:end], _DRAWN_SEED + seed + start, side).pixels, 1, -1)

    return Captioned(tuple(scene.caption for scene in scenes), f"{task.name}-{count}-{seed}-{side}", read)
