"""What all commands share on a terminal: one way to print, to fail and to find the server."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from engines.errors import FewstepError
from server.client import Client

out = Console()
err = Console(stderr=True)

Url = Annotated[
    str, typer.Option("--url", envvar="FEWSTEP_URL", help="Where the gateway answers.", rich_help_panel="Connection")
]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="FEWSTEP_API_KEY",
        help="Bearer key, if the gateway asks for one.",
        rich_help_panel="Connection",
    ),
]
DEFAULT_URL = "http://127.0.0.1:8000"


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """A client for the time of one command."""
    client = Client(url, api_key)
    try:
        yield client
    finally:
        client.close()


def one_sentence_errors(app: typer.Typer) -> None:
    """Runs the application. What Fewstep raises on purpose, and a file that cannot be read or written, ends in one
    sentence and exit code 1, not a traceback."""
    try:
        app()
    except FewstepError as error:
        err.print(f"[red]{error.code}[/red]: {error.message}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        err.print(f"[red]{error.strerror}[/red]: {error.filename}", highlight=False, soft_wrap=True)
        sys.exit(1)
