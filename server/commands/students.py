"""`fewstep students …`: what can serve; a student as a diffusers directory, and whether its forms agree."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from engines.errors import GoldenMismatch, InvalidRequest, NotBuilt
from engines.manifest import shown
from engines.registry.base import open_registry
from server.commands.terminal import DEFAULT_URL, Key, Url, connected, out
from server.settings import WorkerSettings

if TYPE_CHECKING:
    from engines.backends.base import Precision
    from engines.verify import Verification

app = typer.Typer(
    invoke_without_command=True, help="List the students; import or export one, or check that its forms agree."
)
Version = Annotated[str, typer.Argument(help="name@ and at least 12 digits, as `fewstep students` shows it.")]
RegistryUrl = Annotated[
    str,
    typer.Option(envvar="FEWSTEP_REGISTRY_URL", help="A folder, such as that of `fewstep up`, or an fsspec URL."),
]
DEFAULT_REGISTRY = ".fewstep/registry"
_BATCHES = list(WorkerSettings.model_fields["batch_sizes"].default)


@app.callback()
def students(context: typer.Context, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """List every student in the registry, teachers included."""
    if context.invoked_subcommand is not None:
        return
    table = Table("version", "kind", "steps", "made from")
    with connected(url, api_key) as client:
        for student in client.get("/v1/students")["data"]:
            steps = ", ".join(str(count) for count in student["steps"])
            table.add_row(shown(student["version"]), student["kind"], steps, shown(student.get("base") or ""))
    out.print(table)


@app.command()
def export(
    version: Version,
    directory: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    registry_url: RegistryUrl = DEFAULT_REGISTRY,
    lora: Annotated[bool, typer.Option("--lora", help="Only its LoRA, for load_lora_weights on its base.")] = False,
) -> None:
    """Write a student as a directory for diffusers' from_pretrained.

    Example: fewstep students export shapes-fast@3f2a91c0de11 shapes-fast
    """
    from engines.artefact import export_lora
    from engines.export import SAMPLING, export_pipeline

    known(registry_url)
    if directory.exists():
        raise NotBuilt(f"{directory} exists: name a folder that is not there yet")
    if lora:
        written = export_lora(open_registry(registry_url), version, directory)
        out.print(f"{written}: load it on the student's base, and sample as its manifest says", highlight=False)
        return
    export_pipeline(open_registry(registry_url), version, directory)
    out.print(f"{directory}: call the pipeline with what {SAMPLING} says of each step count", highlight=False)


@app.command()
def verify(
    version: Version,
    registry_url: RegistryUrl = DEFAULT_REGISTRY,
    directory: Annotated[Path | None, typer.Option(help="An export to check; one is made if missing.")] = None,
    backend: Annotated[str, typer.Option(help="The compiled engine to check; auto is what a worker takes.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto.")] = "auto",
) -> None:
    """Compare a student's pictures by diffusers and by the compiled engine with the reference, on the same noise."""
    from diffusers.utils import logging

    known(registry_url)
    from engines.backends.base import choose
    from engines.verify import verify as compared

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        choice = choose(backend, precision)
        found = compared(open_registry(registry_url), version, choice=choice, cache=Path(cache), directory=directory)
    out.print(table(found))
    if found.missing:
        out.print(f"Not compared with diffusers: {found.missing}", highlight=False)
    if not found.passed:
        raise GoldenMismatch(f"{version}: a form of it makes other pictures; do not publish or ship it")


@app.command()
def plans(
    version: Version,
    targets: Annotated[
        list[str], typer.Option("--target", help="A GPU's compute capability, such as SM89; repeat it.")
    ],
    registry_url: RegistryUrl = DEFAULT_REGISTRY,
    cache_dir: Annotated[Path, typer.Option(help="The engine cache of the workers.")] = Path(".fewstep/engines"),
    batch_sizes: Annotated[list[int], typer.Option("--batch-size", help="As WORKER_BATCH_SIZES.")] = _BATCHES,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp8.")] = "bf16",
) -> None:
    """Build a student's TensorRT plans for GPUs that are not here; a worker with the same WORKER_TARGETS finds them.

    Example: fewstep students plans shapes-fast@3f2a91c0de11 --target SM89 --target SM120
    """
    known(registry_url)
    from engines.ahead import build_ahead
    from engines.backends.base import Profile, tolerance
    from engines.cache import DiskCache
    from engines.graph import GraphStore

    tolerance("tensorrt", precision)
    profile = Profile(tuple(sorted(batch_sizes)), cast("Precision", precision), targets=tuple(targets))
    made = build_ahead(open_registry(registry_url), version, profile, GraphStore(DiskCache(cache_dir)))
    for role, folder in made.items():
        out.print(f"{role}: {folder}", highlight=False, soft_wrap=True)


def known(registry_url: str) -> None:
    """Refuses a folder that is not there: opening it would make an empty registry in the wrong place."""
    if "://" not in registry_url and not Path(registry_url).is_dir():
        message = f"there is no registry at {registry_url}: name one with --registry-url, such as that of `fewstep up`"
        raise InvalidRequest(message, param="registry_url")


def table(found: "Verification") -> Table:
    """What `verify` and `import` print of each form and step count."""
    made = Table("form", "steps", "worst level", "mean level", "PSNR dB", "against eager fp32")
    for one in found.comparisons:
        numbers = (str(one.worst_levels), f"{one.mean_levels:.4f}", f"{one.psnr_db:.1f}")
        made.add_row(one.form, str(one.steps), *numbers, one.fault or "agrees")
    return made
