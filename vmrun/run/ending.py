"""How the machine of a sandbox ended while something was to be done in it. Owner's process."""

import os
from pathlib import Path

from vmrun.control import runtime
from vmrun.errors import UserError

CONSOLE_BYTES = 4096  # of the console are told when a machine ends unasked


class SandboxEnded(UserError):
    """The machine ended while something was to be done in it. `console` is what it printed last."""

    def __init__(self, code: int, reason: str, console: str) -> None:
        super().__init__(reason, code)
        self.console = console


def log_directories(name: str) -> tuple[Path, Path]:
    """Where the logs of the machine `name` are while it runs, and where after that."""
    base = runtime.base_directory()
    return base / name, base / runtime.ENDED / name


def last_words(name: str) -> str:
    """What the guest of the machine `name` printed on its console last."""
    for directory in log_directories(name):
        try:
            with open(directory / runtime.CONSOLE_LOG, "rb", buffering=0) as file:
                # Not all of it: a VMM that was taken over says how long it is.
                size = os.fstat(file.fileno()).st_size
                text = os.pread(file.fileno(), CONSOLE_BYTES, max(0, size - CONSOLE_BYTES))
        except OSError:
            continue
        return text.decode("utf-8", "replace")
    return ""


def printable(console: str) -> str:
    """The guest's words for a terminal or a report, without control characters that would do something to
    it.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in console.replace("\r", ""))
