"""How a Linux guest's end becomes vmrun's exit code."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.conftest import Transcript, boot
from vmrun.errors import EXIT_PANIC, EXIT_TIMEOUT


@pytest.mark.timeout(200)
def test_a_panic_ends_the_machine(run_checks: Callable[..., Transcript]) -> None:
    """panic=-1 makes Linux restart at once when PID 1 exits."""
    transcript = run_checks("CHECKS=none END=exit", timeout=100)
    assert (
        "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300" in transcript.boot.console
    )
    assert transcript.boot.code == EXIT_PANIC, transcript.boot.stderr


@pytest.mark.timeout(200)
def test_a_signal_ends_the_machine(check_initramfs: Path) -> None:
    result = boot("--initrd", check_initramfs, "--append", "CHECKS=none END=pause", timeout=100, until="done")
    assert result.code == 128 + 15
    assert "stopped by SIGTERM" in result.stderr


def test_the_timeout_ends_the_machine(check_initramfs: Path) -> None:
    result = boot("--initrd", check_initramfs, timeout=1)
    assert result.code == EXIT_TIMEOUT
    assert "timed out after 1 s" in result.stderr
