"""How the machine of a sandbox ended while something was to be done in it. Owner's process."""

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
            text = (directory / runtime.CONSOLE_LOG).read_bytes()[-CONSOLE_BYTES:]
        except OSError:
            continue
        return text.decode("utf-8", "replace")
    return ""
