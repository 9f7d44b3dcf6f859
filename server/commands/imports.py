"""`fewstep students import`: what somebody distilled elsewhere becomes a student like any other.

Judging needs the half that distils, so this is one of the places where the two are put together.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engines.errors import GoldenMismatch, InvalidRequest
from engines.manifest import shown
from engines.registry.base import Registry, open_registry
from server.commands.students import DEFAULT_REGISTRY, RegistryUrl, known, table
from server.commands.terminal import out

if TYPE_CHECKING:
    from engines.backends.base import Choice
    from engines.imports import Imported
    from engines.verify import Verification

_SCHEDULE, _GUIDANCE, _CHECKS = "How it is sampled", "Guidance", "How it is checked"


def import_(
    source: Annotated[
        Path, typer.Argument(help="A diffusers directory, a denoiser's folder or safetensors file, or a LoRA's.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="What it was made from: a version of the registry or a diffusers directory."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The student's name; the file's if left out.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="lcm, lightning, turbo or hyper-sd: its usual times, noise and prediction.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="Step counts it was made for, such as 4 or 1,2,4.", rich_help_panel=_SCHEDULE)
    ] = "",
    times: Annotated[
        list[str] | None,
        typer.Option(
            help="Times of one count: diffusers' timesteps (999,749,499,249) or noise levels (1,.75,.5,.25). "
            "Once for each count.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    eta: Annotated[
        str,
        typer.Option(
            help="Share of fresh noise: 0 none, 1 as an LCM; one, or one per step.", rich_help_panel=_SCHEDULE
        ),
    ] = "",
    shift: Annotated[
        float | None, typer.Option(min=0.01, help="Of a flow's equal steps; 3 if left out.", rich_help_panel=_SCHEDULE)
    ] = None,
    solver: Annotated[str | None, typer.Option(help="ddim, dpmpp_2m, …", rich_help_panel=_SCHEDULE)] = None,
    prediction: Annotated[
        Literal["x0", "eps", "v", "flow"] | None,
        typer.Option(help="What the network gives, if not what its base does.", rich_help_panel=_SCHEDULE),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Default weight; off if left out, unless the network reads one.", rich_help_panel=_GUIDANCE),
    ] = None,
    guidance_max: Annotated[float | None, typer.Option(help="Largest weight.", rich_help_panel=_GUIDANCE)] = None,
    guidance_mode: Annotated[
        Literal["none", "baked", "cfg", "embedded"] | None,
        typer.Option(help="baked: the weight is in the network, and only noted down.", rich_help_panel=_GUIDANCE),
    ] = None,
    strength: Annotated[float, typer.Option(help="How strong a LoRA is merged.")] = 1.0,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Of a pipeline of videos, their length; the pipeline's if left out.")
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the merged weights.")] = "fp16",
    licence: Annotated[str | None, typer.Option(help="The base's if left out.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of its golden samples; may be given again.", rich_help_panel=_CHECKS)
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Pictures per step count on which the gate judges it against its base, whose task "
            "must be known here; 0 judges nothing.",
            rich_help_panel=_CHECKS,
        ),
    ] = 0,
    backend: Annotated[str, typer.Option(help="The engine it is checked on.", rich_help_panel=_CHECKS)] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto.", rich_help_panel=_CHECKS)] = "auto",
    registry_url: RegistryUrl = DEFAULT_REGISTRY,
) -> None:
    """Make a student of a few-step checkpoint or LoRA that you have.

    It gets a manifest, golden samples and a report, and its compiled engine is compared with the reference. Nothing is
    downloaded and nothing unpickled.

    Examples:

    fewstep students import lcm-lora.safetensors --base sd15@3f2a91c0de11 --as lcm --steps 4

    fewstep students import lightning_4step_unet.safetensors --base ./sdxl --as lightning --steps 4 --name sdxl-fast

    fewstep students import ./sdxl-turbo --as turbo --steps 1,2,4

    fewstep students import mine.safetensors --base flux@09ab44d21e70 --times 1,.75,.5,.25 --eta 0
    """
    from engines import recipes
    from engines.backends.base import choose
    from engines.contract import Sampling
    from engines.imports import import_student
    from engines.verify import verify

    known(registry_url)
    registry = open_registry(registry_url)
    if samples and (base is None or Path(base).is_dir()):
        raise InvalidRequest("--samples: the gate compares with a base in the registry: give its version", param="base")
    choice = choose(backend, precision)
    asked = Sampling(
        recipe=recipe,
        steps=tuple(int(count) for count in _numbers("steps", steps)),
        times=tuple(_numbers("times", each) for each in times or ()),
        eta=_numbers("eta", eta),
        shift=recipes.SHIFT if shift is None else shift,
        solver=solver,
        prediction=prediction,
        guidance=guidance,
        guidance_max=guidance_max,
        guidance_mode=guidance_mode,
    )
    made = import_student(
        registry,
        source,
        name or source.stem.lower(),
        sampling=asked,
        base=Path(base) if base and Path(base).is_dir() else base,
        strength=strength,
        dtype=dtype,
        licence=licence,
        golden_prompts=prompt or (),
        num_frames=num_frames,
    )
    with tempfile.TemporaryDirectory() as work:
        found = verify(registry, made.version, choice=choice, cache=Path(work))
        out.print(table(found))
        if found.missing:
            out.print(f"Not compared with diffusers: {found.missing}", highlight=False)
        gate = _judged(registry, made.version, base, samples, choice, Path(work)) if base and samples else {}
    _report(registry, made, recipe, found, choice, gate)
    if not found.passed:
        raise GoldenMismatch(f"{shown(made.version)}: its engine makes other pictures; do not serve it")
    out.print(f"{shown(made.version)}: {_verdict(gate)}", highlight=False)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        message = f"--{option} {text}: give numbers with commas between them"
        raise InvalidRequest(message, param=option) from None


def _judged(registry: Registry, version: str, base: str, samples: int, choice: "Choice", work: Path) -> dict[str, Any]:
    """What the gate says of it, as of a student that was distilled here; and the sheet of both."""
    from distill_jobs.assessment import Assessor, TeacherAs
    from distill_jobs.judgement import judged
    from distill_jobs.spec import GateSpec

    assessor = Assessor(registry, choice=choice, cache=work / "engines", answers=work / "answers")
    teacher, counts = TeacherAs.of(registry.student(base)), sorted(registry.student(version).schedules)
    figures, verdict = judged(assessor, version, teacher, counts, samples, GateSpec())
    for result in verdict.results:
        out.print(result.sentence, highlight=False)
    registry.put_file(version, "samples.png", assessor.sheet(version, teacher, counts))
    as_asked = {"version": teacher.version, "steps": teacher.steps, "guidance": teacher.guidance}
    return figures | {"teacher_as": as_asked}


def _report(
    registry: Registry,
    made: "Imported",
    recipe: str | None,
    found: "Verification",
    choice: "Choice",
    gate: dict[str, Any],
) -> None:
    """`report.json`, and the golden pictures as `samples.png` where the gate made no sheet: of a video its middle."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from engines import golden, images

    manifest = registry.student(made.version)
    if not gate and manifest.golden:
        pictures = golden.Golden.from_bytes(registry.read_blob(manifest.golden)).pictures
        if manifest.frames:
            pictures = pictures[:, manifest.frames.number // 2]
        registry.put_file(made.version, "samples.png", images.encode(pictures.movedim(0, 2).flatten(2).numpy()))
    wrong = {one.steps for one in found.comparisons if one.fault}
    if wrong:
        agreeing = [k for k in sorted(manifest.schedules) if k not in wrong]
        gate = gate | {"gates": {"passed": False, "passed_steps": agreeing, "results": []}}
    report = {
        "student": made.version,
        "imported": {"source": made.source, "as": recipe, "files": dict(made.files), "lora_ranks": list(made.ranks)},
        "engine": {"backend": choice.backend, "precision": choice.precision},
        "verification": [asdict(one) for one in found.comparisons],
        "created_at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        **gate,
    }
    registry.put_report(made.version, report)


def _verdict(gate: dict[str, Any]) -> str:
    if not gate:
        return "published; its quality was not judged (--samples)"
    counts = ", ".join(map(str, gate["gates"]["passed_steps"])) or "none"
    return f"published; step counts that passed the gate: {counts}"
