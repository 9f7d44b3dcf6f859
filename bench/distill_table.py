"""The leaderboard as tables: ranked by how near the students are to the teacher, failures at the end."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jobs.methods import _schemas

README = Path(_schemas.__file__).with_name("README.md")
Entry = Mapping[str, Any]

_HEAD = """# Distillation methods

Written by `make bench-distill` from measurements on the embedded teacher; do not edit. One line a method: the Fréchet
distance of its student as a ratio to that of the guided teacher at 32 steps, with the same captions and seeds (1 is as
good as the teacher, lower is better). In the screening every method gets the same number of network evaluations (a row
forward is 1, backward 2, a forward-mode derivative 1), what the teacher makes first included, with its own default
settings and nothing tuned for this teacher. `evaluations` are those really used.
"""


def score(entry: Entry) -> float:
    """The geometric mean of the ratios over step counts; infinite for a failure."""
    figures = entry.get("figures")
    if not figures:
        return math.inf
    return math.exp(sum(math.log(one["fd_ratio"]) for one in figures.values()) / len(figures))


def ranked(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (score(entry), entry["preset"]))


def table(entries: Sequence[Entry]) -> str:
    """Markdown."""
    head = ("", "method", "paper", "fd 1", "fd 2", "fd 4", "alignment", "diversity", "grain", "evaluations", "s", "MB")
    rows = [_row(place, entry) for place, entry in enumerate(ranked(entries), 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def readme(screening: Sequence[Entry], finals: Sequence[Entry]) -> str:
    parts = [_HEAD, "## Screening\n", table(screening)]
    if finals:
        parts += ["\n## Final: the best, several seeds\n", table(finals)]
    failed = [f"- `{entry['preset']}`: {entry['failed']}" for entry in (*screening, *finals) if "failed" in entry]
    if failed:
        parts += ["\n## Failed\n", *failed]
    return "\n".join(parts) + "\n"


def _row(place: int, entry: Entry) -> list[str]:
    name = entry["preset"]
    paper = _schemas.schemas().get(name, {}).get("paper", "")
    figures = entry.get("figures")
    if not figures:
        return [str(place), f"`{name}`", paper, *["–"] * 9]

    def mean(figure: str) -> str:
        return f"{sum(one[figure] for one in figures.values()) / len(figures):.2f}"

    fds = [f"{figures[k]['fd_ratio']:.2f}" if k in figures else "–" for k in ("1", "2", "4")]
    means = [mean("alignment_ratio"), mean("diversity_ratio"), mean("grain_ratio")]
    cost = [f"{entry['evaluations']:,}", f"{entry['seconds']:.0f}", str(entry["rss_mb"])]
    return [str(place), f"`{name}`", paper, *fds, *means, *cost]
