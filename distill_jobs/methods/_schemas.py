"""What a job may say about a method, without importing torch: the reader of the generated `schemas.json`.

The gateway checks a job when it is submitted, so this file and what it imports stay torch-free; that it agrees with
the configuration classes is a test.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from engines.errors import InvalidRequest, UnknownPlugin

PATH = Path(__file__).with_name("schemas.json")
TERMS_PATH = Path(__file__).parents[1] / "terms" / "schemas.json"
LEADERBOARD = Path(__file__).with_name("leaderboard.json")
PREPARED = ("pairs", "generate")
"""Settings that say how many rows a method has its teacher make before the first update; a method has one at most."""
ONE_SPLIT = (0.5,)
"""Where the phases of a method change for a student of one network, if nothing is said."""
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}


@cache
def schemas() -> dict[str, dict[str, Any]]:
    """Methods: name -> {file, description, paper, needs, inputs, roles, frozen, heads, embeds_guidance,
    several_counts_read_s, for_several_steps, defaults, config (JSON schema)}."""
    found: dict[str, dict[str, Any]] = json.loads(PATH.read_text())
    return found


@cache
def leaderboard() -> dict[str, dict[str, Any]]:
    """What `make bench-distill` measured: name -> {rank, fd_ratio by steps, experimental}, of the methods it ran."""
    found: dict[str, dict[str, Any]] = json.loads(LEADERBOARD.read_text())
    return found


@cache
def terms() -> dict[str, dict[str, Any]]:
    """Loss terms: name -> {description, paper, needs, roles, frozen, heads, config (JSON schema)}."""
    found: dict[str, dict[str, Any]] = json.loads(TERMS_PATH.read_text())
    return found


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses what the method's configuration would refuse, as far as its JSON schema says it.

    Raises:
        UnknownPlugin: no such method.
        InvalidRequest: an unknown setting, a wrong type or a value out of range; `param` is method.<setting>.
    """
    _check("method", name, settings, schemas())


def check_counts(name: str, settings: Mapping[str, Any], reads: frozenset[str], experts: Sequence[float] = ()) -> None:
    """Refuses settings that do not fit the step counts among them; `reads` are the student's inputs (of s and w),
    `experts` the noise levels where its networks change.

    Raises:
        InvalidRequest: `param` is method.<setting>.
    """
    known = schemas()[name]
    told = known["defaults"] | settings
    counts = told.get("counts", ())
    if known["several_counts_read_s"] and len(counts) > 1 and "s" not in reads:
        raise InvalidRequest(
            f"{name} learns jumps between rungs: of several step counts {list(counts)} its student must read s, "
            "so ask for one count or chain it after a method whose student does",
            param="method.counts",
        )
    if fault := grids_fault(told.get("grids", {}), counts):
        raise InvalidRequest(f"method setting grids: {fault}", param="method.grids")
    for count in counts if "splits" in told else ():
        if fault := phases_fault(count, told["grids"].get(str(count)), told["splits"] or experts or ONE_SPLIT):
            raise InvalidRequest(f"{name}: {fault}", param="method.counts")
    for key in known["for_several_steps"]:
        if told.get(key) and max(counts) == 1:
            raise InvalidRequest(
                f"method setting {key}: {told[key]!r} needs a count of at least 2, the counts are {list(counts)}",
                param=f"method.{key}",
            )


def grids_fault(grids: Mapping[Any, Sequence[float]], counts: Sequence[int]) -> str | None:
    """Why these noise levels by count (in JSON a string) are no grids of a student of `counts`, or None."""
    for count, levels in grids.items():
        if str(count) not in map(str, counts):
            return f"grids[{count}] is of no use: the student's step counts are {list(counts)}"
        falls = all(s < t for t, s in pairwise(levels))
        if str(len(levels)) != str(count) or not falls or not all(0 < u <= 1 for u in levels):
            return f"grids[{count}] needs {count} falling levels in (0, 1], not {tuple(levels)}"
    return None


def phases_fault(count: int, levels: Sequence[float] | None, splits: Sequence[float]) -> str | None:
    """Why `count` steps, at these levels if given, cannot go through the phases that end at `splits`, or None."""
    if any(low >= high for high, low in pairwise((1.0, *splits, 0.0))):
        return f"splits must fall within (0, 1), not {tuple(splits)}"
    if count <= len(splits):
        return f"{len(splits) + 1} phases need at least a step each, and the counts hold {count}"
    if levels is not None and not set(splits) <= set(levels):
        return f"grids[{count}] must hold the levels where a phase ends, {tuple(splits)}, not {tuple(levels)}"
    return None


def check_term(name: str, settings: Mapping[str, Any]) -> None:
    """The same for a loss term; `param` is terms.<setting>."""
    _check("term", name, settings, terms())


def _check(what: str, name: str, settings: Mapping[str, Any], known: Mapping[str, dict[str, Any]]) -> None:
    param = {"method": "method", "term": "terms"}[what]
    if name not in known:
        raise UnknownPlugin(f"{what} {name!r} does not exist: choose from {', '.join(sorted(known))}", param=param)
    properties = known[name]["config"].get("properties", {})
    for key, value in settings.items():
        if key not in properties:
            own = ", ".join(sorted(properties)) or "none"
            raise InvalidRequest(
                f"{what} setting {key}: {name} has no such setting, it has {own}", param=f"{param}.{key}"
            )
        reason = _fault(value, properties[key])
        if reason:
            raise InvalidRequest(f"{what} setting {key}: {value!r} {reason}", param=f"{param}.{key}")


def _fault(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Why a value does not fit the schema, or None. Knows what pydantic writes for our configurations."""
    if "anyOf" in schema:
        faults = [_fault(value, option) for option in schema["anyOf"]]
        return None if None in faults else faults[0]
    kind = schema.get("type")
    wrong = kind is not None and not isinstance(value, _TYPES[kind])
    if wrong or (isinstance(value, bool) and kind in ("integer", "number")):
        return f"is not of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"is not one of {', '.join(map(str, schema['enum']))}"
    if kind in ("integer", "number"):
        return _out_of_range(value, schema)
    return _fault_inside(value, schema) if kind in ("array", "object") else None


def _out_of_range(value: float, schema: Mapping[str, Any]) -> str | None:
    if value < schema.get("minimum", value):
        return f"is below {schema['minimum']}"
    if value > schema.get("maximum", value):
        return f"is above {schema['maximum']}"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        return f"is not above {schema['exclusiveMinimum']}"
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        return f"is not below {schema['exclusiveMaximum']}"
    return None


def _fault_inside(values: Any, schema: Mapping[str, Any]) -> str | None:
    if len(values) < schema.get("minItems", 0):
        return f"needs at least {schema['minItems']} entries"
    if len(values) > schema.get("maxItems", len(values)):
        return f"has room for {schema['maxItems']} at most"
    if schema["type"] == "array":
        inner, parts = schema.get("items", {}), list(values)
    else:
        inner, parts = schema.get("additionalProperties", {}), list(values.values())
    return next((fault for fault in (_fault(part, inner) for part in parts) if fault), None)
