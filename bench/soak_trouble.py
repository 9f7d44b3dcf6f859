"""What a soak does to the system while it serves: swaps round a ring of students, and SIGKILL to workers."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import httpx

from bench.soak_requests import STEPS
from bench.system import MODEL
from engines.manifest import shown
from server.embedded import Stack

TIERS = ("low", "medium", "high")
_SWAP_WITHIN_S = 150.0
_BACK_WITHIN_S = 180.0
_POLL_S = 0.1


@dataclass(slots=True)
class Trouble:
    """`swaps` and `kills` are what was done; `failures` what did not go as it has to."""

    http: httpx.AsyncClient
    stack: Stack
    ring: Sequence[str]
    draw: random.Random
    swaps: list[dict[str, Any]] = field(default_factory=list)
    kills: int = 0
    failures: list[str] = field(default_factory=list)

    async def swap(self, every_s: float) -> None:
        """Promotes the next of the ring to all tiers, again and again, until it is canceled."""
        for version in islice(cycle(self.ring), 1, None):
            await asyncio.sleep(self.draw.uniform(0.5, 1.5) * every_s)
            await self._promote(version)

    async def kill(self, every_s: float, until_s: float) -> None:
        """Kills one worker, waits until both serve again, and so on until monotonic `until_s`."""
        while True:
            await asyncio.sleep(self.draw.uniform(0.5, 1.5) * every_s)
            if time.monotonic() >= until_s:
                return
            os.kill(self.stack.supervisor.pid(f"worker-{self.draw.randrange(2)}"), signal.SIGKILL)
            self.kills += 1
            await self._both_serve()

    async def _promote(self, version: str) -> None:
        begun_s = time.monotonic()
        tiers = {tier: {"student": version, "steps": steps} for tier, steps in zip(TIERS, STEPS, strict=True)}
        started = await self.http.post(f"/v1/deployments/{MODEL}/promote", json={"tiers": tiers})
        if started.status_code != 202:
            self.failures.append(f"promotion of {shown(version)}: {started.status_code} {started.text[:300]}")
            return
        path = f"/v1/deployments/{MODEL}/swaps/{started.json()['swap_id']}"
        while (swap := (await self.http.get(path)).json())["state"] == "pending":
            if time.monotonic() - begun_s > _SWAP_WITHIN_S:
                self.failures.append(f"swap {swap['swap_id']} to {shown(version)} did not end: {swap['workers']}")
                return
            await asyncio.sleep(_POLL_S)
        self.swaps.append({"state": swap["state"], "seconds": time.monotonic() - begun_s, "phases": swap["phases"]})
        if swap["state"] != "live":
            self.failures.append(f"swap {swap['swap_id']} to {shown(version)} is {swap['state']}: {swap['reason']}")

    async def _both_serve(self) -> None:
        """First the lease of the dead one has to end, then its successor to load."""
        deadline_s, seen_dead = time.monotonic() + _BACK_WITHIN_S, False
        while time.monotonic() < deadline_s:
            workers = len((await self.http.get(f"/v1/deployments/{MODEL}")).json()["workers"])
            seen_dead = seen_dead or workers < 2
            if seen_dead and workers == 2:
                return
            await asyncio.sleep(_POLL_S)
        self.failures.append(f"a killed worker did not serve again within {_BACK_WITHIN_S:g} s")
