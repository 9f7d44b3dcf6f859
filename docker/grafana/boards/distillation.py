"""Distillation: which jobs there are, how far and how good each is, and what it uses."""

from boards.board import WINDOW, Board, Limit, Panel, Query

BOARD = Board(
    "fewstep-distillation",
    "Fewstep: distillation",
    (
        # Every distiller counts the jobs of the whole registry.
        Panel(
            "Jobs",
            "Jobs by state.",
            "short",
            (Query("max by (state) (fewstep_distill_jobs)", "{{state}}"),),
            kind="stat",
            alarming=("failed",),
        ),
        Panel(
            "Time in state",
            "Of the jobs on hand; a running one that takes no steps is stuck.",
            "s",
            (Query("time() - max by (job_id, state) (fewstep_distill_state_since_seconds)", "{{job_id}} {{state}}"),),
        ),
        Panel(
            "Progress",
            "Share of the iterations done.",
            "percentunit",
            (
                Query(
                    "max by (job_id) (fewstep_distill_step) / max by (job_id) (fewstep_distill_steps_planned)",
                    "{{job_id}}",
                ),
            ),
        ),
        Panel(
            "Loss by role",
            "Not a result: look at the metrics beside it.",
            "short",
            (Query("max by (job_id, role) (fewstep_distill_loss)", "{{job_id}} {{role}}"),),
        ),
        Panel(
            "Fréchet distance against the teacher",
            "The student's while it trains; once it is judged, the teacher's at its own and at the student's steps.",
            "short",
            (
                Query(
                    'max by (job_id, metric, who) (fewstep_distill_metric{metric=~"fd(@.*)?"})',
                    "{{job_id}} {{who}} {{metric}}",
                ),
            ),
        ),
        Panel(
            "Alignment and diversity against the teacher",
            "The same of what was asked for, and of how much pictures differ.",
            "short",
            (
                Query(
                    'max by (job_id, metric, who) (fewstep_distill_metric{metric=~"(alignment|diversity)(@.*)?"})',
                    "{{job_id}} {{who}} {{metric}}",
                ),
            ),
        ),
        Panel(
            "Time left",
            "Of training, by its speed now.",
            "s",
            (Query("max by (job_id) (fewstep_distill_eta_seconds)", "{{job_id}}"),),
        ),
        Panel(
            "Speed",
            "Iterations per second of the stage that trains.",
            "short",
            (Query("max by (job_id) (fewstep_distill_iterations_per_second)", "{{job_id}}"),),
        ),
        Panel(
            "Processor",
            "Cores that the trainer and the distiller itself keep busy.",
            "short",
            (
                Query(f"sum by (job_id) (rate(fewstep_distill_cpu_seconds[{WINDOW}]))", "{{job_id}} trainer"),
                Query(f'sum(rate(process_cpu_seconds_total{{job="fewstep-distiller"}}[{WINDOW}]))', "distillers"),
            ),
        ),
        Panel(
            "Memory",
            "Resident memory of the trainer and of the distiller itself.",
            "bytes",
            (
                Query("max by (job_id) (fewstep_distill_memory_bytes)", "{{job_id}} trainer"),
                Query('process_resident_memory_bytes{job="fewstep-distiller"}', "{{instance}}"),
            ),
        ),
        Panel(
            "Trainer deaths",
            "Trainers that died unasked and were started again.",
            "short",
            (Query("sum(fewstep_distill_trainer_deaths_total)", "deaths"),),
            kind="stat",
            limits=(Limit(1, "orange"),),
        ),
    ),
)
