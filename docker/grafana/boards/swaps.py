"""Swaps and students: which versions serve since when, what a swap cost, and how good each version is."""

from boards.board import MODEL, Board, Panel, Query, mean, p50_p95, quantile, rate

JUDGED = 'metric=~"(fd_ratio|alignment_ratio|diversity_ratio)@.*"'

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
        ),
        Panel(
            "Swaps",
            "Swaps ended since the workers started, by how.",
            "short",
            (Query(f"sum by (result) (fewstep_swaps_total{{{MODEL}}})", "{{result}}"),),
            kind="stat",
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
        ),
        Panel(
            "Quality by version",
            "From its report, against the guided teacher: of fd_ratio less is better, of the others more.",
            "none",
            (
                Query(
                    f"max by (version, metric) (fewstep_student_quality{{{MODEL},{JUDGED}}})", "{{version}} {{metric}}"
                ),
            ),
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
