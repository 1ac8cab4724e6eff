"""What the owner of a machine makes of its process: one that is gone already, or speaks for somebody else."""

import json
import os

import pytest

from vmrun.control.detach import Owned
from vmrun.errors import EXIT_VMM, UserError


def owned(first_line: bytes = b"") -> Owned:
    """The owner's side of a process that says `first_line` and ends."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    owned_end, owner_end = os.pipe2(os.O_CLOEXEC)
    os.close(owned_end)
    os.write(write_end, first_line)
    os.close(write_end)
    pid = os.posix_spawn("/bin/true", ["true"], {})
    return Owned(pid, os.pidfd_open(pid), owner_end, os.fdopen(read_end, "rb"))


def test_a_process_that_somebody_else_has_reaped() -> None:
    machine = owned()
    os.waitpid(machine.pid, 0)
    machine.close()
    machine.close()
    assert machine.cpu_seconds == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(machine.pidfd)


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "", "a\nb", "x" * 64])
def test_a_machine_that_calls_itself_a_path(name: str) -> None:
    with owned(json.dumps({"name": name}).encode() + b"\n") as machine:
        with pytest.raises(UserError, match="a machine's name is"):
            machine.wait_until_running()
        assert not machine.name


def test_a_machine_that_has_a_name() -> None:
    with owned(b'{"name": "web"}\n') as machine:
        assert machine.wait_until_running() == machine.name == "web"


@pytest.mark.parametrize(
    "line",
    [
        b"no JSON\n",
        b"7\n",
        b"[" * 60000 + b"\n",
        b'{"name": ["web"]}\n',
        b'{"code": "0", "reason": "done"}\n',
        b'{"code": 0, "reason": {}}\n',
        b'{"code": 256, "reason": "done"}\n',  # 0 to a shell
        b'{"code": 0, "reason": "' + b"x" * 65500,
    ],
)
def test_a_machine_that_talks_nonsense(line: bytes) -> None:
    with owned(line) as machine:
        assert machine.wait() == (EXIT_VMM, "the machine's process talks nonsense")
    with owned(line) as machine, pytest.raises(UserError, match="nonsense"):
        machine.wait_until_running()


def test_a_machine_that_says_its_name_for_ever() -> None:
    with owned(b'{"name": "web"}\n' * 3) as machine:
        assert machine.wait() == (EXIT_VMM, "")


def test_how_a_machine_ended_is_printable() -> None:
    with owned(b'{"name": "web"}\n{"code": 3, "reason": "\\u001b[2J it was t\xc3\xadme"}\n') as machine:
        assert machine.wait() == (3, "?[2J it was t\u00edme")
        assert machine.wait() == (3, "?[2J it was t\u00edme")
