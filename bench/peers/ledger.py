"""What was measured already, one JSON line each, so that a bench that was stopped goes on where it was."""

import json
from pathlib import Path
from typing import Any


class Ledger:
    """Values by name, under the `settings` that they were measured with: under others nothing is known."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self._known: dict[str, Any] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            self._take(line)

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return  # the last line of a bench that was killed
        if entry["settings"] == self._settings:
            self._known[entry["name"]] = entry["value"]

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def put(self, name: str, value: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as out:
            line = json.dumps({"settings": self._settings, "name": name, "value": value})
            out.write(("\n" if torn and self._path.stat().st_size else "") + line + "\n")
        self._known[name] = value
