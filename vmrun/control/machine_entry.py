"""One machine of a machine file: from its draft to the configuration that `vmrun boot` would make of the same
options. Any process of the owner's.

Nothing is checked twice: values meet the checks of the command line's, and what those refuse is blamed on the
key that it came from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vmrun import units
from vmrun.cli import options
from vmrun.control.machine_drafts import LISTS, Draft
from vmrun.control.toml_document import Document
from vmrun.control.toml_lines import KeyPath
from vmrun.errors import UserError
from vmrun.machine.config import DiskConfig, MachineConfig, NicConfig, VhostUserDisk

ITEM_KEYS = {"disks": options.DISK_KEYS, "nics": options.NIC_KEYS}
# Files, relative to the directory of the machine file.
FILES = ("kernel", "initrd", "firmware", "cdrom")
ITEM_FILES = ("path", "rom")
DIRECTORIES = ("backing",)  # with ':' between them, or an array

CONFIG_FIELDS = {"mem": "memory", "append": "cmdline", "legacy-virtio": "legacy_virtio"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MachineEntry:
    """One machine of the file. `timeout` is in seconds. `keys` is the place in the file of each of its keys,
    and `table` the name of its table, which its instances share.
    """

    name: str
    table: str
    config: MachineConfig
    timeout: float | None
    autostart: bool
    keys: dict[str, KeyPath]


def make(document: Document, draft: Draft) -> MachineEntry | None:
    """The machine, or None and problems."""
    values = draft.values
    made: dict[str, Any] = {}
    whole = True
    for key, (head, option) in LISTS.items():
        if key in values:
            items = [
                _item(document, key, head, option, (*values[key].key, index), item)
                for index, item in values[key].value.items()
            ]
            whole = whole and None not in items
            made[key] = tuple(item for item in items if item is not None)
    for key, value in values.items():
        if key not in LISTS:
            made[key] = document.directory / value.value if key in FILES else value.value
    keys = {key: value.key for key, value in values.items()}
    settings = {key: made.pop(key) for key in ("timeout", "autostart") if key in made}
    timeout = duration(document, keys["timeout"], settings["timeout"]) if "timeout" in settings else None
    config = _blamed(document, keys, ("machines", draft.table), made, _config)
    if config is None or not whole:
        return None
    return MachineEntry(draft.name, draft.table, config, timeout, settings.get("autostart", True), keys)


def _config(values: dict[str, Any]) -> MachineConfig:
    fields = {CONFIG_FIELDS.get(key, key): value for key, value in values.items()}
    try:
        if "mem" in values:
            fields["memory"] = units.parse_memory("--mem", str(values["mem"]))
        return MachineConfig(**fields)
    except UserError as error:
        text = str(error)
        for key, value in values.items():
            text = text.removeprefix(f"--{key} {value}: ").removeprefix(f"--{key}: ")
        raise UserError(text, error.code) from None


def _item(
    document: Document, key: str, head: str, option: str, where: KeyPath, item: str | dict[str, Any]
) -> DiskConfig | VhostUserDisk | NicConfig | None:
    """One disk or card, or None and problems. It is put together to what stands on a command line, whose
    checks it then meets.
    """
    known = ITEM_KEYS[key]
    if isinstance(item, str):
        try:
            first, words = options.parse_keys(option, item, known)
        except UserError as error:
            document.problem(where, _without_option(str(error), option, item))
            return None
        table: dict[str, Any] = {head: first} | {name: words[name] or True for name in words}
    else:
        table = document.known(where, item, (head, *known))
        if head not in table:
            document.problem(where, f"{head} is missing")
        wrong = [
            name
            for name, value in table.items()
            if not document.typed((*where, name), value, *_types(name, known.get(name, True)))
        ]
        for name in DIRECTORIES:
            if isinstance(table.get(name), list):
                wrong += [
                    name
                    for index, part in enumerate(table[name])
                    if not document.typed((*where, name, index), part, str)
                ]
        if wrong or len(table) < len(item) or head not in table:
            return None
    parse: Callable[[str], Any] = options.parse_any_disk if key == "disks" else options.parse_nic

    def make(values: dict[str, Any]) -> Any:
        text = _option_text(document.directory, head, values, known)
        try:
            return parse(text)
        except UserError as error:
            raise UserError(_without_option(str(error), option, text), error.code) from None

    places = {name: (*where, name) for name in table}
    return _blamed(document, places, (*where, head), table, make, fixed=head)


def _types(name: str, takes_value: bool) -> tuple[type, ...]:
    """What the key of a disk or card may be."""
    if name in DIRECTORIES:
        return str, list
    if not takes_value:
        return (bool,)
    return (str,) if name in ITEM_FILES else (str, int)


def _option_text(directory: Path, head: str, values: dict[str, Any], known: options.Keys) -> str:
    """PATH,format=raw,ro as on a command line, with the paths made absolute."""
    words = []
    for name in (head, *(name for name in values if name != head)):
        value = values[name]
        if name in known and not known[name]:
            words += [name] if value else []
            continue
        text = str(value)
        prefix = options.VHOST_USER if text.startswith(options.VHOST_USER) else ""
        if name in DIRECTORIES:
            parts = value if isinstance(value, list) else value.split(":")
            text = ":".join(str(directory / part) for part in parts)
        elif name in ITEM_FILES and text.removeprefix(prefix):
            text = prefix + str(directory / text.removeprefix(prefix))
        text = text.replace(",", ",,")
        words.append(text if name == head else f"{name}={text}")
    return ",".join(words)


def _without_option(message: str, option: str, text: str) -> str:
    """`message` without the option that it begins with: the key says it."""
    first = options.split_commas(text)[0]
    for prefix in (f"{option} {text}: ", f"{option} {first}: ", f"{option} {first!r}: ", f"{option} "):
        if message.startswith(prefix):
            return message.removeprefix(prefix)
    return message


def duration(document: Document, where: KeyPath, value: str | float) -> float | None:
    """Seconds, or None and a problem."""
    try:
        return units.parse_duration("", str(value))
    except UserError as error:
        document.problem(where, str(error).removeprefix(f" {value}: "))
        return None


def _blamed(
    document: Document,
    places: dict[str, KeyPath],
    otherwise: KeyPath,
    values: dict[str, Any],
    make: Callable[[dict[str, Any]], T],
    fixed: str = "",
) -> T | None:
    """`make(values)`, or None and a problem for each key that it does not like.

    Its UserError does not say which key that is: it is one without which `make` says something else. `fixed`
    cannot be left out.
    """
    count = len(values)
    while True:
        try:
            made = make(values)
            return made if len(values) == count else None
        except UserError as error:
            message = str(error)
            others = {
                key: {name: value for name, value in values.items() if name != key}
                for key in values
                if key != fixed
            }
            culprit = next((key for key, rest in others.items() if _says(make, rest) != message), None)
            if culprit is None:
                # After a key was left out this may be for want of it, and none of the user's making.
                if len(values) == count:
                    document.problem(otherwise, message, error.code)
                return None
            document.problem(places[culprit], message, error.code)
            values = others[culprit]


def _says(make: Callable[[dict[str, Any]], Any], values: dict[str, Any]) -> str:
    try:
        make(values)
    except UserError as error:
        return str(error)
    return ""
