"""A sweep: what its file means, which jobs it stops, and its leaderboard."""

import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from engines.errors import AlreadyEnded, InvalidRequest, Unavailable
from server.commands.sweep import Sweep, run
from server.sweep import Curve, Trial, hopeless, leaderboard, markdown, trials

BASE = {"student": {"name": "s", "steps": [1, 2]}, "method": {"name": "kd", "lr": 1}, "train": {"iterations": 100}}


def curve(*values: float, shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)) -> Curve:
    return Curve(list(shares[: len(values)]), list(values))


def finished(job_id: str, ratio: float | None, **more: Any) -> dict[str, Any]:
    figures = {"1": {"fd_ratio": ratio, "grain_ratio": 1.5}, "2": {"fd_ratio": ratio, "grain_ratio": 0.5}}
    return {
        "id": job_id, "status": "succeeded", "metrics": figures if ratio else None, "gates": {"passed": True},
        "started_at": "2026-01-01T00:00:00.000Z", "finished_at": "2026-01-01T00:01:30.000Z", "student": f"s@{job_id}",
        **more,
    }  # fmt: skip


# --- the file -----------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_leaves_its_base_alone() -> None:
    found = trials({"base": BASE, "grid": {"method.lr": [1, 2], "train.seed": [0, 1, 2]}})
    assert [one.name for one in found][:2] == ["method.lr=1 train.seed=0", "method.lr=1 train.seed=1"]
    assert [(one.spec["method"]["lr"], one.spec["train"]["seed"]) for one in found] == [
        (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    assert "seed" not in BASE["train"]
    assert all(one.spec["method"]["name"] == "kd" for one in found)


def test_a_field_may_be_new_or_stand_in_a_list_of_stages() -> None:
    staged = {**BASE, "method": [{"name": "kd"}, {"name": "sid"}]}
    found = trials({"base": staged, "grid": {"method.1.lr": [3], "eval.samples": [64]}})
    assert found[0].spec["method"] == [{"name": "kd"}, {"name": "sid", "lr": 3}]
    assert found[0].spec["eval"] == {"samples": 64}


def test_a_list_of_jobs_is_named_by_place_and_method() -> None:
    found = trials([BASE, {**BASE, "method": [{"name": "kd"}, {"name": "sid"}]}])
    assert [one.name for one in found] == ["1. kd", "2. kd + sid"]


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ([], "a sweep is a list of jobs"),
        ({"base": BASE}, "a sweep is a list of jobs"),
        ({"base": BASE, "grid": {}}, "`base` is a job"),
        ({"base": BASE, "grid": {"train.seed": 3}}, "give a list of values"),
        ({"base": BASE, "grid": {"method.name.x": [1]}}, "no place called 'x'"),
        ({"base": {**BASE, "method": [{"name": "kd"}]}, "grid": {"method.4.lr": [1]}}, "no place called '4'"),
        ([BASE, BASE], "names a job twice"),
        ([{**BASE, "when": date(2026, 1, 1)}], "not JSON"),
        ({"base": BASE, "grid": {3: [1]}}, "grid.3 is no field"),
        ([{**BASE, 4: 1}], "not JSON"),
    ],
)
def test_what_is_no_sweep_is_refused_with_a_reason(sweep: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        trials(sweep)


def test_the_shipped_example_is_a_sweep() -> None:
    example = Path(__file__).parents[3] / "examples" / "sweep.yaml"
    assert len(trials(yaml.safe_load(example.read_text()))) == 4


def test_the_same_spec_has_the_same_key_and_another_tag_another() -> None:
    one, same, other = Trial("a", BASE), Trial("b", dict(reversed(BASE.items()))), Trial("a", {**BASE, "x": 1})
    assert one.key("") == same.key("")
    assert len({one.key(""), one.key("again"), other.key("")}) == 3


# --- the rule -----------------------------------------------------------------------------------------------

OTHERS = [curve(3, 2, 1), curve(4, 3, 2), curve(5, 4, 3)]  # running averages at .5: 2.5, 3.5, 4.5


def test_a_best_value_behind_the_median_of_running_averages_is_hopeless() -> None:
    assert hopeless(curve(5, 3.6), OTHERS)
    assert not hopeless(curve(5, 3.4), OTHERS)
    assert not hopeless(curve(3.4, 9), OTHERS)  # its best counts, not its last
    assert not hopeless(curve(3.5, 3.5), OTHERS)  # as good as the median


def test_what_a_trainer_says_again_replaces_what_it_said() -> None:
    again = curve(3, 2)  # at .25 and .5, then back to a checkpoint
    again.add(0.25, 5)
    assert (again.shares, again.values) == ([0.25], [5])


def test_what_the_others_reached_later_does_not_count() -> None:
    late = [curve(5, 5, 0, 0)] * 3
    assert not hopeless(curve(4, 4), late)
    assert hopeless(curve(4, 4, 4), late)


def test_where_more_is_better_the_rule_is_turned_round() -> None:
    others = [curve(0.5, 0.6), curve(0.6, 0.7), curve(0.7, 0.8)]
    assert hopeless(curve(0.3, 0.4), others, lower_is_better=False)
    assert not hopeless(curve(0.3, 0.7), others, lower_is_better=False)


def test_nothing_is_hopeless_early_at_the_end_or_before_enough_others_came_as_far() -> None:
    bad = 99.0
    assert not hopeless(Curve(), OTHERS)
    assert not hopeless(curve(bad, shares=(0.2,)), [curve(1, 1, shares=(0.1, 0.3))] * 3)
    assert hopeless(curve(bad, bad), OTHERS)
    assert not hopeless(curve(bad, bad), OTHERS, grace=0.6)
    assert not hopeless(curve(bad, bad), OTHERS[:2])
    assert not hopeless(curve(bad, bad), [*OTHERS[:2], curve(1)])
    assert not hopeless(curve(bad, bad, bad, bad), [curve(1, 1, 1, 1)] * 3)


# --- the leaderboard ----------------------------------------------------------------------------------------


def test_the_best_is_first_and_what_made_nothing_last() -> None:
    results = [
        (Trial("c", BASE), finished("dj_c", None, status="failed", gates=None)),
        (Trial("b", BASE), finished("dj_b", 1.2)),
        (Trial("a", BASE), finished("dj_a", 1.1)),
        (Trial("d", BASE), finished("dj_d", 0.5, status="canceled", gates=None)),
    ]
    found = leaderboard(results)
    assert [one["trial"] for one in found] == ["a", "b", "c", "d"]
    assert [one["status"] for one in found] == ["succeeded", "succeeded", "failed", "stopped"]
    assert found[0]["score"] == pytest.approx(1.1)
    assert found[0]["seconds"] == 90
    assert found[3]["figures"] == {}  # what an evaluation while training said is no result


def test_the_table_has_a_line_for_each_trial_and_columns_for_each_count() -> None:
    text = markdown(
        leaderboard([(Trial("a|b", BASE), finished("dj_a", 1.1)), (Trial("z", BASE), finished("dj_z", None))])
    )
    lines = text.splitlines()
    assert "fd ratio at 1 | fd ratio at 2" in lines[0]
    assert lines[2] == "| a\\|b | succeeded | 1.100 | 1.100 | – | – | 1.000 | passed | 90 | dj_a |"
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


# --- over HTTP ----------------------------------------------------------------------------------------------


class Jobs:
    """A gateway and its distiller in small: whenever it is asked for the oldest open job, a quarter of that is done.

    What a job's evaluations say is in its spec, as `said`; a key makes a job once.
    """

    def __init__(self) -> None:
        self.by_key: dict[str, dict[str, Any]] = {}
        self.estimated = 0

    def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> dict[str, Any]:
        if path.endswith("/estimate"):
            self.estimated += 1
            if "said" not in body:
                raise InvalidRequest("said: missing", param="said")
            return {}
        if path.endswith("/cancel"):
            job = self._find(path.split("/")[-2])
            if job["status"] != "running":
                raise AlreadyEnded("it has ended")
            before = dict(job)
            job["status"] = "canceled"
            return before  # its distiller obeys a little later
        key = (headers or {})["idempotency-key"]
        more = {"status": "running", "spec": body, "step": 0, "total_steps": 100}
        return dict(self.by_key.setdefault(key, finished(f"dj_{len(self.by_key)}", body["said"][-1], **more)))

    def get(self, path: str, after: int = 0) -> dict[str, Any]:
        job = self._find(path.split("/")[4])
        if path.endswith("/events"):
            done, said = job["step"] // 25, job["spec"]["said"]
            events = [{"event": "status", "id": 1, "status": "running"}]
            events += [
                {"event": "metric", "id": i + 2, "step": 25 * (i + 1), "total_steps": 100, "metrics": {"fd": said[i]}}
                for i in range(done)
            ]
            return {"data": events[after:]}
        running = [one for one in self.by_key.values() if one["status"] == "running"]
        if running and job is running[0]:
            job["step"] += 25
            job["status"] = "succeeded" if job["step"] == 100 else "running"
        return dict(job)

    def _find(self, job_id: str) -> dict[str, Any]:
        return next(job for job in self.by_key.values() if job["id"] == job_id)


def specs(*said: list[float]) -> list[Trial]:
    return [Trial(f"t{i}", {"said": values}) for i, values in enumerate(said)]


GOOD = ([2.0, 1.5, 1.2, 1.1], [2.1, 1.6, 1.3, 1.2], [1.9, 1.4, 1.1, 1.0])


def made(jobs: Jobs, found: list[Trial], folder: Path, **settings: Any) -> str:
    """Runs a sweep to its end; what it printed."""
    console = Console(file=io.StringIO(), width=200)
    run(Sweep(jobs, found, **settings), folder, console, wait=lambda seconds: None)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_sweep_runs_to_its_leaderboard_and_stops_what_falls_behind(tmp_path: Path) -> None:
    jobs = Jobs()
    said = made(jobs, specs(*GOOD, [9.0, 8.0, 7.0, 0.1]), tmp_path)
    assert "t3: stopped at 25% of its budget" in said
    assert [job["status"] for job in jobs.by_key.values()] == ["succeeded"] * 3 + ["canceled"]
    entries = json.loads((tmp_path / "leaderboard.json").read_text())["entries"]
    assert [(one["trial"], one["status"]) for one in entries] == [
        ("t2", "succeeded"), ("t0", "succeeded"), ("t1", "succeeded"), ("t3", "stopped"),
    ]  # fmt: skip
    assert (tmp_path / "leaderboard.md").read_text().count("\n") == 6


class Shaky(Jobs):
    """Every third look, and the first of each cancellation, finds nobody."""

    def __init__(self, gone: bool = False) -> None:
        super().__init__()
        self.gone, self.looks, self.refused = gone, 0, set[str]()

    def get(self, path: str, after: int = 0) -> dict[str, Any]:
        self.looks += 1
        if self.gone or self.looks % 3 == 0:
            raise Unavailable("nobody answers")
        return super().get(path, after)

    def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> dict[str, Any]:
        if path.endswith("/cancel") and path not in self.refused:
            self.refused.add(path)
            raise Unavailable("the owner cannot be told now")
        return super().post(path, body, headers)


def test_a_gateway_that_is_away_for_a_moment_neither_ends_a_sweep_nor_its_stopping(tmp_path: Path) -> None:
    jobs = Shaky()
    made(jobs, specs(*GOOD, [9.0, 8.0, 7.0, 0.1]), tmp_path)
    assert [job["status"] for job in jobs.by_key.values()] == ["succeeded"] * 3 + ["canceled"]


def test_a_gateway_that_stays_away_ends_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        made(Shaky(gone=True), specs(*GOOD), tmp_path)


def test_a_grace_of_one_stops_nothing(tmp_path: Path) -> None:
    jobs = Jobs()
    made(jobs, specs(*GOOD, [9.0, 8.0, 7.0, 6.0]), tmp_path, grace=1.0)
    assert {job["status"] for job in jobs.by_key.values()} == {"succeeded"}


def test_a_sweep_that_was_left_is_taken_up_and_makes_no_job_twice(tmp_path: Path) -> None:
    jobs, found = Jobs(), specs(*GOOD, [9.0, 8.0, 7.0, 6.0])
    left = Sweep(jobs, found)  # type: ignore[arg-type]
    left.submit()
    for _ in range(6):
        left.look()
    assert not left.done
    made(jobs, found, tmp_path)
    assert len(jobs.by_key) == 4
    assert [job["status"] for job in jobs.by_key.values()] == ["succeeded"] * 3 + ["canceled"]
    made(jobs, found, tmp_path, tag="again")
    assert len(jobs.by_key) == 8


def test_one_bad_trial_is_named_before_any_is_submitted(tmp_path: Path) -> None:
    jobs = Jobs()
    with pytest.raises(InvalidRequest, match="bad: said: missing"):
        made(jobs, [*specs(*GOOD), Trial("bad", {})], tmp_path)
    assert (jobs.estimated, jobs.by_key) == (4, {})


def test_jobs_that_are_compared_by_different_metrics_are_refused() -> None:
    mixed = [Trial("a", {"eval": {"best_by": "diversity"}}), Trial("b", {})]
    with pytest.raises(InvalidRequest, match="not by diversity and fd"):
        Sweep(Jobs(), mixed)  # type: ignore[arg-type]


def test_a_job_that_ends_while_it_is_being_stopped_counts_as_what_it_became(tmp_path: Path) -> None:
    class Hasty(Jobs):
        def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> dict[str, Any]:
            if path.endswith("/cancel"):
                self._find(path.split("/")[-2])["status"] = "succeeded"
            return super().post(path, body, headers)

    made(Hasty(), specs(*GOOD, [9.0, 8.0, 7.0, 6.0]), tmp_path)
    entries = json.loads((tmp_path / "leaderboard.json").read_text())["entries"]
    assert {one["status"] for one in entries} == {"succeeded"}
