"""A TOML file and all that is wrong with it: each problem with the line and the key it is about. Any process
of the owner's.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vmrun.control.toml_lines import KeyLines, KeyPath
from vmrun.errors import EXIT_USAGE, UserError

TYPE_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "an array",
    dict: "a table",
}
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
SYNTAX_ERROR = re.compile(r"(.*?) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)


class DocumentError(UserError):
    """What is wrong with a file: `lines` are all of it."""

    def __init__(self, lines: list[str], code: int = EXIT_USAGE) -> None:
        super().__init__("\n".join(lines), code)
        self.lines = lines


class Document:
    """The file at `path`, read. Problems are collected, told once each, and raised together by `check`."""

    def __init__(self, path: Path) -> None:
        """UserError when there is no such file, DocumentError when it is not TOML."""
        self.path = path
        self._problems: dict[tuple[int, str], int] = {}
        try:
            content = path.read_bytes()
            # What relative paths in it count from.
            self.directory = path.resolve().parent
        except OSError as error:
            raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        try:
            text = content.decode()
            self.data: dict[str, Any] = tomllib.loads(text)
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise DocumentError([f"{path}:{line}: not UTF-8"]) from None
        except tomllib.TOMLDecodeError as error:
            match = SYNTAX_ERROR.fullmatch(str(error))
            message = match[1] if match else str(error)
            line = int(match[2]) if match and match[2] else content.count(b"\n") + 1
            raise DocumentError([f"{path}:{line}: not TOML: {message}"]) from None
        except RecursionError:
            raise DocumentError([f"{path}:1: not TOML that can be read: nested too deeply"]) from None
        self._lines = KeyLines(text)

    def problem(self, key: KeyPath, text: str, code: int = EXIT_USAGE) -> None:
        where = f"{key_text(key)}: " if key else ""
        self._problems.setdefault((self._lines.of(key), where + text), code)

    def check(self) -> None:
        """Raise what has been found, in the order of the file. The exit code is the lowest: a key that is
        wrong comes before an image that is missing.
        """
        if self._problems:
            lines = [f"{self.path}:{line}: {text}" for line, text in sorted(self._problems)]
            raise DocumentError(lines, min(self._problems.values()))

    def table(self, where: KeyPath, known: Iterable[str] | None = None) -> dict[str, Any]:
        """The table at `where`, empty when there is none; with `known`, without keys that are not in it."""
        value: Any = self.data
        for key in where:
            value = value.get(key, {})
        if not self.typed(where, value, dict):
            return {}
        found: dict[str, Any] = value
        return found if known is None else self.known(where, found, known)

    def known(self, where: KeyPath, table: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
        """`table` without what is not in `keys`, and a problem for each."""
        keys = list(keys)
        for key in table:
            if key not in keys:
                self.problem((*where, key), f"unknown key; {hint(key, keys)}")
        return {key: value for key, value in table.items() if key in keys}

    def typed(self, where: KeyPath, value: Any, *types: type) -> bool:
        """Whether `value` is of one of `types`; a problem if not."""
        if type(value) in types:
            return True
        self.problem(where, f"give {' or '.join(TYPE_NAMES[each] for each in types)}")
        return False

    def attempt(self, where: KeyPath, make: Callable[[], Any]) -> Any:
        """What `make` returns, or None and a problem for its UserError."""
        try:
            return make()
        except UserError as error:
            self.problem(where, str(error))
            return None


# What other programs call our keys.
SYNONYMS = {
    "memory": "mem",
    "vcpus": "cpus",
    "cmdline": "append",
    "iso": "cdrom",
    "bios": "firmware",
    "switches": "bridges",
    "vms": "machines",
    "interfaces": "nics",
    "networks": "nics",
    "enabled": "autostart",
    "inherits": "template",
    "parallelism": "parallel",
    "stagger": "delay",
    "readonly": "ro",
    "read_only": "ro",
    "name": "tap",
    "file": "path",
}


def hint(key: str, keys: Iterable[str]) -> str:
    """Which of `keys` `key` was meant to be, or all of them."""
    keys = list(keys)
    close = get_close_matches(key, keys, n=1)
    if SYNONYMS.get(key) in keys:
        close = [SYNONYMS[key]]
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(keys)}"


def key_text(key: KeyPath) -> str:
    """("machines", "web", "disks", 0) as machines.web.disks[0]"""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = BARE_KEY.fullmatch(part)
            text += ("." if text else "") + (part if bare else json.dumps(part, ensure_ascii=False))
    return text
