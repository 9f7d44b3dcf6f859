"""A student as a directory that diffusers loads whole: component folders, index, scheduler, and how to call it."""

import json
from pathlib import Path
from typing import Any

from engines import plugins, scheduler
from engines.artefact import export_diffusers
from engines.errors import NotBuilt
from engines.families.sd import INPAINTING, latent_channels
from engines.registry.base import Registry

SAMPLING = "sampling.json"
_FAMILIES = ("sd",)  # whose pipelines are known to make our pictures with `scheduler`'s configs


def export_pipeline(registry: Registry, version: str, directory: Path) -> None:
    """Writes a student for diffusers' `from_pretrained`, with the scheduler of its largest step count.

    `sampling.json` says what to call the pipeline with at each count: sigmas, guidance scale, scheduler config.

    Raises:
        NotBuilt: its network reads inputs that diffusers' own has not, its family has no export of pipelines yet, or
            no scheduler of diffusers samples it.
    """
    manifest = registry.student(version)
    if manifest.family not in _FAMILIES:
        raise NotBuilt(f"pipelines of the family {manifest.family} are not exported yet, only those of {_FAMILIES}")
    sampled = scheduler.samplings(manifest)
    export_diffusers(registry, version, directory)
    index: dict[str, Any] = dict(plugins.load("engines.families", manifest.family, "INDEX"))
    vae = json.loads((directory / "vae" / "config.json").read_bytes())
    unet = json.loads((directory / "unet" / "config.json").read_bytes())
    if latent_channels(unet) != unet["in_channels"]:
        index["_class_name"] = INPAINTING
    index |= {"scheduler": ["diffusers", scheduler.SCHEDULER], "vae": ["diffusers", vae["_class_name"]]}
    _write(directory / "model_index.json", index)
    _write(directory / "scheduler" / "scheduler_config.json", sampled[max(sampled)].config)
    _write(directory / SAMPLING, {str(steps): one.as_dict() for steps, one in sampled.items()})


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
