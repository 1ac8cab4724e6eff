"""A stock kernel and stock glibc programs run right, also where KVM leaves half of the work to
vmrun.kvm.software.

One guest runs all checks of programs/*.c; each is a test here, by its name in the transcript.
"""

import re
from collections.abc import Callable

import pytest

from tests.guest.conftest import PROGRAMS, Transcript
from vmrun.guestkit.kit import GuestKit

_TABLE_ENTRY = re.compile(r'^ +\{"(\w+)", \w+\},$|^const struct check \w+\[\] = \{\{"(\w+)", ', re.MULTILINE)


def _checks(*groups: str) -> list[str]:
    """The names in the tables at the ends of the C files."""
    return [
        first or second
        for group in groups
        for first, second in _TABLE_ENTRY.findall((PROGRAMS / f"{group}.c").read_text())
    ]


CHECKS = _checks("floats", "threads", "signals", "processes", "memory", "events", "vectors", "hostile")


@pytest.fixture(scope="session")
def transcript(guest_kit: GuestKit, run_checks: Callable[..., Transcript]) -> Transcript:
    symbols = {line.split()[2]: line.split()[0] for line in guest_kit.system_map.read_text().splitlines()}
    entry, handler = symbols["entry_SYSCALL_64"], symbols["asm_exc_page_fault"]
    return run_checks(f"VECTOR_SECONDS=8 LSTAR={entry} FAULT_HANDLER={handler}", timeout=230)


@pytest.mark.timeout(330)
@pytest.mark.parametrize("check", CHECKS)
def test_check(transcript: Transcript, check: str) -> None:
    assert transcript.result(check) == "ok"


def test_vector_registers_went_through_context_switches(transcript: Transcript) -> None:
    lines = transcript.lines("vectors process")
    switches = [int(re.search(r"(\d+) context switches", line)[1]) for line in lines]  # type: ignore[index]
    assert len(switches) == 3 and min(switches) > 20, lines


def test_the_guest_ends_the_machine(transcript: Transcript) -> None:
    assert transcript.lines("done")
    assert transcript.boot.code == 0, transcript.boot.stderr


def test_a_program_cannot_use_the_kernels_entry_points(transcript: Transcript) -> None:
    """Jumping to LSTAR or to the page-fault handler is a page fault, not a system call."""
    outcomes = transcript.lines("hostile asm volatile(")
    assert len(outcomes) >= 15
    assert {line.rpartition(" ")[2] for line in outcomes} <= {"0xb", "0x5"}, outcomes


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_vector_registers_for_a_minute(run_checks: Callable[..., Transcript]) -> None:
    transcript = run_checks("CHECKS=vectors VECTOR_SECONDS=60", timeout=230)
    assert transcript.result("registers_stay") == "ok"
    assert transcript.boot.code == 0


@pytest.mark.timeout(330)
def test_two_cpus(run_checks: Callable[..., Transcript]) -> None:
    transcript = run_checks("CHECKS=vectors,threads,processes VECTOR_SECONDS=8", "--cpus", "2", timeout=230)
    for check in _checks("vectors", "threads", "processes"):
        assert transcript.result(check) == "ok"
    assert transcript.lines("cpus 2")
    assert transcript.boot.code == 0
