"""Machines owned by a Python program, on the real KVM."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from devices.block.qcow2_create import create_qcow2
from vmrun.api import Machine
from vmrun.control import runtime
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.config import DiskConfig, MachineConfig

Kernel = Callable[[str], Path]
COUNT = """
    again: mov bl, 'A'
    next: mov dx, 0x3f8
    mov al, bl
    out dx, al
    inc bl
    cmp bl, 'Z'
    jbe next
    jmp again
"""
MIB = 1 << 20


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    monkeypatch.setenv("VMRUN_RUNTIME", str(path))
    yield path
    assert not runtime.running()


@pytest.fixture
def config(bare_kernel: Kernel, tmp_path: Path) -> MachineConfig:
    with open(tmp_path / "x.qcow2", "w+b") as file:
        create_qcow2(file.fileno(), 1 << 30)
    disk = DiskConfig(tmp_path / "x.qcow2", "qcow2")
    return MachineConfig(memory=64 * MIB, kernel=bare_kernel(COUNT), disks=(disk,))


def test_a_life(config: MachineConfig, tmp_path: Path) -> None:
    with Machine.boot(config, name="web") as machine:
        assert machine.status().state == "running" and machine.name == "web"
        assert machine.inspect()["config"]["disks"][0]["format"] == "qcow2"
        machine.pause()
        assert machine.status().state == "paused"
        saved = machine.snapshot(tmp_path / "s")
        assert saved.directory == tmp_path / "s" and len(saved.disks) == 1
        machine.resume()
        machine.reset()
        with machine.console(replay=100) as console:
            console.settimeout(30)
            assert b"A" in console.recv(4096) + console.recv(4096)
        assert machine.stop(force=True).code == 143
        assert machine.wait().code == 143
    with Machine.restore(tmp_path / "s", paused=True, throw_away=True) as machine:
        assert machine.status().state == "paused"
        machine.resume()
    assert not runtime.running()
    names = {path.name for path in tmp_path.glob("*.qcow2")}
    assert names == {"x.qcow2", "x.1.qcow2"}


def test_what_is_asked_of_a_machine_that_was_just_restored(config: MachineConfig, tmp_path: Path) -> None:
    """It begins by holding still, which must neither end what is asked for next nor be ended by it."""
    with Machine.boot(config) as machine:
        machine.snapshot(tmp_path / "s", end=True)
    for number in range(5):
        with Machine.restore(tmp_path / "s", throw_away=True) as machine:
            machine.pause()
            assert machine.status().state == "paused"
        with Machine.restore(tmp_path / "s", throw_away=True) as machine:
            machine.snapshot(tmp_path / f"s{number}")
            assert machine.status().state == "running"
        with Machine.restore(tmp_path / "s", throw_away=True) as machine:
            assert machine.stop().code == 143  # nobody in it can be asked


def test_a_quota_outlives_a_snapshot(config: MachineConfig, tmp_path: Path) -> None:
    (disk,) = config.disks
    assert isinstance(disk, DiskConfig)
    limited = replace(config, disks=(replace(disk, throw_away=True, quota=5 * MIB, serial="one"),))

    def facts(machine: Machine) -> tuple[object, ...]:
        (found,) = machine.inspect()["config"]["disks"]
        return found["quota"], found["serial"], found["throw_away"]

    with Machine.boot(limited) as machine:
        machine.snapshot(tmp_path / "s")
        assert facts(machine) == (5 * MIB, "one", True)
        with Machine.restore(tmp_path / "s", throw_away=True) as other:
            assert facts(other) == (5 * MIB, "one", True)


def test_it_fails_as_the_command_does(config: MachineConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no snapshot") as caught:
        Machine.restore(tmp_path)
    assert caught.value.code == EXIT_IMAGE
    with Machine.boot(config), pytest.raises(UserError, match="in use"):
        Machine.boot(config)


def test_from_threads(config: MachineConfig) -> None:
    with Machine.boot(MachineConfig(memory=64 * MIB, kernel=config.kernel)) as machine:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(10):
                    assert machine.status().state == "running"
                    with Machine.boot(MachineConfig(memory=64 * MIB, kernel=config.kernel)) as other:
                        assert other.name != machine.name
                        other.pause()
                        other.resume()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


def test_a_killed_program_leaves_no_machine(config: MachineConfig) -> None:
    program = f"""
import sys, time
from pathlib import Path
from vmrun.api import Machine
from vmrun.machine.config import MachineConfig
machine = Machine.boot(MachineConfig(memory=64 << 20, kernel=Path({str(config.kernel)!r})), name="orphan")
print(machine.pid, flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        pidfd = os.pidfd_open(pid)
        assert "orphan" in runtime.running()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while runtime.running() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.close(pidfd)
    assert not runtime.running()
