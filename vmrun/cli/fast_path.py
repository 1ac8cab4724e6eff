"""Reads a well-formed command line without Typer, whose import takes as long as starting a machine.

User side of the VMM process. What is not understood completely (help, an unknown or abbreviated option, a
missing or odd-looking value) is left to `typer_app`: users see its messages only. What is understood means
exactly what it means there; a test compares the two.
"""

from typing import Any

from vmrun.cli import app
from vmrun.cli.declare import Argument, Command, Parameter, parameters
from vmrun.errors import UserError


def parse(words: list[str]) -> tuple[Command, dict[str, Any]] | None:
    """The command that `words` name and what to call it with; None if Typer must have a look."""
    found = app.find(words)
    if found is None:
        return None
    command, rest = found
    try:
        values = values_of(parameters(command), rest)
    except UserError:
        return None
    return None if values is None else (command, values)


def values_of(declared: list[Parameter], words: list[str]) -> dict[str, Any] | None:
    """The values that `words` give to a command's parameters, or None as above."""
    options = {name: parameter for parameter in declared for name in parameter.names}
    values: dict[str, Any] = {}
    positional: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            positional.extend(left)
            break
        if not word.startswith("-"):
            positional.append(word)
            continue
        name, equals, text = word.partition("=")
        parameter = options.get(name)
        if parameter is None or (equals and (parameter.type is bool or not name.startswith("--"))):
            return None
        if parameter.type is bool:
            values[parameter.name] = True
            continue
        if not equals:
            text = next(left, "-")
            if text.startswith("-"):
                return None
        if parameter.many:
            values.setdefault(parameter.name, []).append(parameter.value(text))
        elif parameter.name in values:
            return None
        else:
            values[parameter.name] = parameter.value(text)
    if not _place(declared, positional, values):
        return None
    if any(parameter.required and parameter.name not in values for parameter in declared):
        return None
    return {parameter.name: values.get(parameter.name, parameter.default) for parameter in declared}


def _place(declared: list[Parameter], words: list[str], values: dict[str, Any]) -> bool:
    """Give the positional `words` to the arguments in their order; whether all found a place."""
    index = 0
    for parameter in declared:
        if isinstance(parameter.declared, Argument) and index < len(words):
            if parameter.many:
                values[parameter.name] = [parameter.value(word) for word in words[index:]]
                index = len(words)
            else:
                values[parameter.name] = parameter.value(words[index])
                index += 1
    return index == len(words)
