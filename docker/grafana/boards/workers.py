"""Workers: whether calls take what the cost model says, and what memory, caches and Redis hold."""

from boards.board import MODEL, WINDOW, Board, Limit, Panel, Query, State, quantile
from boards.swaps import SERVES

CACHED = f'sum(rate(fewstep_embedding_cache_total{{result="hit"}}[{WINDOW}]))'


def of_limit(what: str) -> str:
    """Share of its limit; a process that has no such thing has no limit either."""
    return f"fewstep_{what}_bytes / (fewstep_{what}_limit_bytes > 0)"


BOARD = Board(
    "fewstep-workers",
    "Fewstep: workers",
    (
        Panel(
            "Up",
            "1 for each process that answers its scrape.",
            "none",
            (Query('up{job=~"fewstep-.*"}', "{{job}} {{instance}}"),),
            kind="timeline",
            states={1: State("up", "green"), 0: State("down", "red")},
        ),
        Panel(
            "Step time",
            "One network evaluation of one batch.",
            "s",
            (Query(quantile(0.95, "step_seconds", "version, backend"), "{{version}} {{backend}} p95"),),
        ),
        Panel(
            "Measured against the cost model",
            "Engine time over what was expected of the same calls: above 1 admission promises too much.",
            "none",
            (
                Query(
                    f"sum by (stage) (rate(fewstep_call_seconds_total[{WINDOW}]))"
                    f" / sum by (stage) (rate(fewstep_call_expected_seconds_total[{WINDOW}]))",
                    "{{stage}}",
                ),
            ),
            limits=(Limit(1, "orange"),),
        ),
        Panel(
            "Engines busy",
            "Engine calls under way on average: the number of streams is the most.",
            "short",
            (Query(f"sum by (instance) (rate(fewstep_call_seconds_total[{WINDOW}]))", "{{instance}}"),),
        ),
        Panel(
            "Processor",
            "Cores that each process keeps busy.",
            "short",
            (Query(f'rate(process_cpu_seconds_total{{job=~"fewstep-.*"}}[{WINDOW}])', "{{job}} {{instance}}"),),
        ),
        Panel(
            "Memory",
            "Resident memory of each process, and the weights that workers hold.",
            "bytes",
            (
                Query('process_resident_memory_bytes{job=~"fewstep-.*"}', "{{job}} {{instance}}"),
                Query("fewstep_resident_bytes and fewstep_resident_limit_bytes > 0", "{{instance}} weights"),
            ),
        ),
        Panel(
            "Shares of limits",
            "Weights in memory, compiled engines on disk, Redis.",
            "percentunit",
            (
                Query(of_limit("resident"), "{{instance}} weights"),
                Query(of_limit("engine_cache"), "{{instance}} engine cache"),
                Query(f"max({of_limit('redis_memory')})", "Redis"),
            ),
            limits=(Limit(0.8, "orange"), Limit(1, "red")),
        ),
        Panel(
            "Prompt cache",
            "Share of prompt embeddings that were there already.",
            "percentunit",
            (Query(f"{CACHED} / sum(rate(fewstep_embedding_cache_total[{WINDOW}]))", "hits"),),
        ),
        Panel(
            "Redis is durable",
            "1 while Redis appends to its file and the last writes succeeded.",
            "none",
            (Query("min(fewstep_redis_durable and fewstep_redis_memory_limit_bytes > 0)", "durable"),),
            kind="timeline",
            states={1: State("durable", "green"), 0: State("not durable", "red")},
        ),
        Panel(
            "Versions per worker",
            "1 for each version that a worker serves.",
            "none",
            (Query(f"max by (instance, version) (fewstep_model_info{{{MODEL}}})", "{{instance}} {{version}}"),),
            kind="timeline",
            states=SERVES,
        ),
    ),
)
