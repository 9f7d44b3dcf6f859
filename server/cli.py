"""`fewstep`: every command of the product, and with `embedded` the place where the two halves are put together."""

import typer

from server.commands import backup, calibrate, deployments, distill, gc, imports, processes, stack, students
from server.commands.generate import generate
from server.commands.terminal import one_sentence_errors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Serve few-step image generators, and make them: distil, gate, swap, watch.",
)
_HERE, _USE, _PROCESSES = "On this machine", "Use a running system", "Single processes"
_UPKEEP = "Keep a system"

app.command(rich_help_panel=_HERE)(stack.up)
app.command(rich_help_panel=_HERE)(stack.demo)
app.command(rich_help_panel=_USE)(generate)
app.add_typer(distill.app, name="distill", rich_help_panel=_USE)
students.app.command("import")(imports.import_)
students.app.command()(calibrate.calibrate)
app.add_typer(students.app, name="students", rich_help_panel=_USE)
app.command(rich_help_panel=_USE)(deployments.deployments)
app.command(rich_help_panel=_USE)(deployments.promote)
app.command(rich_help_panel=_USE)(deployments.rollback)
app.command(rich_help_panel=_UPKEEP)(gc.gc)
app.command(rich_help_panel=_UPKEEP)(backup.backup)
app.command(rich_help_panel=_UPKEEP)(backup.restore)
app.command(rich_help_panel=_PROCESSES)(processes.gateway)
app.command(rich_help_panel=_PROCESSES)(processes.worker)
app.command(rich_help_panel=_PROCESSES)(processes.distiller)
app.command(rich_help_panel=_PROCESSES)(processes.seed)


def main() -> None:
    one_sentence_errors(app)


if __name__ == "__main__":
    main()
