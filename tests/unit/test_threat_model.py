"""The threat model names tests: they exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "docs" / "threat-model.md"


def references(text: str) -> list[tuple[str, str | None]]:
    """What is in brackets, as (file, test or None): "[one, two: its_test, another; three]"."""
    found: list[tuple[str, str | None]] = []
    for bracket in re.findall(r"\[([^\]]+)\]", text):
        for part in " ".join(bracket.split()).split(";"):
            file = ""
            for word in part.split(","):
                name, colon, test = (piece.strip() for piece in word.partition(":"))
                if colon:
                    file = name
                    found.append((file, test))
                elif file and not files(name):
                    found.append((file, name))
                else:
                    found.append((name, None))
    return found


def files(name: str) -> list[Path]:
    return list(ROOT.glob(f"tests/*/test_{name}.py"))


@pytest.mark.parametrize(("file", "test"), sorted(set(references(MODEL.read_text())), key=str))
def test_what_is_named_exists(file: str, test: str | None) -> None:
    (path,) = files(file)
    if test is not None:
        assert re.search(rf"^def test_{test}\(", path.read_text(), re.MULTILINE), f"{path} has no test_{test}"


def test_references_are_understood() -> None:
    text = "A [rng, blk: one, another] and [queue;\n  net: two]."
    assert references(text) == [
        ("rng", None),
        ("blk", "one"),
        ("blk", "another"),
        ("queue", None),
        ("net", "two"),
    ]
