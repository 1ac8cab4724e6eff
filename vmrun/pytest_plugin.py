"""Tests in throw-away machines, for pytest: docs/python.md. Loaded by every pytest of the environment that
vmrun is installed in, so nothing of it is imported before a test asks for a machine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmrun.run.sandbox import Sandbox

MARKER = (
    "vmrun(image='kit', kernel=None, memory='512M', cpus=1, timeout=None, fresh=False): "
    "what the machine of the fixture `vm` is made of; image and kernel are paths, relative to the directory "
    "of the test's file if they begin with a dot, and timeout ends it after so many seconds"
)
OPTIONS = frozenset({"image", "kernel", "memory", "cpus", "timeout", "fresh"})

_MACHINE: pytest.StashKey[Sandbox] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A machine of its own for each test, a vmrun.Sandbox, as the marker `vmrun` describes it."""
    options = _options(request.node)
    from vmrun.run.sandbox import Sandbox

    with Sandbox(**options) as sandbox:
        request.node.stash[_MACHINE] = sandbox
        yield sandbox


def _options(node: pytest.Item) -> dict[str, Any]:
    """Of the markers of the test, its class and its module: the nearest one that says something counts."""
    given: dict[str, Any] = {}
    for marker in node.iter_markers("vmrun"):
        unknown = set(marker.kwargs) - OPTIONS
        if marker.args or unknown:
            what = ", ".join(sorted(unknown)) or "values without names"
            raise pytest.UsageError(f"{node.nodeid}: the marker vmrun does not take {what}: {MARKER}")
        given = {**marker.kwargs, **given}
    for name in ("image", "kernel"):
        if str(given.get(name, "")).startswith("."):
            given[name] = node.path.parent / str(given[name])
    if given.get("kernel") is not None:
        from pathlib import Path

        given["kernel"] = Path(given["kernel"])
    return given


# Of the older of pytest's two kinds: it must not break the tests of those who have an older pytest.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """What the machine printed on its console belongs to the report of a test that failed."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    if report.failed and "vm" in getattr(item, "fixturenames", ()):
        # Of a machine that ended by itself, the error knows it; in a teardown the machine may be gone.
        console = getattr(call.excinfo.value, "console", "") if call.excinfo is not None else ""
        if not console and _MACHINE in item.stash:
            console = item.stash[_MACHINE].console()
        if console:
            from vmrun.run.ending import printable

            # It goes to the terminal, and into reports that programs read.
            report.sections.append(("vmrun console", printable(console)))
