"""The leaderboard's table, entries and ranks, from figures that are given."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import distill_table as table
from bench.distill import Ledger, Wanted
from bench.distill_entry import counts_of
from bench.distill_why import WHY
from distill_jobs.methods import _schemas


def made(preset: str, ratios: dict[str, float], seed: int = 0) -> dict[str, Any]:
    figures = {
        steps: {
            "fd": ratio / 2,
            "fd_ratio": ratio,
            "fd_floor": 0.1,
            "fd_ratio_ci": (ratio - 0.1, ratio + 0.1),
            "alignment_ratio": 1.0,
            "diversity_ratio": 1.0,
            "grain_ratio": 1.0,
        }
        for steps, ratio in ratios.items()
    }
    cost = {"evaluations": 1000, "iterations": 10, "seconds": 1.0, "rss_mb": 100}
    return {"preset": preset, "seed": seed, "n": 2000, "figures": figures} | cost


TEACHER = made(table.TEACHER, {"1": 5.0, "2": 1.2, "4": 1.0})
GOOD = made("kd", {"1": 1.2, "2": 1.0, "4": 1.0})
WORSE = made("sid", {"1": 2.0, "2": 1.9, "4": 1.8})
BAD = made("boot", {"1": 6.0})
FAILED = {"preset": "dmd", "seed": 0, "failed": "diverged: not a number"}


def test_a_student_no_better_than_the_teacher_at_the_same_counts_is_experimental() -> None:
    assert not table.experimental(GOOD, TEACHER)
    assert table.experimental(WORSE, TEACHER)  # better at 1 step, worse over all: (2 1.9 1.8)^1/3 > (5 1.2 1)^1/3
    assert table.experimental(BAD, TEACHER)


def test_ranks_go_by_the_geometric_mean_and_leave_failures_out() -> None:
    ranks = table.ranks({"shapes": {"teacher": TEACHER, "screening": [FAILED, WORSE, GOOD]}})
    assert [(name, one["rank"], one["experimental"]) for name, one in ranks.items()] == [
        ("kd", 1, False),
        ("sid", 2, True),
    ]
    assert ranks["kd"]["fd_ratio"] == {"1": 1.2, "2": 1.0, "4": 1.0}


def test_ranks_over_two_tasks_are_of_the_geometric_means_and_of_methods_measured_on_both() -> None:
    shapes = {"teacher": TEACHER, "screening": [GOOD, WORSE, BAD]}
    digits = {
        "teacher": made(table.TEACHER, {"1": 20.0, "2": 4.8, "4": 1.0}),
        "screening": [WORSE, made("kd", {"1": 4.8})],
    }
    ranks = table.ranks({"shapes": shapes, "digits": digits})
    assert list(ranks) == ["sid", "kd"]  # boot is not known on digits; kd's one step, 2.4, is all that both have of it
    assert ranks["kd"]["fd_ratio"] == {"1": 2.4}
    assert not ranks["sid"]["experimental"]  # (2 1.9 1.8)^1/3 < (10 2.4 1)^1/3, the teachers' means
    assert table.ranks({"shapes": shapes})["sid"]["experimental"]


def test_a_student_of_four_steps_alone_is_ranked_after_those_of_all_counts() -> None:
    easy = made("progressive", {"4": 0.9})
    assert [one["preset"] for one in table.ranked([FAILED, easy, WORSE, GOOD])] == ["kd", "sid", "progressive", "dmd"]


@pytest.mark.parametrize(
    ("preset", "asked"), [("kd", (1, 2, 4)), ("boot", None), ("progressive", None), ("lightning", None)]
)
def test_methods_are_asked_for_all_counts_that_they_can_make(preset: str, asked: Any) -> None:
    assert counts_of(preset) == ({"counts": asked} if asked else {})


def test_seeds_of_a_preset_become_one_entry_of_medians_with_the_widest_interval() -> None:
    runs = [made("kd", {"4": ratio}, seed) for seed, ratio in enumerate((1.0, 1.3, 1.1))]
    (entry,) = table.entries(runs, TEACHER)
    assert (entry["method"], entry["fd_ratio"], entry["steps"], entry["seeds"]) == ("kd", 1.1, 4, [0, 1, 2])
    assert entry["interval"] == pytest.approx([0.9, 1.4])


def test_the_page_names_failures_and_recommends_the_best_of_each_situation() -> None:
    page = table.readme({"shapes": {"teacher": TEACHER, "screening": [FAILED, WORSE, GOOD], "final": []}})
    assert "| 1 step | `kd` | 1.20 | 1.00 | 1.00 |" in page
    assert "- `dmd`: diverged: not a number" in page
    assert "`sid` *experimental*" in page


def test_finals_are_one_line_a_method_of_medians_and_extremes_and_name_seeds_that_failed() -> None:
    runs = [made("kd", {"1": ratio, "4": 1.0}, seed) for seed, ratio in enumerate((1.3, 1.1, 1.6))]
    failed = {"preset": "lsd", "seed": 2, "failed": "diverged"}
    better = [*(made("lsd", {"1": 1.0, "4": 0.9}, seed) for seed in (0, 1)), failed]
    page = table.readme({"shapes": {"teacher": TEACHER, "screening": [GOOD], "final": [*runs, *better]}})
    final = page.partition("## shapes: final")[2]
    assert "| 1 | `lsd` | 2 of 3 | 1.00 (1.00 – 1.00) | – | 0.90 (0.90 – 0.90) |" in final
    assert "| 2 | `kd` | 3 | 1.30 (1.10 – 1.60) | – | 1.00 (1.00 – 1.00) |" in final


def test_a_mark_is_explained_by_what_was_seen_on_its_own_task_and_a_new_task_has_no_reasons_yet() -> None:
    marked = made("ladd", {"1": 6.0, "2": 2.0, "4": 2.0})
    tasks = {name: {"teacher": TEACHER, "screening": [marked], "final": []} for name in ("shapes", "digits", "new")}
    lines = [line for line in table.readme(tasks).splitlines() if line.startswith("- `ladd`")]
    reasons = [WHY["shapes"]["ladd"], WHY["digits"]["ladd"], "No reason has been found yet."]
    assert [line.endswith(reason) for line, reason in zip(lines, reasons, strict=True)] == [True] * 3


def test_the_picture_has_a_dot_for_every_figure_that_stands_the_further_left_the_better_it_is() -> None:
    picture = ElementTree.fromstring(table.drawn([FAILED, WORSE, GOOD, BAD], TEACHER, "shapes"))
    svg = "{http://www.w3.org/2000/svg}"
    dots = {
        group.findtext(f"{svg}title", ""): float(group.find(f"{svg}circle").get("cx", ""))  # type: ignore[union-attr]
        for group in picture.iter(f"{svg}g")
    }
    assert [said.partition(":")[0] for said in dots] == [
        *(f"the teacher itself, {k}" for k in ("1 step", "2 steps", "4 steps")),
        *(f"1  kd, {k}" for k in ("1 step", "2 steps", "4 steps")),
        *(f"2  sid, {k}" for k in ("1 step", "2 steps", "4 steps")),
        "3  boot, 1 step",
    ]
    by_ratio = sorted(dots, key=lambda said: float(said.split(": ")[1].split()[0]))
    places = [dots[said] for said in by_ratio]
    assert places == sorted(places)
    ticks = {text.text: float(text.get("x", "")) for text in picture.iter(f"{svg}text")}
    assert dots[by_ratio[0]] == pytest.approx(ticks["1"], abs=0.1)  # a ratio of 1
    assert ticks["2"] < dots["the teacher itself, 1 step: 5.00 (4.90 to 5.10)"] == pytest.approx(ticks["5"], abs=0.1)


def test_what_the_ledger_has_is_not_made_again_and_stays_in_it(tmp_path: Path) -> None:
    here, there = Wanted("shapes", "kd", 0, 1000, 2000), Wanted("shapes", "sid", 0, 1000, 2000)
    options = Namespace(work=tmp_path, ledger=tmp_path / "ledger.json", workers=1, budget_minutes=1e-9)
    options.ledger.write_text(json.dumps({there.name: WORSE}))
    ledger = Ledger(options)
    here.file(tmp_path).write_text(json.dumps(GOOD))
    assert [one["preset"] for one in ledger.made([here, there], "")] == ["kd", "sid"]
    assert not there.file(tmp_path).exists()
    ledger.write()
    assert json.loads(options.ledger.read_text()).keys() == {here.name, there.name}


def test_the_committed_ranks_are_of_methods_that_exist() -> None:
    ranks = json.loads(_schemas.LEADERBOARD.read_text())
    assert len(ranks) > 30
    assert ranks.keys() <= _schemas.schemas().keys()
    assert sorted(one["rank"] for one in ranks.values()) == list(range(1, len(ranks) + 1))


def test_every_method_that_is_marked_has_a_sentence_on_why() -> None:
    ranks = json.loads(_schemas.LEADERBOARD.read_text())
    assert {name for name, one in ranks.items() if one["experimental"]} <= {
        name for why in WHY.values() for name in why
    }
