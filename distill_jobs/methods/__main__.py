"""`python -m distill_jobs.methods` writes the `schemas.json` of methods and of terms from their configuration classes.

The files let the gateway check a job without importing torch. Per method: its file, description, paper, needs, inputs,
roles (all, frozen ones, heads on features), whether guidance can be embedded, what it says of step counts, defaults,
and the JSON schema of its settings. `--check` only compares.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from distill_jobs.methods._schemas import PATH, TERMS_PATH
from distill_jobs.methods.base import Method, MethodConfig, Preset, presets
from distill_jobs.roles import Role
from distill_jobs.terms.base import Term, terms


def generated() -> str:
    """The text that the methods' `schemas.json` must have."""
    return _text({name: _schema(preset) for name, preset in presets().items()})


def generated_terms() -> str:
    """The text that the terms' `schemas.json` must have."""
    return _text({name: _term_schema(term) for name, term in terms().items()})


def _text(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def _schema(preset: Preset) -> dict[str, Any]:
    config = preset.config({})
    return {
        "file": preset.method.__module__.rpartition(".")[2],
        "description": preset.description,
        "paper": preset.paper,
        "needs": sorted(preset.method.needs),
        "inputs": sorted(preset.method.inputs),
        **_roles(preset.method.roles(config)),
        "embeds_guidance": _embeds_guidance(preset.method, config),
        "several_counts_read_s": preset.method.several_counts_read_s,
        "for_several_steps": sorted(preset.method.for_several_steps),
        "defaults": config.model_dump(mode="json"),
        "config": preset.method.Config.model_json_schema(),
    }


def _embeds_guidance(method: type[Method], config: MethodConfig) -> bool:
    """Whether it can train a student that reads its guidance weight: whoever else plays is the student's copy."""
    others = [role for name, role in method.roles(config).items() if name != "student"]
    copies = all(role.init == "student" and role.train == "frozen" for role in others)
    return method.asks_teacher and "student" in method.roles(config) and copies


def _roles(roles: Mapping[str, Role]) -> dict[str, list[str]]:
    """Their names in the order of updates; those that only follow others; those that are no copy of a network."""
    return {
        "roles": list(roles),
        "frozen": sorted(name for name, role in roles.items() if role.train == "frozen"),
        "heads": sorted(name for name, role in roles.items() if role.init == "new"),
    }


def _term_schema(term: type[Term]) -> dict[str, Any]:
    return {
        "description": (term.__doc__ or "").partition("\n")[0],
        "paper": term.paper,
        "needs": sorted(term.needs),
        **_roles(term.roles(term.Config())),
        "config": term.Config.model_json_schema(),
    }


if __name__ == "__main__":
    files = {PATH: generated(), TERMS_PATH: generated_terms()}
    if "--check" in sys.argv[1:]:
        stale = [str(path) for path, text in files.items() if not path.exists() or path.read_text() != text]
        sys.exit(f"stale, run me without --check: {', '.join(stale)}" if stale else 0)
    for path, text in files.items():
        path.write_text(text)
