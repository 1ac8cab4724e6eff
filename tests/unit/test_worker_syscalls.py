"""No entry of the system call table is there for nothing: each one, made fatal, kills a worker at
everyday work.
"""

import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.vhost.messages import ProtocolError
from devices.virtio.device import VIRTIO_ID_BLOCK, VIRTIO_ID_NET
from devices.worker import launcher, seccomp
from tests.unit.worker_session import Session
from vmrun.host.tap import Tap

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.usefixtures("network_namespace")]

# What only other hosts or moments need: another C library, a clock the vDSO cannot tell, a stopped process
# that goes on in the middle of a timed wait, a back end that waits with a timeout, a heap that grew, a module
# that asks, and a machine whose memory comes out of a snapshot (test_pager.py).
NOT_HERE = {
    "fstat",
    "preadv",
    "pwritev",
    "clock_gettime",
    "restart_syscall",
    "poll",
    "mremap",
    "brk",
    "getpid",
    "ioctl",
}

FATAL_STUB = """import sys; sys.path[0:0] = [{{root!r}}]
from devices.worker import seccomp
allowed = tuple(entry for entry in seccomp.ALLOWED if entry.name != {name!r})
fatal = [(entry.name, entry.number) for entry in seccomp.ALLOWED if entry.name == {name!r}]
seccomp.FATAL += tuple(fatal)
original = seccomp.assemble
seccomp.assemble = lambda _: original(allowed)
from devices.worker.main import main; main()"""


def use_disk(path: Path) -> Session:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with Session("blk", VIRTIO_ID_BLOCK, 1, {"format": path.suffix[1:]}, {"image": fd}) as session:
            # read, write, flush, discard
            for kind, readable, writable in (
                (1, [b"w" * 4096], []),
                (4, [], []),
                (0, [], [4096]),
                (11, [struct.pack("<QII", 0, 128, 0)], []),
            ):
                session.offer(0, [struct.pack("<IIQ", kind, 0, 0), *readable], [*writable, 1])
                session.collect(0, seconds=20)
            session.device.reset()
            while not session.worker.wait(0.05):
                os.kill(session.worker.pid, signal.SIGTERM)
        return session
    finally:
        os.close(fd)


def use_card() -> Session:
    with (
        Tap("wtap1") as tap,
        Session("net", VIRTIO_ID_NET, 2, {"mac": "52:54:00:12:34:56"}, {"tap": tap.fd}) as session,
    ):
        session.offer(0, [], [1526])
        session.offer(1, [bytes(12) + b"\xff" * 60], [])
        session.collect(1, seconds=20)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((tap.name, 0))
            wire.send(b"\xff" * 60)
        session.collect(0, seconds=20)
        session.device.reset()
    return session


def everyday_work(directory: Path) -> list[int | None]:
    """How each worker ended; a worker that dies in the middle is an AssertionError or ProtocolError."""
    ends = []
    for image in ("disk.raw", "disk.qcow2"):
        path = directory / image
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", path.suffix[1:], str(path), "4M"], check=True, timeout=60
        )
        ends.append(use_disk(path).worker.exit_code)
    ends.append(use_card().worker.exit_code)
    return ends


def test_everyday_work(tmp_path: Path) -> None:
    assert everyday_work(tmp_path) == [0, 0, 0]


@pytest.mark.parametrize("name", [entry.name for entry in seccomp.ALLOWED if entry.name not in NOT_HERE])
def test_every_call_is_needed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "STUB", FATAL_STUB.format(name=name))
    ends: list[int | None] = []
    real_launch: Callable[..., launcher.Worker] = launcher.launch
    workers: list[launcher.Worker] = []

    def launch(*arguments: object) -> launcher.Worker:
        workers.append(real_launch(*arguments))
        return workers[-1]

    monkeypatch.setattr("tests.unit.worker_session.launch", launch)
    try:
        ends = everyday_work(tmp_path)
    except (AssertionError, ProtocolError):
        pass
    ends += [worker.exit_code for worker in workers]
    assert -signal.SIGSYS in ends, f"nothing needs {name}"
