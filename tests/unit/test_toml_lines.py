"""The lines of TOML keys, against files whose every value says where it stands."""

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from vmrun.control.toml_lines import KeyLines, KeyPath

# Values are marks: whole numbers counted up, looked for in the text afterwards. Everything else has no digit.
LETTERS = st.text("abcdeé .[]{}#=,'\"\\", max_size=4)
BLANKS = st.sampled_from(["", "\n", " # comment = [x]\n", "\n\n\t# \"'''\n"])


class Writer:
    """Writes TOML, and knows nothing of lines: the marks are found again in what it wrote."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.mark = 1000
        self.made = 0

    def draw(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self.data.draw(strategy)

    def key(self) -> str:
        """A fresh key, written in one of the three ways."""
        self.made += 1
        fresh = "k" + "".join("abcdefghij"[int(digit)] for digit in str(self.made))
        kind = self.draw(st.sampled_from(["bare", "basic", "literal"]))
        if kind == "bare":
            return fresh + self.draw(st.sampled_from(["", "-", "_x"]))
        if kind == "basic":
            return json.dumps(fresh + self.draw(LETTERS), ensure_ascii=self.draw(st.booleans()))
        return "'" + fresh + self.draw(LETTERS).replace("'", "") + "'"

    def dotted(self, most: int = 3) -> str:
        dot = self.draw(st.sampled_from([".", " . "]))
        return str(dot).join(self.key() for _ in range(self.draw(st.integers(1, most))))

    def value(self, depth: int = 0) -> str:
        kinds = ["mark", "mark", "text", "lines", "raw lines", "date"]
        kind = self.draw(st.sampled_from([*kinds, "array", "table"] if depth < 3 else kinds))
        if kind == "mark":
            self.mark += 1
            return str(self.mark)
        if kind == "text":
            return json.dumps(self.draw(LETTERS))
        if kind == "lines":
            text = self.draw(LETTERS).replace("\\", "\\\\").replace('"', '\\"')
            return f'"""\n{text}\n[no.table]\nno = key""-{text}"""' + self.draw(
                st.sampled_from(["", '"', '""'])
            )
        if kind == "raw lines":
            return "'''" + self.draw(LETTERS).replace("'", "") + "\n[[no]]\nno = '' key\\'''"
        if kind == "date":
            return "2024-01-01 00:00:00"
        items = range(self.draw(st.integers(0, 3)))
        if kind == "table":
            return "{ " + ", ".join(f"{self.dotted()} = {self.value(depth + 1)}" for _ in items) + " }"
        text = "[" + self.draw(BLANKS)
        for index in items:
            text += self.value(depth + 1) + self.draw(BLANKS)
            text += "," + self.draw(BLANKS) if index < items[-1] or self.draw(st.booleans()) else ""
        return text + "]"

    def pairs(self) -> str:
        lines = [f"{self.dotted()} = {self.value()}" for _ in range(self.draw(st.integers(0, 3)))]
        return "".join(self.draw(BLANKS).lstrip(" ") + line + "\n" for line in lines)

    def document(self) -> str:
        text = self.pairs()
        for _ in range(self.draw(st.integers(0, 3))):
            name = self.dotted()
            if self.draw(st.booleans()):
                text += f"[ {name} ] # [x]\n" + self.pairs()
                continue
            for _ in range(self.draw(st.integers(1, 3))):
                text += f"[[{name}]]\n" + self.pairs()
                if self.draw(st.booleans()):
                    text += f"[{name}.{self.key()}]\n" + self.pairs()
                inner = self.key()
                for _ in range(self.draw(st.integers(0, 2))):
                    text += f"[[{name}.{inner}]]\n" + self.pairs()
        return text


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from leaves(each, (*path, index))
    else:
        yield path, value


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_value_is_where_it_stands(data: st.DataObject) -> None:
    text = Writer(data).document()
    if data.draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    try:
        whole = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        reject()  # a table that was an array before
    found = KeyLines(text)
    for path, value in leaves(whole):
        if isinstance(value, int):
            assert found.of(path) == text[: text.index(str(value))].count("\n") + 1, (path, text)


FILE = '''\
top = 1
[machines.web]
mem = """
[machines.db]
"""
disks = [
  "a.raw",
  { path = "b", "format" = "raw" },
]
nested.deep.key = {x.y = 1}

[machines."d b"]  # quoted
  [[machines."d b".disks]]
  path = "x"
  [[ machines . 'd b' . disks ]]

  path = "y"
[machines]
late = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("top",), 1),
        (("machines",), 18),
        (("machines", "web"), 2),
        (("machines", "web", "mem"), 3),
        (("machines", "web", "disks"), 6),
        (("machines", "web", "disks", 0), 7),
        (("machines", "web", "disks", 1, "format"), 8),
        (("machines", "web", "nested", "deep"), 10),
        (("machines", "web", "nested", "deep", "key", "x", "y"), 10),
        (("machines", "d b"), 12),
        (("machines", "d b", "disks"), 13),
        (("machines", "d b", "disks", 0, "path"), 14),
        (("machines", "d b", "disks", 1), 15),
        (("machines", "d b", "disks", 1, "path"), 17),
        (("machines", "late"), 19),
        # What is not there has the line of what it would be in.
        (("machines", "d b", "disks", 1, "path", "x", 3), 17),
        (("machines", "web", "no"), 2),
        (("no", "such"), 1),
    ],
)
def test_a_file(path: KeyPath, line: int) -> None:
    tomllib.loads(FILE)
    assert KeyLines(FILE).of(path) == line


@given(st.text("ab=.[]{}\"'\\\n#, 1"))
def test_nonsense_ends(text: str) -> None:
    """It is only asked about good files, but it must not hang on others."""
    assert KeyLines(text).of(("a", "b")) >= 1
