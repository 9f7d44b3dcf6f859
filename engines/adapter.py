"""A LoRA file, by the names of peft, diffusers or kohya, as what it adds to the weights of a denoiser.

Source: LoRA, arXiv 2106.09685, §4.1: W + (alpha / rank) B A. Files without an alpha mean alpha = rank.
Checked against: diffusers' `load_lora_weights` (tests).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from engines.directory import read_tensors
from engines.errors import GraphMismatch, InvalidManifest, NotBuilt

_PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.(?P<alpha>alpha)"
    r"|\.processor\.(?P<of>to_[qkv]|to_out)_lora\.(?P<processor>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.default)?\.weight"
    r"|\.lora[._](?P<kohya>down|up)\.weight"
    r")"
)
_DOWN = ("A", "down")
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
_TEXT = ("text_encoder", "lora_te")
_PEFT, _CONFIG = "adapter_model.safetensors", "adapter_config.json"  # what peft calls its two files
_METADATA = "lora_adapter_metadata"  # where diffusers writes peft's config
_AGAIN = "save the LoRA again from where it was trained"
_TOLD = 40  # characters of a value
_NOT_BUILT = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")


@dataclass(frozen=True, slots=True)
class Adapter:
    """Layer of the denoiser -> (A [rank, in, ...], B [out, rank, ...]), fp32; all scales are multiplied into B."""

    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({len(a) for a, _ in self.layers.values()}))

    def portable(self) -> dict[str, Tensor]:
        """By peft's names in files."""
        return {f"{layer}.lora_{m}.weight": w for layer, pair in self.layers.items() for m, w in zip("AB", pair)}  # noqa: B905

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` with what the adapter adds to them.

        Raises:
            GraphMismatch: a layer is none of these weights, or is of another shape.
        """
        return merged(weights, self.layers)


def is_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a LoRA, not of a network."""
    return any("lora" in name for name in tensors)


def merged(weights: Mapping[str, Tensor], layers: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """W + B A for each layer; of a convolution B is 1 x 1."""
    out = dict(weights)
    wrong = []
    for layer, (a, b) in layers.items():
        weight = weights[f"{layer}.weight"]
        if (len(b), a[0].numel()) != (len(weight), weight[0].numel()):
            wrong.append(f"{layer} ({len(b)} x {a[0].numel()} instead of {len(weight)} x {weight[0].numel()})")
            continue
        update = b.flatten(1) @ a.flatten(1)
        out[f"{layer}.weight"] = weight + update.reshape(weight.shape).to(weight)
    if wrong:
        raise GraphMismatch(f"{_told(wrong)} of the LoRA are of another shape than in the base: give the base it is of")
    return out


def read(file: Path, weights: Mapping[str, Tensor], scale: float = 1.0) -> Adapter:
    """The LoRA of a safetensors file for a denoiser of these weights, `scale` times as strong.

    Raises:
        InvalidManifest: it is no safetensors file, or has tensors that belong to no LoRA: which, and why.
        GraphMismatch: it has layers that the denoiser has not, or only one of the two matrices of a layer.
        NotBuilt: it changes the text encoder, or is more than a LoRA (DoRA, LoHa, LoKr, rank-stabilised).
    """
    tensors = read_tensors([file])
    config = _metadata(file) or _beside(file)
    if odd := [key for key in _NOT_BUILT if config.get(key)]:
        raise NotBuilt(f"a LoRA with {', '.join(odd)} is not built: merge it with diffusers and import the result")
    if of_text := [name for name in tensors if name.startswith(_TEXT)]:
        raise NotBuilt(
            f"{_told(of_text)} of the LoRA change the text encoder, which every student shares with its base: leave "
            "them out, or merge them with diffusers and import the whole pipeline"
        )
    own = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    by_name = {name: name for name in own} | {name.replace(".", "_"): name for name in own}
    parts: dict[str, dict[str, str]] = {}  # layer -> A, B, alpha -> the tensor's name
    strange: list[str] = []
    for name in tensors:
        found = _PART.fullmatch(name)
        layer = by_name.get(_layer(found)) if found else None
        if found is None or layer is None:
            strange.append(name)
            continue
        part = found["alpha"] or ("A" if (found["processor"] or found["peft"] or found["kohya"]) in _DOWN else "B")
        if (other := parts.setdefault(layer, {}).setdefault(part, name)) != name:
            raise InvalidManifest(
                f"{other} and {name} of the LoRA are of one layer, {layer}: save the LoRA again by one kind of names"
            )
    if strange:
        raise GraphMismatch(
            f"{_told(strange)} of the LoRA belong to no layer of the base: give the base that it was made for, or save "
            "it by diffusers' names with save_lora_weights"
        )
    if halves := sorted(layer for layer, part in parts.items() if not {"A", "B"} <= part.keys()):
        raise GraphMismatch(f"{_told(halves)} of the LoRA have one matrix of two: the file is not whole")
    return Adapter({layer: _scaled(tensors, part, config, scale) for layer, part in sorted(parts.items())})


def _scaled(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], config: Mapping[str, Any], scale: float
) -> tuple[Tensor, Tensor]:
    """
    Raises:
        InvalidManifest: they are no two matrices of one rank, or their alpha is no number.
    """
    for part in "AB":
        if tensors[names[part]].dim() < 2 or not tensors[names[part]].numel():
            shape = tuple(tensors[names[part]].shape)
            raise InvalidManifest(f"{names[part]} of the LoRA has shape {shape} and should be a matrix: {_AGAIN}")
    a, b = (tensors[names[part]].float() for part in "AB")
    rank, other = len(a), b[0].numel()
    if rank != other:
        raise InvalidManifest(f"{names['A']} of the LoRA is of rank {rank} and {names['B']} of {other}: {_AGAIN}")
    return a, scale * _alpha(tensors, names, config, rank) / rank * b


def _alpha(tensors: Mapping[str, Tensor], names: Mapping[str, str], config: Mapping[str, Any], rank: int) -> float:
    if "alpha" not in names:
        name, alpha = "lora_alpha", config.get("lora_alpha", rank)
    else:
        name, stored = names["alpha"], tensors[names["alpha"]]
        alpha = stored.item() if stored.numel() == 1 else stored.flatten()[:4].tolist()
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InvalidManifest(f"{name} of the LoRA is {_short(alpha)} and should be one finite number: {_AGAIN}")
    return alpha


def _short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= _TOLD else f"{told[:_TOLD]} …"


def _layer(found: re.Match[str]) -> str:
    """As the base may call it: without the names of the network around it."""
    layer = found["layer"]
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    if found["of"]:
        layer = f"{layer}.{found['of']}" + (".0" if found["of"] == "to_out" else "")
    return layer


def _metadata(file: Path) -> dict[str, Any]:
    """peft's config, without the name of the network before each key."""
    with safe_open(file, framework="pt") as opened:
        raw = (opened.metadata() or {}).get(_METADATA, "{}")
    try:
        return {key.rpartition(".")[2]: value for key, value in json.loads(raw).items()}
    except (ValueError, AttributeError):
        return {}


def _beside(file: Path) -> dict[str, Any]:
    """peft's config, where peft itself writes it.

    Raises:
        InvalidManifest: it is no JSON object.
    """
    path = file.with_name(_CONFIG)
    if file.name != _PEFT or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InvalidManifest(f"{path} is no JSON object, and it says how strong the LoRA beside it is") from error


def _told(names: list[str]) -> str:
    """The first names, and how many there are."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
