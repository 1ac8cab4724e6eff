"""Which commands there are, and how one is written. User side of the VMM process.

A command is a function in a file of this folder; it has a line in GROUPS. It declares its command line once,
in the types of its parameters, with `vmrun.cli.declare`:

    from typing import Annotated
    from vmrun.cli.declare import Argument, Option

    def snapshot(
        name: Annotated[str, Argument(metavar="NAME", help="The machine.")],
        disk: Annotated[list[str] | None, Option(metavar="PATH", help="Repeatable.")] = None,
        stop: Annotated[bool, Option("--stop", "-s", help="End the machine then.")] = False,
    ) -> int:
        \"\"\"Write a machine to a directory.

        The first paragraph is the line in `vmrun --help`; all of it is in `vmrun snapshot --help`.
        \"\"\"
        from vmrun.control.client import MachineClient   # what is heavy is imported when the command runs
        ...
        return 0                                         # the exit code

- A type is `bool` (a flag, False by default), or `int`, `str` or `Path`, or `list[str]` or `list[Path]` (an
  option that may be repeated, or all arguments that are left); all but `bool` perhaps `| None`. A parameter
  without a default is required. Without a name an option is called as its parameter.
- Sizes, times and the like are `str`, read by `vmrun.cli.options`; a UserError there names the option.
- Not in such a file: `from __future__ import annotations` (the types are read when the program runs), Typer,
  and at its top any import that another command can do without.
- `-- CMD ARG...` is an Argument of type `list[str]` in the last place.

A group of commands (`vmrun disk info`) is a file with `HELP`, one sentence, and `COMMANDS`, its functions by
name.

`fast_path` reads a well-formed command line by these declarations alone; `typer_app` makes the Typer
application of them, which has the help, the errors and everything else.
"""

from importlib import import_module
from typing import Any

from vmrun.cli.declare import Command

# The commands under their headings in `vmrun --help`, and the file of each. A group is its file's name.
GROUPS: dict[str, dict[str, str]] = {
    "Run commands": {
        "run": "run_command",
        "exec": "exec",
        "shell": "exec",
        "cp": "exec",
        "template": "template",
    },
    "Start machines": {"boot": "boot", "up": "up", "restore": "snapshot", "clone": "snapshot"},
    "Look at machines": {
        "ps": "machines",
        "inspect": "machines",
        "top": "machines",
        "console": "console",
        "log": "console",
    },
    "Control machines": {
        "stop": "machines",
        "down": "up",
        "wait": "machines",
        "reset": "machines",
        "pause": "machines",
        "resume": "machines",
        "snapshot": "snapshot",
        "resize": "machines",
    },
    "Disk images": {"disk": "disk", "image": "image"},
    "This host": {"doctor": "doctor", "guest": "guest", "worker": "worker"},
}


def load(name: str, file: str) -> Any:
    """The command `name` of `file`: a function, or the module if it is a group."""
    module = import_module(f"vmrun.cli.{file}")
    return module if hasattr(module, "COMMANDS") else getattr(module, name)


def find(words: list[str]) -> tuple[Command, list[str]] | None:
    """The command that `words` begin with, spelt out, and the words after its name; None if there is none."""
    for group in GROUPS.values():
        if words and words[0] in group:
            name, *rest = words
            found = load(name, group[name])
            if not hasattr(found, "COMMANDS"):
                return found, rest
            if rest and rest[0] in found.COMMANDS:
                return found.COMMANDS[rest[0]], rest[1:]
    return None
