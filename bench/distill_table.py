"""The leaderboard: ranked by how near the students are to the teacher, as JSON entries, as tables and as the short
file that `fewstep distill methods` reads."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.distill_chart import chart
from bench.distill_why import WHY
from distill_jobs.methods import _schemas
from distill_jobs.methods.base import resolve

README = Path(_schemas.__file__).with_name("README.md")
IMAGES = Path(__file__).parents[1] / "docs" / "img"
Made = Mapping[str, Any]
"""What `bench.distill_entry` wrote for one method and seed: figures by step count, or `failed`."""
TEACHER = "teacher"
COUNTS = ("1", "2", "4")
_UNKNOWN = "No reason has been found yet."

_HEAD = """# Distillation methods

Written by `make bench-distill` from measurements on the embedded teachers; do not edit. One line a method: the Fréchet
distance of its student as a ratio to that of the guided teacher at its own steps, with the same captions and seeds (1
is as good as the teacher, lower is better). In the screening every method gets the same number of network evaluations
(a row forward is 1, backward 2, a forward-mode derivative 1), what the teacher makes first included, with its own
default settings and nothing tuned for this teacher. `evaluations` are those really used; alignment, diversity and
grain are ratios to the teacher's, averaged over step counts. *experimental*: with this budget its students are, over
their step counts together, no better than the teacher itself at the same counts, so there is no reason yet to take it.
Where guidance is paid for with distance, as for the digits, a student that has taken over only a part of it is nearer
to real pictures than its teacher is: read its alignment beside its distance. Methods for some of the counts only come
after those for all three, because four steps alone are easier. The figures are of one seed: neighbours would change
places with another, and the 95 % intervals in `bench/distill.json` overlap.
Seconds are of one thread beside other work; evaluations compare better.
"""

_FINAL = """The best of the screening with three times its budget and several seeds: medians, and from the least to the
largest. Seconds are of one thread beside other work.
"""


def score(made: Made) -> float:
    """The geometric mean of the ratios over step counts; infinite for a failure."""
    figures = made.get("figures")
    return _mean([one["fd_ratio"] for one in figures.values()]) if figures else math.inf


def ranked(made: Sequence[Made]) -> list[Made]:
    """Nearest first; those not made for all step counts after those that are: four steps alone are easier."""
    return sorted(made, key=lambda one: (not _is_whole(one), score(one), one["preset"]))


def _is_whole(made: Made) -> bool:
    return set(COUNTS) <= set(made.get("figures", ()))


def experimental(one: Made, teacher: Made) -> bool:
    """Whether a student is no better than the teacher at the same step counts."""
    figures = one.get("figures")
    if not figures:
        return True
    theirs = [teacher["figures"][steps]["fd_ratio"] for steps in figures if steps in teacher["figures"]]
    return bool(theirs) and score(one) >= _mean(theirs)


def entries(made: Sequence[Made], teacher: Made) -> list[dict[str, Any]]:
    """One record for each preset and step count, the seeds of a preset together: medians of the figures."""
    records = []
    for runs in _by_preset(made).values():
        done = [one for one in runs if one.get("figures")]
        if done:
            mark = all(experimental(one, teacher) for one in done)
            records += [_record(done, steps) | {"experimental": mark} for steps in done[0]["figures"]]
    return records


def ranks(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For the listing of methods: place, ratios by step count and the mark, each over all tasks together; methods that
    were not measured on every task have none."""
    teacher = _together([task["teacher"] for task in tasks.values()])
    by_preset = [{one["preset"]: one for one in task["screening"] if one.get("figures")} for task in tasks.values()]
    everywhere = set.intersection(*(set(made) for made in by_preset))
    found = [_together([made[preset] for made in by_preset]) for preset in everywhere]
    return {
        one["preset"]: {
            "rank": place,
            "fd_ratio": {steps: round(figures["fd_ratio"], 3) for steps, figures in one["figures"].items()},
            "experimental": experimental(one, teacher),
        }
        for place, one in enumerate(ranked(found), 1)
    }


def _together(runs: Sequence[Made]) -> Made:
    """One method's runs on several tasks as if they were one: the geometric mean of the ratios."""
    counts = [steps for steps in runs[0]["figures"] if all(steps in one["figures"] for one in runs)]
    means = {steps: {"fd_ratio": _mean([one["figures"][steps]["fd_ratio"] for one in runs])} for steps in counts}
    return {"preset": runs[0]["preset"], "figures": means}


def table(made: Sequence[Made], teacher: Made) -> str:
    """Markdown."""
    head = ("", "method", "paper", "fd 1", "fd 2", "fd 4", "alignment", "diversity", "grain", "evaluations", "s", "MB")
    rows = [_row(str(place), one, teacher) for place, one in enumerate(ranked(made), 1)]
    return _markdown(head, [_row("", teacher, teacher), *rows])


def finals(made: Sequence[Made], teacher: Made) -> str:
    """Markdown: of each method the median of its seeds, and the least and the largest."""
    groups = sorted(_by_preset(made).values(), key=lambda runs: statistics.median(map(score, runs)))
    head = ("", "method", "seeds", "fd 1", "fd 2", "fd 4", "alignment", "diversity", "grain", "evaluations", "s", "MB")
    teachers = _row("", teacher, teacher)
    rows = [[*teachers[:2], "", *teachers[3:]]]
    for place, runs in enumerate(groups, 1):
        done = [one for one in runs if one.get("figures")]
        records = [_record(done, steps) for steps in COUNTS if done and steps in done[0]["figures"]]
        if records:
            ratios = [_span(done, steps) for steps in COUNTS]
            means = [_over(records, figure) for figure in ("alignment_ratio", "diversity_ratio", "grain_ratio")]
            cost = [f"{records[0]['evaluations']:,}", f"{records[0]['seconds']:.0f}", str(records[0]["rss_mb"])]
            seeds = str(len(done)) if len(done) == len(runs) else f"{len(done)} of {len(runs)}"
            rows.append([str(place), f"`{done[0]['preset']}`", seeds, *ratios, *means, *cost])
    return _markdown(head, rows)


def _span(done: Sequence[Made], steps: str) -> str:
    ratios = [one["figures"][steps]["fd_ratio"] for one in done if steps in one["figures"]]
    if not ratios:
        return "–"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


def _over(records: Sequence[Mapping[str, Any]], figure: str) -> str:
    return f"{statistics.mean(record[figure] for record in records):.2f}"


def recommendations(made: Sequence[Made], teacher: Made) -> str:
    """Markdown: the best method of each situation, by the figure that this situation asks for."""
    known = _schemas.schemas()
    good = [one for one in made if one.get("figures") and one["preset"] in known and not experimental(one, teacher)]

    def where(fits: Callable[[dict[str, Any]], bool]) -> list[Made]:
        return [one for one in good if fits(known[one["preset"]])]

    situations = [
        *((f"{k} step{'s' * (k != '1')}", k, good) for k in COUNTS),
        (
            "clean latents: your own pictures, or the teacher's",
            None,
            where(lambda schema: "generate" in _settings(schema)),
        ),
        ("nothing made first by the teacher", None, where(lambda schema: not _prepares(schema))),
        ("any number of steps (the student reads s)", None, where(lambda schema: "s" in schema["inputs"])),
        ("a LoRA student (which reads no second time)", None, where(lambda schema: not schema["inputs"])),
        ("least memory (one network in training)", None, where(lambda schema: schema["roles"] == ["student"])),
    ]
    rows = []
    for situation, steps, candidates in situations:
        ordered = sorted((_figure(one, steps), one["preset"]) for one in candidates)
        if ordered and math.isfinite(ordered[0][0]):
            best = next(one for one in candidates if one["preset"] == ordered[0][1])
            cost = [f"{best['seconds']:.0f}", str(best["rss_mb"])]
            rows.append([situation, f"`{best['preset']}`", *_ratios(best), *cost])
    return _markdown(("situation", "take", "fd 1", "fd 2", "fd 4", "s", "MB"), rows)


def readme(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """`tasks`: by name, each with `teacher`, `screening` and `final` as made."""
    parts = [_HEAD]
    for name, task in tasks.items():
        made = [*task["screening"], *task["final"]]
        parts += [f"## {name}: which to take\n", recommendations(task["screening"], task["teacher"])]
        parts += [f"\n## {name}: screening\n", f"![Every method of the table below](../../docs/img/{_image(name)})\n"]
        parts += [table(task["screening"], task["teacher"])]
        if task["final"]:
            parts += [f"\n## {name}: final\n", _FINAL, finals(task["final"], task["teacher"])]
        marked = [one for one in ranked(task["screening"]) if one.get("figures") and experimental(one, task["teacher"])]
        if marked:
            parts += [f"\n## {name}: experimental\n", *(f"- `{one['preset']}`: {_why(name, one)}" for one in marked)]
        if failed := [f"- `{one['preset']}`: {one['failed']}" for one in made if "failed" in one]:
            parts += [f"\n## {name}: failed\n", *failed]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def drawn(made: Sequence[Made], teacher: Made, title: str) -> str:
    """SVG: the teacher, then the methods in the order of the table."""
    done = [one for one in ranked(made) if one.get("figures")]
    rows = [("the teacher itself", teacher), *((f"{place}  {one['preset']}", one) for place, one in enumerate(done, 1))]
    return chart([(label, one["figures"]) for label, one in rows], title)


def write(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """The generated files beside the methods; ranks are those of the tasks' screening."""
    README.write_text(readme(tasks))
    for name, task in tasks.items():
        (IMAGES / _image(name)).write_text(drawn(task["screening"], task["teacher"], name))
    _schemas.LEADERBOARD.write_text(json.dumps(ranks(tasks), indent=1) + "\n")


def _record(done: Sequence[Made], steps: str) -> dict[str, Any]:
    runs = [one["figures"][steps] for one in done]

    def median(figure: str) -> float:
        return round(float(statistics.median(run[figure] for run in runs)), 4)

    intervals = [run["fd_ratio_ci"] for run in runs if run["fd_ratio_ci"]]
    figures = ("fd", "fd_ratio", "fd_floor", "alignment_ratio", "diversity_ratio", "grain_ratio")
    return {
        "method": resolve(done[0]["preset"]).method.__module__.rpartition(".")[2],
        "preset": done[0]["preset"],
        "steps": int(steps),
        **{figure: median(figure) for figure in figures},
        "evaluations": round(statistics.median(one["evaluations"] for one in done)),
        "iterations": round(statistics.median(one["iterations"] for one in done)),
        "seconds": round(statistics.median(one["seconds"] for one in done), 1),
        "rss_mb": max(one["rss_mb"] for one in done),
        "n": done[0]["n"],
        "seeds": [one["seed"] for one in done],
        "interval": [round(min(low for low, _ in intervals), 4), round(max(high for _, high in intervals), 4)]
        if intervals
        else None,
    }


def _row(place: str, one: Made, teacher: Made) -> list[str]:
    name = one["preset"]
    paper = _schemas.schemas().get(name, {}).get("paper", "")
    figures = one.get("figures")
    if not figures:
        return [place, f"`{name}`", paper, *["–"] * 9]

    def mean(figure: str) -> str:
        return f"{sum(found[figure] for found in figures.values()) / len(figures):.2f}"

    means = [mean("alignment_ratio"), mean("diversity_ratio"), mean("grain_ratio")]
    if name == TEACHER:
        return [place, "*the teacher itself*", "", *_ratios(one), *means, "", "", ""]
    mark = " *experimental*" if experimental(one, teacher) else ""
    cost = [f"{one['evaluations']:,}", f"{one['seconds']:.0f}", str(one["rss_mb"])]
    return [place, f"`{name}`{mark}", paper, *_ratios(one), *means, *cost]


def _figure(one: Made, steps: str | None) -> float:
    """The ratio at a step count, infinite where it is not made for it; over all counts for None."""
    if steps is None:
        return score(one)
    return float(one["figures"][steps]["fd_ratio"]) if steps in one["figures"] else math.inf


def _ratios(one: Made) -> list[str]:
    return [f"{one['figures'][k]['fd_ratio']:.2f}" if k in one["figures"] else "–" for k in COUNTS]


def _why(task: str, one: Made) -> str:
    updates = f"{one['iterations']} updates in this budget"
    return f"{updates}, ratios {' / '.join(_ratios(one))}. {WHY.get(task, {}).get(one['preset'], _UNKNOWN)}"


def _image(task: str) -> str:
    return f"leaderboard-{task}.svg"


def _prepares(schema: Mapping[str, Any]) -> bool:
    return any(name in _settings(schema) for name in _schemas.PREPARED)


def _settings(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema["config"].get("properties", {})
    return found


def _by_preset(made: Sequence[Made]) -> dict[str, list[Made]]:
    groups: dict[str, list[Made]] = {}
    for one in made:
        groups.setdefault(one["preset"], []).append(one)
    return groups


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
