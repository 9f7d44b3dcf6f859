"""The table of values in helm/README.md, made from the comments of helm/fewstep/values.yaml: `make chart-table`.

The comment right above a key is its description. A key without one has to be a group of keys that have some.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
README = HERE / "README.md"
VALUES = HERE / "fewstep" / "values.yaml"
BEGIN, END = "<!-- values: written by helm/values_table.py -->\n", "<!-- end of values -->\n"
_KEY = re.compile(r"( *)([A-Za-z]\w*):")

Path_ = tuple[str, ...]


def comments(text: str) -> dict[Path_, str]:
    """Key path -> the comment right above it."""
    found: dict[Path_, str] = {}
    above: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.lstrip().removeprefix("#").strip())
        elif key := _KEY.match(line):
            path = [*path[: len(key[1]) // 2], key[2]]
            if above:
                found[tuple(path)] = " ".join(above)
            above = []
        else:
            above = []
    return found


def rows(values: Mapping[str, Any], said: Mapping[Path_, str], at: Path_ = ()) -> Iterator[tuple[str, str, str]]:
    """Key, default as JSON and description of each value; a group's own comment comes before its keys.

    Raises:
        ValueError: a value has no comment.
    """
    for name, value in values.items():
        path = (*at, name)
        group = isinstance(value, dict) and any(other[: len(path)] == path != other for other in said)
        if path not in said and not group:
            raise ValueError(f"values.yaml: no comment above {'.'.join(path)}")
        if path in said:
            yield ".".join(path), "" if group else json.dumps(value), said[path]
        if group:
            yield from rows(value, said, path)


def table(text: str) -> str:
    """Markdown of a values file."""
    lines = ["| value | default | is |", "|---|---|---|"]
    for key, default, description in rows(yaml.safe_load(text), comments(text)):
        cells = (f"`{key}`", f"`{default}`" if default else "", description)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, text: str) -> str:
    """A README with the table of a values file between its two marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}{table(text)}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), VALUES.read_text()))
