"""Hosts on one network, as Linux network namespaces: one that has the switch, and others that can be cut off.

The switch is inside the first namespace, so that nothing of this machine's own network is touched, and everything is
gone with the namespaces. It takes root and `ip` (Debian package iproute2).
"""

import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000


class Hosts:
    """`names[0]` has the address 10.77.0.1 and the switch, the others the addresses after it."""

    def __init__(self, *names: str) -> None:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces take root and the Debian package iproute2")
        token = secrets.token_hex(3)
        self._spaces = {name: f"fewstep-{token}-{name}" for name in names}
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        self._first = names[0]

    def __enter__(self) -> "Hosts":
        try:
            for name in self._spaces:
                self._add(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces.values():
            subprocess.run(("ip", "netns", "del", space), capture_output=True, check=False)

    def on(self, name: str) -> tuple[str, ...]:
        """What a command begins with to run on this host."""
        return ("ip", "netns", "exec", self._spaces[name])

    def enter(self, name: str) -> None:
        """Sockets that this thread opens from now on are this host's."""
        with open(f"/run/netns/{self._spaces[name]}") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def asked_from(self, name: str, ask: Callable[[], T]) -> T:
        """What `ask` returns on this host; it has a thread of its own."""
        found: list[T] = []

        def run() -> None:
            self.enter(name)
            found.append(ask())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    def cut_off(self, name: str) -> None:
        """Its cable is drawn: nothing is told to either side."""
        self._ip(self._first, "link", "set", f"to-{name}", "down")

    def join(self, name: str) -> None:
        self._ip(self._first, "link", "set", f"to-{name}", "up")

    def _add(self, name: str) -> None:
        subprocess.run(("ip", "netns", "add", self._spaces[name]), check=True)
        self._ip(name, "link", "set", "lo", "up")
        if name == self._first:
            self._ip(name, "link", "add", "net0", "type", "bridge")
        else:
            peer = ("peer", "name", "net0", "netns", self._spaces[name])
            self._ip(self._first, "link", "add", f"to-{name}", "type", "veth", *peer)
            self._ip(self._first, "link", "set", f"to-{name}", "master", "net0", "up")
        self._ip(name, "addr", "add", f"{self.addresses[name]}/24", "dev", "net0")
        self._ip(name, "link", "set", "net0", "up")

    def _ip(self, name: str, *command: str) -> None:
        subprocess.run(("ip", "-n", self._spaces[name], *command), check=True)
