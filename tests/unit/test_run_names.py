"""`from vmrun import ...`: the names are there, and cost nothing until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vmrun

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", vmrun.__all__)
def test_each_name_is_there(name: str) -> None:
    value = getattr(vmrun, name)
    assert value.__name__ == name
    assert getattr(vmrun, name) is value
    assert name in dir(vmrun)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sandbx'"):
        vmrun.Sandbx  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from vmrun import Sandbx  # type: ignore[attr-defined]  # noqa: F401


def test_type_checkers_are_told_the_same_homes() -> None:
    tree = ast.parse(Path(vmrun.__file__).read_text())
    told = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name: told[name] for name in vmrun.__all__} == vmrun._HOMES
    assert set(vmrun._HOMES) == set(vmrun.__all__)


def test_importing_vmrun_imports_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import vmrun; print(sorted(set(sys.modules) - before))"
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    # `from __future__` is a module of its own, of no size.
    assert set(ast.literal_eval(done.stdout)) <= {"vmrun", "__future__"}
