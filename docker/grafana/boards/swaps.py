"""Swaps and students: which versions serve since when, what a swap cost, and how good each version is."""

from boards.board import MODEL, Board, Limit, Panel, Query, State, mean, p50_p95, quantile, rate

SERVES = {1: State("serves", "green")}


def judged(metric: str) -> str:
    """A figure of each version's report at each of its step counts."""
    figures = f'fewstep_student_quality{{{MODEL},metric=~"{metric}@.*"}}'
    return f'max by (version, steps) (label_replace({figures}, "steps", "$1", "metric", ".*@(.*)"))'


BOARD = Board(
    "fewstep-swaps",
    "Fewstep: swaps and students",
    (
        Panel(
            "Versions",
            "A bar for as long as a version serves; a new one begins before the old one ends.",
            "none",
            (Query(f"max by (model, version) (fewstep_model_info{{{MODEL}}})", "{{model}} {{version}}"),),
            kind="timeline",
            states=SERVES,
        ),
        Panel(
            "Swaps",
            "Swaps ended since the workers started, by how.",
            "short",
            (Query(f"sum by (result) (fewstep_swaps_total{{{MODEL}}})", "{{result}}"),),
            kind="stat",
            alarming=("dropped",),
        ),
        Panel(
            "Rejected",
            "Candidates that were dropped in the last hour; the deployment's history says why.",
            "short",
            (Query(f'sum by (model) (increase(fewstep_swaps_total{{{MODEL},result="dropped"}}[1h]))', "{{model}}"),),
        ),
        Panel(
            "Phases",
            "Mean seconds of each phase of a swap in the last hour.",
            "s",
            (Query(mean("swap_seconds", "phase", "1h"), "{{phase}}"),),
        ),
        Panel(
            "Stall",
            "Longest time in a swap with a live row waiting and no step done.",
            "s",
            (Query(quantile(1, "swap_stall_seconds", "model", "1h"), "{{model}} worst"),),
            limits=(Limit(1, "orange"),),
        ),
        Panel(
            "Quality by version",
            "From its report, as ratios to the guided teacher: of fd less is better, of the others more.",
            "none",
            tuple(Query(judged(f"{name}_ratio"), name) for name in ("fd", "alignment", "diversity", "grain")),
            kind="table",
        ),
        Panel(
            "Latency by version",
            "Beside the quality: what each version takes, from HTTP request to answer.",
            "s",
            p50_p95("request_seconds", "version", "{{version}}", exemplars=True),
        ),
        Panel(
            "Requests by version",
            "Answers per second: a swap hands them over at once.",
            "reqps",
            (Query(rate("request_seconds_count", "version"), "{{version}}"),),
            stacked=True,
        ),
        Panel(
            "Step time by version",
            "One network evaluation of one batch.",
            "s",
            (Query(quantile(0.95, "step_seconds", "version, backend"), "{{version}} {{backend}} p95"),),
        ),
    ),
)
