"""The pytest plugin: what a marker gives to the sandbox, what a failing test's report has, and what it costs
those who do not use it. The sandbox itself is in tests/guest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]

# Stands for vmrun.run.sandbox: what was made is written down, and the console has words to find.
CONFTEST = """
import json, pathlib, sys, types
import pytest

class Sandbox:
    def __init__(self, **options):
        with open("made", "a") as file:
            print(json.dumps({name: str(value) for name, value in options.items()}), file=file)
        if options.get("image") == "broken":
            error = OSError("no machine")
            error.console = "words of a boot\\r\\n\\ta \\x1b]0;title\\x07line"
            raise error
    def console(self):
        return "words of the guest"
    def __enter__(self):
        return self
    def __exit__(self, *_):
        with open("made", "a") as file:
            print('"closed"', file=file)

sys.modules["vmrun.run.sandbox"] = types.SimpleNamespace(Sandbox=Sandbox)
"""


@pytest.fixture
def tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest(CONFTEST)
    return pytester


def run(tests: pytest.Pytester, source: str, *words: str) -> pytest.RunResult:
    tests.makepyfile("import pytest\n" + source)
    # The entry point may be installed or not: the plugin is there once in either case.
    return tests.runpytest_subprocess(
        "-p", "no:vmrun", "-p", "vmrun.pytest_plugin", "--strict-markers", *words
    )


def made(tests: pytest.Pytester) -> list[Any]:
    import json

    return [json.loads(line) for line in (tests.path / "made").read_text().splitlines()]


def test_a_machine_for_each_test(tests: pytest.Pytester) -> None:
    result = run(tests, "def test_one(vm): assert vm.console()\ndef test_other(vm): pass\n")
    result.assert_outcomes(passed=2)
    assert made(tests) == [{}, "closed", {}, "closed"]


def test_the_nearest_marker_counts(tests: pytest.Pytester) -> None:
    result = run(
        tests,
        "pytestmark = pytest.mark.vmrun(image='./image.tar', cpus=2, timeout=9.5)\n"
        "@pytest.mark.vmrun(memory='1G', cpus=1, kernel='/boot/vmlinuz')\n"
        "def test_it(vm): pass\n",
    )
    result.assert_outcomes(passed=1)
    assert made(tests)[0] == {
        "image": str(tests.path / "image.tar"),
        "cpus": "1",
        "timeout": "9.5",
        "memory": "1G",
        "kernel": "/boot/vmlinuz",
    }


@pytest.mark.parametrize("words", ["size=1", "'debian.tar'"])
def test_a_marker_that_cannot_be(tests: pytest.Pytester, words: str) -> None:
    result = run(tests, f"@pytest.mark.vmrun({words})\ndef test_it(vm): pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the marker vmrun does not take*"])


def test_the_console_is_in_the_report_of_a_failure(tests: pytest.Pytester) -> None:
    result = run(tests, "def test_it(vm): assert 0\ndef test_other(): assert 0\ndef test_good(vm): pass\n")
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(["*vmrun console*", "words of the guest"])
    assert result.stdout.str().count("words of the guest") == 1


def test_the_console_of_a_machine_that_did_not_start(tests: pytest.Pytester) -> None:
    result = run(tests, "@pytest.mark.vmrun(image='broken')\ndef test_it(vm): pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*vmrun console*", "words of a boot", "*a [?]]0;title[?]line"])
    assert "\x1b" not in result.stdout.str() and "\x07" not in result.stdout.str()


def test_it_costs_nothing_unused() -> None:
    program = (
        "import sys, pytest; before = set(sys.modules); import vmrun.pytest_plugin; "
        "new = set(sys.modules) - before; costly = {'vmrun', 'devices', 'asyncio', 'rich', 'typer'}; "
        "print(sorted(name for name in new if name.split('.')[0] in costly))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "['vmrun', 'vmrun.pytest_plugin']"


def test_the_entry_point_names_the_plugin() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"vmrun": "vmrun.pytest_plugin"}
