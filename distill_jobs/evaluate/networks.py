"""Feature networks of the operator's, such as DINOv2: vision models of transformers out of local directories.

A directory is what `save_pretrained` writes: the model's config, its weights as safetensors (nothing is unpickled) and
`preprocessor_config.json`, which says how pictures are resized and normalised. Features are the pooled output: the CLS
token of DINOv2 and CLIP, the mean over places of a ResNet.

Source: arXiv 2306.04675, section 3 (Fréchet distances in DINOv2 agree with people better than Inception's).
Left out: Inception. The network of FID proper exists as a pickled TorchScript file only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_jobs import folders
from distill_jobs.evaluate.features import Floats
from distill_jobs.evaluate.pixels import Pixels, levels
from engines.errors import InvalidRequest

PARAM = "eval.networks"
_CONFIG, _PREPROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "*.safetensors"
_INDEX, _ADAPTER = "*.index.json", "adapter_config.json"
_BATCH = 32
_TRIED = 64  # pixels a side of the picture that a network is tried on


@dataclass(frozen=True, slots=True)
class DirectoryNetwork:
    """A loaded network. `digest` names its files: figures of two digests must not be compared."""

    name: str
    digest: str
    model: Any
    processor: Any

    @torch.no_grad()
    def observe(self, pixels: Pixels, check: Callable[[], None] = lambda: None) -> Floats:
        """Features [N, D] of pictures [N, 3, H, W], rounded to 8-bit levels first; `check` is called before
        each batch."""
        found = []
        for start in range(0, len(pixels), _BATCH):
            check()
            rows = list(levels(pixels[start : start + _BATCH]))
            given = self.processor(images=rows, input_data_format="channels_first", return_tensors="pt")
            found.append(self.model(given["pixel_values"]).pooler_output.flatten(1))
        return np.asarray(torch.cat(found).float().numpy())


def folder_of(name: str, folder: Path | None) -> Path:
    """The directory that a job calls `name`: one below `folder`, the distiller's data.

    Raises:
        InvalidRequest: there is none of this name, or it lacks weights as safetensors or a preprocessor's config.
    """
    known = folders.holding(_CONFIG, folder)
    if folder is None or name not in known:
        hint = f"choose from {', '.join(known)}" if known else "directories with a network need DISTILLER_DATA_DIR"
        raise InvalidRequest(f"{PARAM} names {name!r}, which is not here: {hint}", param=PARAM)
    for needed in (_WEIGHTS, _PREPROCESSOR):
        if not any((folder / name).glob(needed)):
            raise InvalidRequest(f"the network {name!r} has no {needed}: save it with `save_pretrained`", param=PARAM)
    return folder / name


def load(name: str, folder: Path | None) -> DirectoryNetwork:
    """The network that a job calls `name`, in fp32.

    Raises:
        InvalidRequest: as `folder_of`, or the directory holds no vision model with a pooled output, or not all of it.
    """
    from transformers import AutoImageProcessor, AutoModel

    found = folder_of(name, folder)
    _refuse_other_weights(name, found)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        whole, said = AutoModel.from_pretrained(
            found, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
        processor = AutoImageProcessor.from_pretrained(found, backend="pil", **local)
    except Exception as error:  # of a damaged directory it may be any: a header, a shape, a missing package
        raise InvalidRequest(f"the network {name!r} cannot be loaded: {error}", param=PARAM) from error
    model = getattr(whole, "vision_model", whole)  # of CLIP's pair the half that sees
    if model.main_input_name != "pixel_values":
        raise InvalidRequest(f"the network {name!r} is a {type(whole).__name__}, which sees no pictures", param=PARAM)
    if lacking := sorted(said["missing_keys"]):
        message = f"the network {name!r} lacks {len(lacking)} weights, first {lacking[0]}: save the whole model"
        raise InvalidRequest(message, param=PARAM)
    network = DirectoryNetwork(name, _digest(found), model.requires_grad_(False).eval(), processor)
    try:
        seen = network.observe(np.zeros((1, 3, _TRIED, _TRIED), np.uint8))
    except Exception as error:  # of no pooled output, or a picture prepared as the model does not take it
        raise InvalidRequest(f"the network {name!r} gives no features: {error}", param=PARAM) from error
    if not np.isfinite(seen).all():
        raise InvalidRequest(f"the network {name!r} gives features that are no numbers", param=PARAM)
    return network


def _refuse_other_weights(name: str, folder: Path) -> None:
    """The digest names the directory's own safetensors: transformers would follow an index to pickled shards and an
    adapter to another directory."""
    own = {path.name for path in folder.glob(_WEIGHTS)}
    try:
        named = [json.loads(index.read_bytes())["weight_map"].values() for index in folder.glob(_INDEX)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidRequest(f"the network {name!r} has an index that cannot be read: {error}", param=PARAM) from error
    others = sorted({str(file) for files in named for file in files} - own)
    others += [path.name for path in folder.glob(_ADAPTER)]
    if others:
        message = f"the network {name!r} has weights in {others[0]}: save the whole model with `save_pretrained`"
        raise InvalidRequest(message, param=PARAM)


def _digest(folder: Path) -> str:
    content = hashlib.sha256()
    for path in [folder / _CONFIG, folder / _PREPROCESSOR, *sorted(folder.glob(_WEIGHTS))]:
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()
