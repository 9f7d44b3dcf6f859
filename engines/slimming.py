"""Networks with some of their layers left out: the config of the smaller one, and which weights it keeps.

A UNet loses the last layers of its down blocks, the layers before the last of its up blocks (whose ends join the skip
connections and must stay) and, if asked, its middle: the cuts of BK-SDM (arXiv 2305.15798 §3.1) and KOALA (2312.04005
§3). A transformer keeps blocks at equal distances, the first and the last among them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import InvalidRequest

_LAYERS = "student.slim.layers"
Rename = Callable[[str], str | None]
_UNET_LAYER = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)\.")
_BLOCK = re.compile(r"((?:transformer_)?blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Slimmed:
    """`config` is the smaller network's; `rename` gives a weight's name there, or None where it is left out."""

    config: dict[str, Any]
    rename: Rename


def slimmed(config: Mapping[str, Any], layers: int | None = None, middle: bool = True) -> Slimmed:
    """The network of a diffusers config with `layers` layers per block (or blocks, of a transformer).

    Raises:
        InvalidRequest: the network has not so many layers, or no middle, or is of no known shape.
    """
    config = {key: value for key, value in config.items() if key != "_use_default_values"}  # diffusers would drop ours
    if "down_block_types" in config:
        return _unet(config, layers, middle)
    if "num_layers" in config:
        return _transformer(config, layers, middle)
    raise InvalidRequest(f"a {config.get('_class_name')} cannot be slimmed here", param="student.slim")


def _unet(config: Mapping[str, Any], layers: int | None, middle: bool) -> Slimmed:
    each = config["layers_per_block"]
    if not isinstance(each, int):
        raise InvalidRequest("blocks of this UNet have different numbers of layers", param="student.slim")
    kept = _checked(layers, each)
    changed = dict(config) | {"layers_per_block": kept}
    if not middle:
        if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None:
            raise InvalidRequest("this UNet has no middle to leave out", param="student.slim.middle")
        changed["mid_block_type"] = None

    def rename(name: str) -> str | None:
        if not middle and name.startswith("mid_block."):
            return None
        found = _UNET_LAYER.match(name)
        if found is None:
            return name
        side, block, part, at = found[1], found[2], found[3], int(found[4])
        if side == "up_blocks" and at == each:
            at = kept  # the last one: an up block has a layer more than a down block
        elif at >= kept:
            return None
        return f"{side}.{block}.{part}.{at}.{name[found.end() :]}"

    return Slimmed(changed, rename)


def _transformer(config: Mapping[str, Any], layers: int | None, middle: bool) -> Slimmed:
    if not middle:
        raise InvalidRequest("a transformer has no middle block: say layers", param="student.slim.middle")
    if config.get("dual_attention_layers"):
        raise InvalidRequest("blocks of this transformer differ (dual_attention_layers)", param="student.slim")
    blocks = int(config["num_layers"])
    kept = _checked(layers, blocks)
    if kept < 2:
        raise InvalidRequest("a transformer keeps its first and its last block: say 2 layers or more", param=_LAYERS)
    chosen = [round(i * (blocks - 1) / (kept - 1)) for i in range(kept)]

    def rename(name: str) -> str | None:
        found = _BLOCK.match(name)
        if found is None:
            return name
        if (at := int(found[2])) not in chosen:
            return None
        return f"{found[1]}.{chosen.index(at)}.{name[found.end() :]}"

    return Slimmed(dict(config) | {"num_layers": kept}, rename)


def _checked(layers: int | None, there: int) -> int:
    if layers is not None and not 1 <= layers <= there:
        raise InvalidRequest(f"student.slim.layers={layers}: the teacher has {there}", param=_LAYERS)
    return there if layers is None else layers
