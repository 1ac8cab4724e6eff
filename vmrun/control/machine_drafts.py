"""From the tables of a machine file to one draft for each machine: types checked, templates applied,
instances counted out, placeholders filled in. Any process of the owner's.

A draft remembers of each value which key of the file it comes from.
"""

import re
from dataclasses import dataclass
from typing import Any

from vmrun.control import runtime
from vmrun.control.toml_document import Document, hint
from vmrun.control.toml_lines import KeyPath
from vmrun.errors import UserError

# What a machine can have, by the names of the options of `vmrun boot`. disks and nics are apart.
TYPES: dict[str, tuple[type, ...]] = {
    "template": (str,),
    "instances": (int, list),
    "autostart": (bool,),
    "mem": (str, int),  # a bare number is refused later, with a better word than this could have
    "cpus": (int,),
    "kernel": (str,),
    "initrd": (str,),
    "append": (str,),
    "firmware": (str,),
    "cdrom": (str,),
    "disks": (list,),
    "nics": (list,),
    "legacy-virtio": (bool,),
    "timeout": (str, int, float),
    "verbose": (bool,),
}
# Lists of tables: the key that each must have, the option that says the same in one string.
LISTS = {"disks": ("path", "--disk"), "nics": ("tap", "--nic")}
MAX_INSTANCES = 1000

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([a-z]+)(?::([^{}]*))?\}")
INDEX_FORMAT = re.compile(r"0?[0-9]?[dxX]?")


@dataclass(frozen=True, slots=True)
class Value:
    """A value, and the key in the file that it comes from: a template's perhaps."""

    key: KeyPath
    value: Any


Values = dict[str, Value]


@dataclass(frozen=True, slots=True)
class Draft:
    """One machine: `table` is the name of its table, which its instances share."""

    name: str
    table: str
    values: Values


def names(document: Document) -> dict[str, str]:
    """The machines of the file, in order: which table each comes from. Problems of names and instances are
    told.
    """
    return {name: table for table, instances in _instances(document).items() for name in instances}


def drafts(document: Document) -> list[Draft]:
    """All machines. Problems are the document's; what has one is left out of its draft."""
    templates = {name: _typed(document, ("templates", name)) for name in document.table(("templates",))}
    for values in templates.values():
        if "instances" in values:
            document.problem(values["instances"].key, "instances are for machines, not for templates")
    found = []
    for table, instances in _instances(document).items():
        own = _typed(document, ("machines", table))
        values = _with_template(document, own, templates)
        for index, name in enumerate(instances, 1):
            words: dict[str, str | int] = {"name": name}
            if "instances" in own:
                words |= {"index": index, "instance": name.removeprefix(f"{table}-")}
            filled = {
                key: Value(value.key, _fill(document, value.key, value.value, words))
                for key, value in values.items()
                if key not in ("template", "instances")
            }
            found.append(Draft(name, table, filled))
    _check_templates(document, templates)
    return found


def _instances(document: Document) -> dict[str, list[str]]:
    """The names of the machines that each table stands for."""
    found: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for table, content in document.table(("machines",)).items():
        where: KeyPath = ("machines", table)
        instances = content.get("instances") if isinstance(content, dict) else None
        wanted = [table]
        if instances is not None:
            suffixes = _suffixes(document, (*where, "instances"), instances)
            wanted = [f"{table}-{suffix}" for suffix in suffixes]
        found[table] = []
        for name in wanted:
            if runtime.NAME_PATTERN.fullmatch(name) is None:
                document.problem(where, f"{name!r}: a machine's name is {runtime.NAME_RULE}")
            elif name in taken:
                document.problem(where, f"there is a machine {name} already: from machines.{taken[name]}")
            else:
                taken[name] = table
                found[table].append(name)
    return found


def _suffixes(document: Document, where: KeyPath, instances: Any) -> list[str]:
    if type(instances) is int and 1 <= instances <= MAX_INSTANCES:
        return [str(index) for index in range(1, instances + 1)]
    if isinstance(instances, list) and instances and all(isinstance(each, str) for each in instances):
        return instances
    if isinstance(instances, int | list):  # other types are told with those of other keys
        document.problem(where, f"give how many, 1 to {MAX_INSTANCES}, or an array of their names")
    return []


def _typed(document: Document, where: KeyPath) -> Values:
    """The values of a machine's or template's table that are of the right kind."""
    return {
        key: Value((*where, key), _typed_list(document, (*where, key), value) if key in LISTS else value)
        for key, value in document.table(where, TYPES).items()
        if document.typed((*where, key), value, *TYPES[key])
    }


def _typed_list(document: Document, where: KeyPath, items: list[Any]) -> dict[int, Any]:
    """The good ones of a list of disks or cards, by their numbers: strings or tables."""
    return {
        index: item for index, item in enumerate(items) if document.typed((*where, index), item, str, dict)
    }


def _with_template(
    document: Document, values: Values, templates: dict[str, Values], using: tuple[str, ...] = ()
) -> Values:
    """`values`, and those of its template that it does not have."""
    if "template" not in values:
        return values
    where, name = values["template"].key, values["template"].value
    if name in using:
        document.problem(where, f"templates use each other in a circle: {', '.join((*using, name))}")
    elif name not in templates:
        known = hint(name, templates) if templates else "there are none"
        document.problem(where, f"there is no template {name!r}; {known}")
    else:
        return _with_template(document, templates[name], templates, (*using, name)) | values
    return values


def _check_templates(document: Document, templates: dict[str, Values]) -> None:
    """Those that nobody uses too."""
    for name, values in templates.items():
        _with_template(document, values, templates, (name,))


def _fill(document: Document, where: KeyPath, value: Any, words: dict[str, str | int]) -> Any:
    """`value` with the placeholders in all its strings filled in."""
    if isinstance(value, str):
        try:
            return PLACEHOLDER.sub(lambda match: _word(match, words), value)
        except UserError as error:
            document.problem(where, str(error))
    elif isinstance(value, dict):
        return {key: _fill(document, (*where, key), each, words) for key, each in value.items()}
    return value


def _word(match: re.Match[str], words: dict[str, str | int]) -> str:
    text, (name, style) = match.group(), match.groups()
    if name is None:
        return text[0]
    if name in ("index", "instance") and name not in words:
        raise UserError(f"{text} is for machines with instances")
    if name not in words:
        raise UserError(f"{text}: no such placeholder; {hint(name, words)}; a brace is written twice: {{{{")
    word = words[name]
    if style is None:
        return str(word)
    if isinstance(word, str) or INDEX_FORMAT.fullmatch(style) is None:
        raise UserError(f"{text}: only an index has a format, as in {{index:02}} or {{index:02x}}")
    return format(word, style)
