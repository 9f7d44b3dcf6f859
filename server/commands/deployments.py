"""`fewstep deployments|promote|rollback`: what serves, and changing it."""

import time
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from engines.errors import InvalidRequest, SwapRejected
from engines.manifest import shown
from server.client import Client
from server.commands.terminal import DEFAULT_URL, Key, Url, connected, out

_POLL_S = 0.2


def deployments(url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """List the deployments: which student serves each tier, and the last revisions."""
    table = Table("deployment", "revision", "tier", "student", "steps", "state")
    with connected(url, api_key) as client:
        for deployment in client.get("/v1/deployments")["data"]:
            for tier, target in sorted(deployment["tiers"].items()):
                mark = f"{tier} (default)" if tier == deployment["default_tier"] else tier
                row = (deployment["name"], str(deployment["revision"]), mark, shown(target["student"]))
                table.add_row(*row, str(target["steps"]), "live")
    out.print(table)


def promote(
    deployment: Annotated[str, typer.Argument(help="The deployment, e.g. shapes.")],
    tiers: Annotated[
        list[str], typer.Argument(help="tier=name@digest:steps, one or several, e.g. low=shapes-fast@3f2a91c0de11:1")
    ],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Put students behind tiers of a deployment, without failing a request."""
    wanted = dict(_target(text) for text in tiers)
    with connected(url, api_key) as client:
        _wait(client, deployment, client.post(f"/v1/deployments/{deployment}/promote", {"tiers": wanted}))


def rollback(
    deployment: Annotated[str, typer.Argument(help="The deployment, e.g. shapes.")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Go back to the tiers of the previous revision."""
    with connected(url, api_key) as client:
        _wait(client, deployment, client.post(f"/v1/deployments/{deployment}/rollback"))


def _target(text: str) -> tuple[str, dict[str, Any]]:
    tier, _, target = text.partition("=")
    student, _, steps = target.rpartition(":")
    if not (tier and student and steps.isdigit()):
        raise InvalidRequest(f"{text!r} is not tier=name@digest:steps, e.g. low=shapes-fast@3f2a91c0de11:1")
    return tier, {"student": student, "steps": int(steps)}


def _wait(client: Client, deployment: str, swap: dict[str, Any]) -> None:
    path = f"/v1/deployments/{deployment}/swaps/{swap['swap_id']}"
    last = ""
    while (state := client.get(path))["state"] == "pending":
        if (line := str(state.get("workers"))) != last:
            out.print(line, highlight=False)
            last = line
        time.sleep(_POLL_S)
    if state["state"] != "live":
        raise SwapRejected(
            f"{swap['swap_id']} is {state['state']}: {state.get('reason')}; what served before still serves"
        )
    phases = " · ".join(f"{name} {seconds:.2f} s" for name, seconds in (state.get("phases") or {}).items())
    out.print(f"live as revision {state['revision']} after {_took_s(state):.2f} s · {phases}", highlight=False)


def _took_s(swap: dict[str, Any]) -> float:
    """From the promotion on, by the clocks of who took it and of who ended it."""
    begun, ended = (datetime.fromisoformat(swap[name]) for name in ("created_at", "ended_at"))
    return (ended - begun).total_seconds()
