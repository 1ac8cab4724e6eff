"""The two readers of a command line: what the fast one accepts means the same to Typer."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmrun.cli import app, fast_path, typer_app
from vmrun.cli.declare import Argument, Command, Option, parameters
from vmrun.errors import UserError

ROOT = Path(__file__).parents[2]


def all_commands() -> dict[tuple[str, ...], Command]:
    found: dict[tuple[str, ...], Command] = {}
    for group in app.GROUPS.values():
        for name, file in group.items():
            command = app.load(name, file)
            if hasattr(command, "COMMANDS"):
                found |= {(name, inner): function for inner, function in command.COMMANDS.items()}
            else:
                found[name,] = command
    return found


COMMANDS = all_commands()


def sample(
    one: Annotated[str, Argument(metavar="ONE")],
    more: Annotated[list[Path] | None, Argument(metavar="MORE")] = None,
    number: Annotated[int, Option("--number", "-n", metavar="N")] = 7,
    maybe: Annotated[int | None, Option(metavar="N")] = None,
    paths: Annotated[list[Path] | None, Option("--path", metavar="P")] = None,
    word_of_it: Annotated[str | None, Option(metavar="TEXT")] = None,
    flag: Annotated[bool, Option("--flag", "-f")] = False,
) -> int:
    """A command with everything a command may have."""
    return len(f"{one}{more}{number}{maybe}{paths}{word_of_it}{flag}")


VALUES = st.one_of(
    st.sampled_from(
        ["", "-", "--", "7", "-7", "0x7", "007", "٣", "a", "a b", "x.qcow2,ro", "=", "a=b", "/dev/sda"]
    ),
    st.sampled_from(["boot", "--help", "-h", "--fla", "-fn", "-n7", "-vd", "--no-flag", "--disk", "\udcff"]),
    # No word that a program is given can have a NUL.
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4),
)


def lines(command: Command) -> st.SearchStrategy[list[str]]:
    """Command lines, most of them nearly right."""
    names = [name for parameter in parameters(command) for name in parameter.names] or ["--none"]
    name = st.sampled_from(names)
    pieces = st.one_of(
        name.map(lambda name: [name]),
        st.tuples(name, VALUES).map(list),
        st.tuples(name, VALUES).map(lambda pair: ["=".join(pair)]),
        VALUES.map(lambda value: [value]),
    )
    return st.lists(pieces, max_size=5).map(lambda found: [word for piece in found for word in piece])


@pytest.fixture(scope="module")
def typer_reads() -> Any:
    """What Typer makes of a command line: the command and its values, or None if it refuses."""
    seen: list[tuple[Command, dict[str, Any]]] = []

    def note(command: Command, values: dict[str, Any]) -> int:
        seen.append((command, values))
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(app.GROUPS, "Test", {"sample": "sample"})
        load = app.load
        patch.setattr(app, "load", lambda name, file: sample if name == "sample" else load(name, file))
        patch.setattr(typer_app, "_call", note)
        everything = typer_app.application()
        patch.setattr(typer_app, "application", lambda: everything)

        def read(words: list[str]) -> tuple[Command, dict[str, Any]] | None:
            seen.clear()
            try:
                typer_app.run(words)
            except UserError:
                return None
            return seen[0] if seen else None

        yield read


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_fast_path_agrees_with_typer(typer_reads: Any, data: st.DataObject) -> None:
    commands = COMMANDS | {("sample",): sample}
    path = data.draw(st.sampled_from([*commands, *[("sample",), ("boot",)] * 10]))
    words = [*path, *data.draw(lines(commands[path]))]
    understood = fast_path.parse(words)
    if understood is not None:
        assert typer_reads(words) == understood


@pytest.mark.parametrize(
    "line",
    [
        "sample a",
        "sample a b c --number 3 -f",
        "sample -n 3 --path=x --path y a --word-of-it=-x",
        "sample -- -a --flag",
        "sample --maybe=-2 a",
        "boot --disk a.qcow2 --disk b.raw,ro --nic tap0 --mem 1G --cpus 2 --append quiet -d -v",
        "ps --json",
        "stop -f -w a b",
        "disk info x.qcow2 --chain",
        "wait web --timeout 3s",
    ],
)
def test_a_right_command_line_needs_no_typer(typer_reads: Any, line: str) -> None:
    understood = fast_path.parse(line.split())
    assert understood is not None and understood == typer_reads(line.split())


@pytest.mark.parametrize(
    "line",
    [
        *("", "--help", "boo", "boot --help", "boot -dv", "boot --verb", "boot --cpus two", "boot --mem"),
        *("boot --mem -v", "boot --cdrom a --cdrom b", "boot x", "boot -d=x", "boot --detach=yes", "sample"),
        *("disk", "disk nothing", "disk info", "disk info a b", "boot -", "sample -n7 a", "sample -n=7 a"),
    ],
)
def test_what_is_left_to_typer(typer_reads: Any, line: str) -> None:
    assert fast_path.parse(line.split()) is None


def test_a_number_out_of_other_digits_is_none(typer_reads: Any) -> None:
    assert typer_reads(["sample", "a", "-n", "٣"]) is None
    assert fast_path.parse(["sample", "a", "-n", "٣"]) is None


def test_every_command_is_declared_as_the_rules_say() -> None:
    for path, command in COMMANDS.items():
        many = [index for index, one in enumerate(parameters(command)) if one.many and not one.names]
        arguments = [index for index, one in enumerate(parameters(command)) if not one.names]
        assert many in ([], arguments[-1:]), path
        for parameter in parameters(command):
            assert parameter.type is not bool or (parameter.default is False and parameter.declared.names), (
                path
            )
            assert parameter.declared.metavar or parameter.type is bool, path


def test_a_start_imports_no_typer() -> None:
    program = (
        "import sys; from vmrun import cli\n"
        "assert cli.run(['boot', '--kernel', '/nonexistent/kernel', '--cpus', '2']) == 66\n"
        "print(sorted({'typer', 'rich', 'pydantic', 'argparse'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr
