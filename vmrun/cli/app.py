"""The Typer application: which commands there are. Each command group has its own file and imports what it
needs when its command runs. User side of the VMM process.
"""

from typing import Annotated, Any

import typer
from typer import Exit as Exit

from vmrun.cli import boot, console, disk, doctor, guest, machines, print_version, worker

# Typer brings its own copy of click in newer versions and uses the real one in older ones; either way this is
# the base class of what is wrong with a command line.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]


# How `vmrun --help` groups them. A command that is in no group here comes last.
GROUPS = {
    "Start machines": ("boot",),
    "Look at machines": ("ps", "inspect", "top", "console", "log"),
    "Control machines": ("stop", "wait", "reset", "pause", "resume"),
    "Disk images": ("disk",),
    "This host": ("doctor", "guest", "worker"),
}


class GroupedCommands(typer.core.TyperGroup):
    """The list of commands in --help, under the headings of GROUPS."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        grouped = {name for group in GROUPS.values() for name in group}
        others = tuple(name for name in names if name not in grouped)
        width = max(len(name) for name in names)
        for heading, group in (GROUPS | {"Other commands": others}).items():
            rows = []
            for name in group:
                command = self.get_command(ctx, name)
                if command is not None and not command.hidden:
                    text = command.get_short_help_str(formatter.width - 6 - width)
                    rows.append((name.ljust(width), text))
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def command() -> Any:
    """The whole command line, ready to parse. Plain help and errors: Rich would take longer to import than to
    read.
    """
    app = typer.Typer(
        name="vmrun",
        cls=GroupedCommands,
        help="Run microVMs on Linux/KVM: real disks and taps, a sandboxed process for each.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(vmrun)
    app.command("boot", epilog=boot.EPILOG)(boot.boot)
    for command in (
        machines.ps,
        machines.inspect,
        machines.top,
        console.console,
        console.log,
        machines.stop,
        machines.wait,
        machines.reset,
        machines.pause,
        machines.resume,
        doctor.doctor,
    ):
        app.command(command.__name__)(command)
    app.add_typer(disk.app(), name="disk")
    app.add_typer(guest.app(), name="guest")
    app.add_typer(worker.app(), name="worker")
    return typer.main.get_command(app)


def vmrun(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        raise typer.Exit(print_version())
    if context.invoked_subcommand is None:
        print(context.get_help())


def usage_message(error: Exception) -> str:
    """One line for what is wrong with the command line, and where to look."""
    text: str = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "vmrun"
    return f"{' '.join(text.split()).rstrip('.')} (see {path} --help)"
