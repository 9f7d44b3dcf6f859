"""`python -m distill_jobs.methods` writes `schemas.json` from the configuration classes; `--check` only compares.

The file lets the gateway check a job without importing torch. Per method: its file, description, needs, inputs,
roles, defaults, and the JSON schema of its settings.
"""

import json
import sys
from typing import Any

from distill_jobs.methods._schemas import PATH
from distill_jobs.methods.base import Preset, presets


def generated() -> str:
    """The text that `schemas.json` must have."""
    return json.dumps({name: _schema(preset) for name, preset in sorted(presets().items())}, indent=1) + "\n"


def _schema(preset: Preset) -> dict[str, Any]:
    config = preset.config({})
    return {
        "file": preset.method.__module__.rpartition(".")[2],
        "description": preset.description,
        "needs": sorted(preset.method.needs),
        "inputs": sorted(preset.method.inputs),
        "roles": list(preset.method.roles(config)),
        "defaults": config.model_dump(mode="json"),
        "config": preset.method.Config.model_json_schema(),
    }


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        fresh = PATH.exists() and PATH.read_text() == generated()
        sys.exit(0 if fresh else f"{PATH.name} is stale: run me without --check")
    PATH.write_text(generated())
