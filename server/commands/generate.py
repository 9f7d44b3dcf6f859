"""`fewstep generate`: a prompt in, a picture or video on disk."""

from pathlib import Path
from typing import Annotated, Any

import typer

from engines.errors import InvalidRequest
from engines.manifest import shown
from server.commands.terminal import DEFAULT_URL, Key, Url, connected, out

_MIME = {
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".mp4": "video/mp4",
}


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, in plain English.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .png, .webp or .jpg file; of a video .webp or .mp4.")
    ] = Path("out.png"),
    model: Annotated[str, typer.Option(help="A deployment, or one exact student as name@digest.")] = "shapes",
    tier: Annotated[str | None, typer.Option(help="low, medium or high; the deployment's default if left out.")] = None,
    steps: Annotated[int | None, typer.Option(help="A step count, instead of a tier.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, where the student allows a choice.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Draw one picture, or one video with a model of videos.

    Example: fewstep generate "a red circle" -o circle.png --seed 7
    """
    mime = _MIME.get(output.suffix.lower())
    if mime is None:
        raise InvalidRequest(f"{output} has no known ending: use one of {', '.join(_MIME)}")
    fields: dict[str, Any] = {"tier": tier, "steps": steps, "seed": seed, "guidance_scale": guidance}
    body = {"model": model, "prompt": prompt, **{key: value for key, value in fields.items() if value is not None}}
    with connected(url, api_key) as client:
        picture = client.generate(body, mime)
    output.write_bytes(picture.content)
    timing = picture.headers.get("server-timing", "")
    out.print(f"{output} · {len(picture.content)} bytes · {shown(picture.version)} · {timing}", highlight=False)
