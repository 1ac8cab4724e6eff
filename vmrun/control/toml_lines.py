"""Which line of a TOML file each key is on, which `tomllib` does not tell. Any process of the owner's.

A second reading of a text that `tomllib` has accepted (TOML 1.0), so nothing is checked and no value is kept.
"""

import re
import tomllib
from bisect import bisect_right

KeyPath = tuple[str | int, ...]  # as data is reached: ("machines", "web", "disks", 0, "format")

BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
SPACE = re.compile(r"[ \t]*")
KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
# Up to two quotes may stand before the three that end a multi-line string.
STRING = re.compile(
    r'"{3}(?:[^\\]|\\.)*?"{3,5}|"(?:[^"\\\n]|\\.)*"'
    r"|'{3}.*?'{3,5}|'[^'\n]*'",
    re.DOTALL,
)
CLOSING = re.compile(r"\]+")
SCALAR = re.compile(r"[^,\]}#\n]+")


class KeyLines:
    """The lines of all keys and array elements of `text`, counted from 1."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._position = 0
        self._starts = [match.end() for match in re.finditer(r"\n", self._text)]
        self._lines: dict[KeyPath, int] = {(): 1}
        self._last_elements: dict[KeyPath, int] = {}  # of arrays made by [[headers]]
        try:
            self._document()
        except (ValueError, RecursionError):
            pass  # what comes later has the line of what it is in, or that of the file's beginning

    def of(self, path: KeyPath) -> int:
        """The line of `path`, or of the nearest table or array around it that has one."""
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]

    def _document(self) -> None:
        table: KeyPath = ()
        while True:
            self._skip(BLANK)
            if self._position == len(self._text):
                return
            if self._next("["):
                table = self._header(is_array=self._next("["))
            else:
                self._key_and_value(table)

    def _header(self, *, is_array: bool) -> KeyPath:
        line = self._line()
        *outer, last = self._key()
        path: KeyPath = ()
        for part in outer:
            path = self._enter((*path, part))
            self._lines.setdefault(path, line)
        path = (*path, last)
        if is_array:
            self._lines.setdefault(path, line)
            self._last_elements[path] = self._last_elements.get(path, -1) + 1
            path = self._enter(path)
        # A table may be opened after those in it, which gave it a line of theirs.
        self._lines[path] = line
        self._skip(CLOSING)
        return path

    def _enter(self, path: KeyPath) -> KeyPath:
        """A header that leads through an array means its last element."""
        return (*path, self._last_elements[path]) if path in self._last_elements else path

    def _key_and_value(self, table: KeyPath) -> None:
        line = self._line()
        *outer, last = self._key()
        for part in outer:
            table = (*table, part)
            self._lines.setdefault(table, line)
        self._lines[(*table, last)] = line
        if not self._next("="):
            raise ValueError("no value")
        self._skip(SPACE)
        self._value((*table, last))

    def _key(self) -> list[str]:
        """The parts of a dotted key, and the position after it."""
        parts = []
        while True:
            self._skip(SPACE)
            word = self._skip(KEY)
            if not word:
                raise ValueError("no key")
            parts.append(tomllib.loads(f"key = {word}")["key"] if word[0] in "\"'" else word)
            self._skip(SPACE)
            if not self._next("."):
                return parts

    def _value(self, path: KeyPath) -> None:
        if self._next("["):
            index = 0
            while not self._ends("]"):
                self._lines[(*path, index)] = self._line()
                self._value((*path, index))
                index += 1
        elif self._next("{"):
            while not self._ends("}"):
                self._key_and_value(path)
        elif not self._skip(STRING) and not self._skip(SCALAR):
            raise ValueError("no value")

    def _ends(self, bracket: str) -> bool:
        """Whether the array or inline table ends here; otherwise at its next element."""
        self._skip(BLANK)
        if self._next(","):
            self._skip(BLANK)
        return self._next(bracket)

    def _next(self, letter: str) -> bool:
        found = self._text.startswith(letter, self._position)
        self._position += found
        return found

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._position)
        if match is None:
            return ""
        self._position = match.end()
        return match.group()

    def _line(self) -> int:
        return bisect_right(self._starts, self._position) + 1
