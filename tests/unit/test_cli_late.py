"""Modules that wait for their first use."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(program: str) -> str:
    command = [sys.executable, "-c", f"import sys; from vmrun.cli import late\n{program}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_a_delayed_module_is_there_from_its_first_use_on() -> None:
    program = (
        "late.delay('inspect'); import inspect; before = 'ast' in sys.modules\n"
        "print(before, inspect.signature(lambda a, b: 0), 'ast' in sys.modules)\n"
        "from inspect import isclass; import inspect as again\n"
        "print(type(sys.modules['inspect']) is late.Late, type(again) is late.Late, isclass(int))\n"
    )
    assert run(program) == "False (a, b) True\nFalse False True\n"


def test_dataclasses_do_with_it() -> None:
    program = (
        "late.delay('inspect'); from dataclasses import dataclass\n"
        "class Plain:\n    a: int\n    b: int = 2\n"
        "print('ast' in sys.modules, dataclass(Plain).__doc__, Plain(1))\n"
    )
    assert run(program) == "False Plain(a: int, b: int = 2) Plain(a=1, b=2)\n"


def test_what_is_loaded_stays() -> None:
    assert run("import inspect; late.delay('inspect'); print(sys.modules['inspect'] is inspect)") == "True\n"
