"""A diffusers directory on this machine: its family, its configs and the safetensors files of its components.

Nothing in it is trusted: nothing is unpickled, and files that it names are looked for beside the one that names them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from engines import plugins
from engines.errors import InvalidManifest, NotBuilt
from engines.families.base import ReadFile
from engines.manifest import Component
from engines.registry.base import Registry

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def component(directory: Path, role: str, folders: Sequence[str], registry: Registry) -> Component:
    files = {_inside(folders, folder, "config.json"): directory / folder / "config.json" for folder in folders}
    if role == "encoder":
        tokenizers = [file for file in sorted(directory.glob("tokenizer*/*")) if file.is_file()]
        files |= {f"{file.parent.name}/{file.name}": file for file in tokenizers}
    return Component(
        weights=registry.put_blob(_joined({folder: weight_files(directory / folder) for folder in folders})),
        files={name: registry.put_blob(path) for name, path in files.items()},
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: one, or all shards that its index names.

    Raises:
        InvalidManifest: there is none, or it is not clear which; files that have to be unpickled are none.
    """
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        names = {Path(str(name)).name for name in read_json(indices[0])["weight_map"].values()}
        return [folder / name for name in sorted(names)]
    found = sorted(folder.glob("*.safetensors"))
    plain = [path for path in found if ".fp16." not in path.name] or found
    if len(plain) != 1:
        pickled = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLED]
        why = f"; {pickled[0]} would have to be unpickled, which can run any code" if pickled and not plain else ""
        raise InvalidManifest(f"{folder} has {len(plain)} safetensors files and no index: one is needed{why}")
    return plain


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files.

    Raises:
        InvalidManifest: one is no such file.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix in PICKLED:
            raise InvalidManifest(
                f"{file.name} would have to be unpickled, which can run any code: save it as safetensors first"
            )
        if not file.is_file():
            raise InvalidManifest(f"{file.parent} lacks {file.name}")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise InvalidManifest(f"{file} is no safetensors file: {error}") from error
    return tensors


def _joined(weights: Mapping[str, Sequence[Path]]) -> Path | bytes:
    """One file as it is; of several folders or shards, all tensors under `<folder>.<name>` or their own names."""
    first, *others = weights.values()
    if not others and len(first) == 1:
        return first[0]
    merged = {
        f"{folder}.{name}" if others else name: tensor
        for folder, files in weights.items()
        for name, tensor in read_tensors(files).items()
    }
    blob: bytes = save(merged)
    return blob


def family_of(pipeline: str) -> str:
    known = {plugins.load("engines.families", name, "PIPELINE"): name for name in plugins.names("engines.families")}
    if pipeline not in known:
        raise NotBuilt(f"no file of engines/families is for {pipeline}: there are {', '.join(sorted(known))}; add one")
    return known[pipeline]


def reads_configs(directory: Path, folders: Mapping[str, Sequence[str]]) -> ReadFile:
    """Reads a directory's configs by the names that they will have in a student."""
    found = {
        f"{role}/{_inside(names, folder, 'config.json')}": directory / folder / "config.json"
        for role, names in folders.items()
        for folder in names
    }

    def read(name: str) -> bytes:
        return json.dumps(read_json(found[name])).encode()

    return read


def _inside(folders: Sequence[str], folder: str, name: str) -> str:
    """A file or weight of one of a component's folders as the component names it."""
    return name if len(folders) == 1 else f"{folder}/{name}"


def refuse_more(index: Mapping[str, Any], known: Sequence[str]) -> None:
    """A pipeline with a second denoiser for some of its times, as Wan 2.2 has, is not its first one alone; and SDXL may
    be guided away from the empty prompt's own encoding, where its family here has zeros."""
    if index.get("force_zeros_for_empty_prompt") is False:
        raise NotBuilt(f"{index['_class_name']} with force_zeros_for_empty_prompt=false is not built: set it to true")
    more = [
        name
        for name, loaded in index.items()
        if name.startswith(("transformer", "unet")) and isinstance(loaded, list) and loaded[0] and name not in known
    ]
    if more:
        raise NotBuilt(
            f"{index['_class_name']} has further denoisers ({', '.join(more)}): only a pipeline of one is imported yet"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidManifest(f"{path} cannot be read: {error}; give a diffusers directory") from error
    return read
