"""A diffusers directory on this machine: its family, its configs and the safetensors files of its components.

Nothing in it is trusted: nothing is unpickled, files that it names are looked for beside the one that names them, and
what is published as it stands is weights, or a file of the directory itself and not what a link in it leads to.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from engines import plugins
from engines.errors import InvalidManifest, NotBuilt
from engines.families.base import ReadFile
from engines.manifest import Component
from engines.registry.base import Registry

log = logging.getLogger(__name__)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""What transformers' tokenizers of text read; Gemma's `tokenizer.json` is the largest known, 33 MB."""
_MAX_FILE_BYTES = 64 * 2**20


def component(directory: Path, role: str, folders: Sequence[str], registry: Registry) -> Component:
    """Publishes the blobs of one component; the encoder's has the tokenizers too.

    Raises:
        InvalidManifest: files that are missing, too large, or elsewhere.
    """
    files = {_inside(folders, folder, "config.json"): directory / folder / "config.json" for folder in folders}
    if role == "encoder":
        files |= _tokenizer_files(directory)
    own = {name: _own(directory, path) for name, path in files.items()}
    return Component(
        weights=registry.put_blob(_joined({folder: weight_files(directory / folder) for folder in folders})),
        files={name: registry.put_blob(path) for name, path in own.items()},
    )


def _tokenizer_files(directory: Path) -> dict[str, Path]:
    """`<folder>/<file>` -> where it is. What no tokenizer reads is left out, and said."""
    found = sorted(directory.glob("tokenizer*/*"))
    if rest := [f"{path.parent.name}/{path.name}" for path in found if path.name not in _TOKENIZER]:
        log.warning("not published, for no tokenizer reads it: %s", ", ".join(rest))
    return {f"{path.parent.name}/{path.name}": path for path in found if path.name in _TOKENIZER}


def _own(directory: Path, path: Path) -> Path:
    """The file at `path`: in the directory or, if that is a snapshot in the cache of huggingface_hub, in its `blobs`.

    Raises:
        InvalidManifest: it is a link that leads elsewhere, or no file of at most `_MAX_FILE_BYTES`.
    """
    target, root = path.resolve(), directory.resolve()
    roots = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    if not any(target.is_relative_to(each) for each in roots):
        raise InvalidManifest(
            f"{path} leads to {target}, which is not in {directory} and would be published: put a copy there, or "
            "leave it out"
        )
    if not target.is_file():
        raise InvalidManifest(f"{path} is no regular file: give a diffusers directory")
    if target.stat().st_size > _MAX_FILE_BYTES:
        raise InvalidManifest(f"{path} has more than {_MAX_FILE_BYTES // 2**20} MiB: neither configs nor tokenizers do")
    return target


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: one, or all shards that its index names.

    Raises:
        InvalidManifest: there is none, or it is not clear which; files that have to be unpickled are none.
    """
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InvalidManifest(f"{indices[0]} has no weight_map: fetch the directory anew")
        names = {Path(str(name)).name for name in weight_map.values()}
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
        _check_tensors(file)
        tensors |= load_file(file)
    return tensors


def _check_tensors(file: Path) -> None:
    if file.suffix in PICKLED:
        raise InvalidManifest(
            f"{file.name} would have to be unpickled, which can run any code: save it as safetensors first"
        )
    if not file.is_file():
        raise InvalidManifest(f"{file.parent} lacks {file.name}")
    try:
        with safe_open(file, framework="pt"):  # reads no more than the header, which says how long the file is
            pass
    except SafetensorError as error:
        raise InvalidManifest(f"{file} is no safetensors file: {error}") from error


def _joined(weights: Mapping[str, Sequence[Path]]) -> Path | bytes:
    """One file as it is; of several folders or shards, all tensors under `<folder>.<name>` or their own names."""
    first, *others = weights.values()
    if not others and len(first) == 1:
        _check_tensors(first[0])
        return first[0]
    merged = {
        f"{folder}.{name}" if others else name: tensor
        for folder, files in weights.items()
        for name, tensor in read_tensors(files).items()
    }
    blob: bytes = save(merged)
    return blob


def family_of(pipeline: str) -> str:
    """One that inpaints is of the family of the pipeline without."""
    known = {plugins.load("engines.families", name, "PIPELINE"): name for name in plugins.names("engines.families")}
    plain = pipeline.replace("InpaintPipeline", "Pipeline")
    if plain not in known:
        raise NotBuilt(f"no file of engines/families is for {pipeline}: there are {', '.join(sorted(known))}; add one")
    return known[plain]


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
        read = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidManifest(f"{path} cannot be read: {error}; give a diffusers directory") from error
    if not isinstance(read, dict):
        raise InvalidManifest(f"{path} is no JSON object: give a diffusers directory")
    return read
