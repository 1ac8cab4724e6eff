"""Guests that take all they can get: the host and other sandboxes do not feel it.

What is measured is the machine on the host, its VMM and workers, while the guest is at it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vmrun import Sandbox
from vmrun.control.client import MachineClient
from vmrun.host.cgroup import Limits, machine_limits
from vmrun.host.console_log import LOG_LIMIT
from vmrun.machine.config import MIB
from vmrun.run.sandbox import Result

MEMORY = 64 * MIB  # a page that is touched for the first time takes an interpreted kernel milliseconds
QUOTA = 2 * MIB
LIMITS = machine_limits(MEMORY, 1, 1)
PATIENTLY_READ = 64 << 10  # bytes
PATIENCE = 120.0  # seconds: hosts may be loaded, and kernels interpreted

pytestmark = [pytest.mark.slow, pytest.mark.by_hand, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMRUN_RUNTIME", str(tmp_path_factory.getbasetemp() / "run"))
        yield


class OnHost:
    """A sandbox as the host sees it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        with MachineClient(sandbox.name) as machine:
            status = machine.status()
        self.vmm = psutil.Process(status.pid)
        self.disk = status.workers["blk0"]

    def processes(self) -> list[psutil.Process]:
        return [self.vmm, *self.vmm.children(recursive=True)]

    def used(self) -> Limits:
        """Each page counted once."""
        memory = threads = 0
        for process in self.processes():
            try:
                memory += process.memory_full_info().pss
                threads += process.num_threads()
            except psutil.NoSuchProcess:
                pass  # the pager's, which ends when all of the snapshot is in
        return Limits(memory=memory, pids=threads)

    def check(self) -> None:
        """It keeps to what its cgroup would allow, and answers."""
        used = self.used()
        assert used.memory is not None and LIMITS.memory is not None and used.memory <= LIMITS.memory
        assert used.pids is not None and LIMITS.pids is not None and used.pids <= LIMITS.pids
        with MachineClient(self.sandbox.name) as machine:
            assert machine.status().state == "running"

    def written(self) -> int:
        """Bytes of the files that the disk's worker may write to, which have no names."""
        descriptors = Path(f"/proc/{self.disk}/fd")
        deleted = [fd for fd in descriptors.iterdir() if os.readlink(fd).startswith("/var/tmp/")]
        assert deleted
        return sum(os.stat(fd).st_size for fd in deleted)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(memory=MEMORY, quota=QUOTA, confined=True) as made:
        host = OnHost(made)
        before = host.processes()
        yield made
    assert not [process for process in before if process.is_running()]


def watch(host: OnHost, sandbox: Sandbox, script: str, timeout: float = PATIENCE) -> Result:
    """Run `script`, and look at the host meanwhile."""
    results: list[Result | BaseException] = []

    def run() -> None:
        try:
            results.append(sandbox.run(["sh", "-c", script], timeout=timeout, limit=MIB))
        except BaseException as failure:
            results.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        host.check()
        thread.join(0.5)
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


def test_a_fork_bomb_stays_in_the_guest(sandbox: Sandbox) -> None:
    host = OnHost(sandbox)
    processes = len(host.processes())
    bomb = "bomb() { bomb | bomb & }; bomb; sleep 1000"
    with sandbox.start(["sh", "-c", bomb]) as running:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            host.check()
            assert len(host.processes()) <= processes
            time.sleep(0.5)
        running.kill()
        assert running.result(PATIENCE).signal == 9
    assert sandbox.run(["echo", "here"], timeout=PATIENCE).stdout == b"here\n"
    assert len(host.processes()) <= processes


@pytest.mark.slow
def test_a_memory_hog_ends_and_is_told_why(sandbox: Sandbox) -> None:
    host = OnHost(sandbox)
    result = watch(host, sandbox, "dd if=/dev/zero of=/dev/null bs=45M count=1; exit $?", 400.0)
    assert result.exit_code != 0 and result.out_of_memory, result
    assert sandbox.run(["echo", "here"], timeout=PATIENCE).stdout == b"here\n"
    host.check()


def test_a_disk_filler_meets_its_quota(sandbox: Sandbox) -> None:
    host = OnHost(sandbox)
    fill = "dd if=/dev/zero of=/fill bs=64k count=64 conv=fsync"
    result = watch(host, sandbox, fill)
    assert result.exit_code != 0 and b"error" in result.stderr.lower(), result
    assert MIB < host.written() <= QUOTA
    # The worker lives, the guest reads what it had, and what it writes now fails likewise.
    assert sandbox.run(["ls", "/bin"], timeout=PATIENCE).exit_code == 0
    assert sandbox.run(["sh", "-c", fill.replace("/fill", "/more")], timeout=PATIENCE).exit_code != 0
    assert host.written() <= QUOTA
    assert psutil.pid_exists(host.disk)
    host.check()


def test_an_output_flood_waits_for_its_reader(sandbox: Sandbox) -> None:
    """Or is cut, on the console, which never waits."""
    host = OnHost(sandbox)
    seen = 0
    reading = threading.Event()

    def read_slowly(data: bytes) -> None:
        nonlocal seen
        seen += len(data)
        if seen > PATIENTLY_READ:
            reading.wait()

    flood = "while :; do dd if=/dev/zero bs=64k count=64 2>/dev/null | tr '\\0' x; done"
    process = sandbox.exec(["sh", "-c", f"({flood}) >/dev/ttyS0 & {flood}"], stdout=read_slowly)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            host.check()
            time.sleep(0.5)
        assert seen > PATIENTLY_READ
        # Others are served although that one's reader sleeps.
        assert sandbox.run(["echo", "here"], timeout=PATIENCE).stdout == b"here\n"
        logs = [sandbox.console_log, sandbox.console_log.with_name(sandbox.console_log.name + ".1")]
        assert all(log.stat().st_size <= LOG_LIMIT + 4096 for log in logs)
        assert logs[0].stat().st_size + logs[1].stat().st_size > 0
    finally:
        process.kill()
        reading.set()
    process.ended(PATIENCE)
    host.check()


def test_a_busy_guest_does_not_stop_another(sandbox: Sandbox) -> None:
    said = threading.Semaphore(0)
    busy = "while :; do i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done; echo; done"
    process = sandbox.exec(["sh", "-c", busy], stdout=lambda data: said.release())
    try:
        assert said.acquire(timeout=PATIENCE)
        with Sandbox(memory=MEMORY, quota=QUOTA, confined=True) as other:
            assert other.run(["echo", "here"], timeout=PATIENCE).stdout == b"here\n"
        while said.acquire(blocking=False):
            pass
        assert said.acquire(timeout=PATIENCE)
    finally:
        process.kill()
