"""How a Linux guest's end becomes vmrun's exit code."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.conftest import Transcript, boot
from vmrun import Machine, MachineConfig
from vmrun.control.client import Ending
from vmrun.errors import EXIT_PANIC, EXIT_TIMEOUT
from vmrun.guestkit import kit


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


@pytest.mark.usefixtures("base")
def test_a_guest_whose_disks_are_idle_is_not_gone_before_its_agent_answers(
    guest_kit: kit.GuestKit, tmp_path: Path
) -> None:
    """Nothing is to be synced here, so the agent's answer and the guest's end are a race; again and again."""
    saved = tmp_path / "saved"
    with Machine.boot(MachineConfig(initrd=guest_kit.initramfs), name="idle") as machine:
        # Its command waits until there is an agent.
        words = ["exec", "idle", "--", "/bin/busybox", "true"]
        subprocess.run([sys.executable, "-m", "vmrun", *words], check=True, timeout=200)
        machine.snapshot(saved, end=True)
    for _ in range(8):
        with Machine.restore(saved) as machine:
            # It is not yet told who it is, and perhaps does not hold still yet, which a restore begins with.
            assert machine.stop(timeout=100) == Ending(0, "the guest reset the machine")
