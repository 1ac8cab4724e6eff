"""The commands as a Typer application: help, errors, and every command line that `fast_path` leaves alone.
User side of the VMM process.
"""

import inspect
import shlex
from typing import Annotated, Any

import typer

from vmrun.cli import app, print_version
from vmrun.cli.declare import Argument, Command, Parameter, parameters
from vmrun.errors import UserError

HELP = """Run commands and whole disks in virtual machines of their own, on Linux/KVM.

\b
  vmrun run -- uname -a
  vmrun boot --disk x.qcow2 --nic tap0

`vmrun COMMAND --help` tells more of each.
"""

# Typer brings its own copy of click in newer versions and uses the real one in older ones; either way this is
# the base class of what is wrong with a command line.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]

# What people type who know docker or QEMU, and what says the same here: of that the nearest spelling knows
# nothing (--mem for --volume). "" are the commands; of a command, "" is an argument that it does not take.
PROCESSORS_AND_MEMORY = {
    **dict.fromkeys(("-m", "--memory"), "give --mem SIZE"),
    **dict.fromkeys(("-c", "-smp", "--smp"), "give --cpus N"),
}
RUN_IN_A_GUEST = {
    **dict.fromkeys(("-it", "-ti"), "give -t alone: stdin is always passed on"),
    **dict.fromkeys(("-i", "--interactive"), "stdin is always passed on: leave it out; -t gives a terminal"),
    "--privileged": "the machine is the command's own: leave it out",
}
HINTS: dict[str, dict[str, str]] = {
    "": {
        "attach": "give vmrun console NAME",
        "create": "give vmrun boot",
        "help": "give vmrun --help or vmrun COMMAND --help",
        "images": "give vmrun image list",
        "kill": "give vmrun stop -f NAME",
        "list": "give vmrun ps",
        "logs": "give vmrun log NAME",
        "ls": "give vmrun ps",
        "rm": "give vmrun stop NAME: of a machine that has ended nothing is left to remove",
        "ssh": "give vmrun shell NAME",
        "start": "give vmrun boot",
        "stats": "give vmrun top",
        "version": "give vmrun --version",
    },
    "run": {
        **PROCESSORS_AND_MEMORY,
        **RUN_IN_A_GUEST,
        **dict.fromkeys(("-v", "--volume"), "give --mount HOST:GUEST"),
        **dict.fromkeys(
            ("-d", "--detach", "--name"), "give vmrun boot -d --name NAME, or run --keep DIRECTORY to save it"
        ),
        **dict.fromkeys(("-p", "--publish"), "nothing comes in from outside, but on a tap: give --net TAP"),
        "--entrypoint": "give the program behind --",
        "--read-only": "what is written to the root is thrown away: leave it out",
        "--rm": "always so: leave it out",
    },
    "exec": RUN_IN_A_GUEST,
    "boot": {
        **PROCESSORS_AND_MEMORY,
        **dict.fromkeys(("", "-hda", "-drive"), "give a disk as --disk FILE"),
        **dict.fromkeys(("-nographic", "--nographic"), "always so: leave it out"),
    },
}


class OneCommand(typer.core.TyperCommand):
    """A command whose errors say where its help is, and whose options are given once if they hold one value:
    click would take the last without a word. Its help calls values what their metavars say, without types.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(_usage(each) for each in self._parameters(ctx) if _is_argument(each))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        declared = self._parameters(ctx)
        arguments = [(each.metavar, each.help or "") for each in declared if _is_argument(each)]
        options = [each.get_help_record(ctx) for each in declared if not _is_argument(each)]
        for heading, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def _parameters(self, ctx: Any) -> list[Any]:
        """Of click's classes, which Typer has in more than one place."""
        return [*self.get_params(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = self._own(ctx, args)
        left: list[str] = []
        try:
            _, left, order = self.make_parser(ctx).parse_args(args=list(args))
            given: list[Any] = [*order]
            for index, what in enumerate(given):
                single = what.param_type_name == "option" and not what.multiple and not what.is_flag
                if single and what in given[:index]:
                    raise UserError(f"{what.opts[0]} may be given once (see {ctx.command_path} --help)")
            return super().parse_args(ctx, args)
        except ClickException as error:
            known = self._known_elsewhere(ctx, error, args[:own], left)
            if known is not None:
                raise UserError(f"{known} (see {ctx.command_path} --help)") from None
            if "--" not in args and any(word.startswith("-") for word in args[own:]):
                text = _sentence(error)
                meant = f"{ctx.command_path} {shlex.join([*args[:own], '--', *args[own:]])}"
                raise UserError(f"{text}: a command with options goes after --: {meant}") from None
            if getattr(error, "ctx", None) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def _known_elsewhere(self, ctx: Any, error: Any, own: list[str], left: list[str]) -> str | None:
        """What is wrong with our `own` words, or with what is `left` of them, if HINTS knows better."""
        hints = HINTS.get(ctx.command_path.removeprefix("vmrun "), {})
        if left and "" in hints:
            return f"{_sentence(error)}: {hints['']}"
        wrong: str = getattr(error, "option_name", "")
        for word in own if wrong else ():
            name = word.partition("=")[0]
            if name.startswith("-") and name not in hints and not name[2:3].isalpha():
                name = name[:2]  # -p80:80; of a cluster of letters (-hda) the error names one alone
            if name in hints and wrong.lstrip("-") in name:
                return f"No such option: {name}: {hints[name]}"
        return None

    def _own(self, ctx: Any, args: list[str]) -> int:
        """How many words are our own: those before `--`, or before a command that it was left out of."""
        if "--" in args:
            return args.index("--")
        declared = self._parameters(ctx)
        arguments = [each for each in declared if _is_argument(each)]
        if not arguments or not arguments[-1].metavar.startswith("-- "):
            return len(args)
        takes_value = {
            name for each in declared if each not in arguments and not each.is_flag for name in each.opts
        }
        before = len(arguments) - 1
        index = 0
        while index < len(args):
            if args[index].startswith("-"):
                index += args[index] in takes_value
            elif before:
                before -= 1
            else:
                break
            index += 1
        return index


class GroupedCommands(typer.core.TyperGroup):
    """The list of commands in --help, under the headings of GROUPS; and what is said of one there is not."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        hint = HINTS[""].get(args[0])
        if hint is not None:
            raise UserError(f"No such command {args[0]!r}: {hint} (see vmrun --help)")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(len(name) for name in self.list_commands(ctx))
        for heading, names in app.GROUPS.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name)
                if command is not None:
                    text = command.get_short_help_str(formatter.width - 6 - width)
                    rows.append((name.ljust(width), text))
            with formatter.section(heading):
                formatter.write_dl(rows)


def run(words: list[str]) -> int:
    """Run the command line. Raises UserError for what is wrong with it, and whatever the command does."""
    # Not `click.Command.main()`: that takes a broken pipe anywhere, a worker's channel say, for the end of
    # our output.
    everything = application()
    try:
        with everything.make_context("vmrun", words) as context:
            result = everything.invoke(context)
    except typer.Exit as exit:
        return exit.exit_code
    except ClickException as error:
        raise UserError(_usage_message(error)) from None
    return result if isinstance(result, int) else 0


def application() -> Any:
    """The whole command line, ready to parse. Plain help and errors: Rich would take longer to import than to
    read.
    """
    top = typer.Typer(
        name="vmrun",
        cls=GroupedCommands,
        help=HELP,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    top.callback(invoke_without_command=True)(_vmrun)
    for names in app.GROUPS.values():
        for name, file in names.items():
            found = app.load(name, file)
            if not hasattr(found, "COMMANDS"):
                top.command(name, cls=OneCommand)(_typed(found))
                continue
            group = typer.Typer(help=found.HELP, rich_markup_mode=None)
            for inner, command in found.COMMANDS.items():
                group.command(inner, cls=OneCommand)(_typed(command))
            top.add_typer(group, name=name)
    return typer.main.get_command(top)


def _vmrun(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        raise typer.Exit(print_version())
    if context.invoked_subcommand is None:
        print(context.get_help())


def _call(command: Command, values: dict[str, Any]) -> int:
    return command(**values)


def _typed(command: Command) -> Command:
    """`command` as Typer wants it: the same parameters, declared in Typer's terms."""
    declared = parameters(command)

    def call(**values: Any) -> int:
        for parameter in declared:
            # Numbers come as text: what is wrong with one is said in our words.
            if parameter.type is int and isinstance(values[parameter.name], str):
                values[parameter.name] = parameter.value(values[parameter.name])
        return _call(command, values)

    typed = {parameter.name: _annotation(parameter) for parameter in declared}
    call.__name__, call.__doc__, call.__annotations__ = command.__name__, command.__doc__, typed
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                parameter.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if parameter.required else parameter.default,
                annotation=typed[parameter.name],
            )
            for parameter in declared
        ]
    )
    return call


def _annotation(parameter: Parameter) -> Any:
    kind = parameter.annotation
    if parameter.type is int:
        kind = str if kind is int else str | None
    what = parameter.declared
    # Whether a file is there and may be read is for the command to find out, which says it better.
    how: dict[str, Any] = {"metavar": what.metavar, "help": what.help, "readable": False}
    if isinstance(what, Argument):
        return Annotated[kind, typer.Argument(**how)]
    return Annotated[kind, typer.Option(*parameter.names, **how)]


def _usage_message(error: Exception) -> str:
    """One line for what is wrong with the command line, and where to look."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "vmrun"
    return f"{_sentence(error)} (see {path} --help)"


def _sentence(error: Exception) -> str:
    text: str = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split()).rstrip(".")


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _usage(argument: Any) -> str:
    name: str = argument.metavar
    if argument.nargs != 1 and not name.endswith("..."):
        name += "..."
    return name if argument.required else f"[{name}]"
