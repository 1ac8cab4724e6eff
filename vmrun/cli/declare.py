"""What a command says of its command line: `Option` and `Argument`, in the types of its parameters.

User side of the VMM process. `vmrun.cli.app` tells how a command is written. The same declaration is read by
`fast_path`, which imports nothing for it, and by `typer_app`, which makes a Typer command of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmrun.errors import UserError

Command = Callable[..., int]


class Option:
    """An option of a command: its names ("--detach", "-d"; made from the parameter's if there are none), what
    its value is called in help texts, and one sentence.
    """

    __slots__ = ("help", "metavar", "names")

    def __init__(self, *names: str, metavar: str | None = None, help: str | None = None) -> None:
        self.names = names
        self.metavar = metavar
        self.help = help


class Argument:
    """A positional argument of a command. One whose type is a list takes all that are left."""

    __slots__ = ("help", "metavar")

    def __init__(self, *, metavar: str, help: str | None = None) -> None:
        self.metavar = metavar
        self.help = help


class Parameter:
    """One parameter of a command: its name, what it is declared as, the type of its value (`bool`, `int`,
    `str` or `Path`), whether there may be many values, and its default if it has one.
    """

    __slots__ = ("annotation", "declared", "default", "many", "name", "required", "type")

    def __init__(self, name: str, annotation: Any, required: bool, default: Any) -> None:
        self.name = name
        self.annotation = annotation.__origin__  # of Annotated[...]: the type alone
        (self.declared,) = annotation.__metadata__
        self.type, self.many = TYPES[self.annotation]
        self.required = required
        self.default = default

    @property
    def names(self) -> tuple[str, ...]:
        """How the option is written; an argument has no such names."""
        if isinstance(self.declared, Argument):
            return ()
        return self.declared.names or (f"--{self.name.replace('_', '-')}",)

    def value(self, text: str) -> Any:
        """What `text` means as a value of this parameter. UserError where it means none."""
        if self.type is not int:
            return self.type(text)
        if text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20:
            return int(text)
        name = self.declared.metavar if isinstance(self.declared, Argument) else self.names[0]
        raise UserError(f"{name} {text}: give a whole number")


# What a parameter may be: the type of a value, and whether there may be many.
TYPES: dict[Any, tuple[Any, bool]] = {
    bool: (bool, False),
    **{kind: (kind, False) for kind in (int, str, Path)},
    **{kind | None: (kind, False) for kind in (int, str, Path)},
    **{list[kind]: (kind, True) for kind in (str, Path)},  # type: ignore[valid-type]
    **{list[kind] | None: (kind, True) for kind in (str, Path)},  # type: ignore[valid-type]
}


def parameters(command: Command) -> list[Parameter]:
    """What `command` declares, in order.

    Read off the function itself: `inspect.signature` would do the same in twenty times as long.
    """
    code = command.__code__
    names = code.co_varnames[: code.co_argcount]
    defaults = command.__defaults__ or ()
    first_default = len(names) - len(defaults)
    return [
        Parameter(
            name,
            command.__annotations__[name],
            index < first_default,
            None if index < first_default else defaults[index - first_default],
        )
        for index, name in enumerate(names)
    ]
