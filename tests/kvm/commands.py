"""The `vmrun` command, as tests of machines type it. The fixture `base` gives it a place of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from vmrun.errors import EXIT_IMAGE

Result = subprocess.CompletedProcess[str]


def vmrun(*arguments: str | Path, **options: Any) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "vmrun", *map(str, arguments)],
        stdin=options.pop("stdin", subprocess.DEVNULL),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def good(*arguments: str | Path) -> str:
    """What it printed; it must have gone well."""
    result = vmrun(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(*arguments: str | Path, code: int = EXIT_IMAGE) -> str:
    """The line that says why; it must have been refused with `code`."""
    result = vmrun(*arguments)
    assert result.returncode == code, result.stderr
    assert len(result.stderr.splitlines()) <= 2 and "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]
