"""The agent as /init of its initramfs, in a real guest: over its ports, on the kit's disk."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmrun.agent.process import Capture
from vmrun.agent.session import MS_NOSUID, AgentSession
from vmrun.guestkit import guest_agent, kit
from vmrun.host.console import Console
from vmrun.machine.config import DiskConfig, MachineConfig
from vmrun.machine.machine import Machine
from vmrun.machine.ports import PortListener

TIMEOUT = 400.0


def talk(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        with AgentSession(client) as guest:
            guest.hello(TIMEOUT)
            guest.add_entropy(timeout=60)
            guest.set_time(60)
            facts = guest.info(60)
            assert str(facts["kernel"]).endswith("-vmrun")
            assert int(facts["memory"]) < 256 << 20
            capture, errors = Capture(), Capture()
            script = "echo $$ $USER; cat; date +%s >&2; grep -c ' / ext4 ' /proc/mounts >&2; exit 42"
            data = os.urandom(30_000)
            process = guest.exec(["sh", "-c", script], stdin=data, stdout=capture, stderr=errors, timeout=60)
            assert process.wait(100).code == 42
            first, _, rest = bytes(capture.data).partition(b"\n")
            assert first.split() == [str(process.pid).encode(), b"root"]
            assert rest == data
            seconds, roots = (int(line) for line in errors.data.split())
            assert abs(seconds - time.time()) < 30
            assert roots == 1
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(str(path))
                with AgentSession(second) as beside:
                    beside.hello(TIMEOUT)
                    beside.exec(["true"], timeout=60).wait(60)
            guest.ping(60)
            left = guest.exec(["sleep", "100000"], timeout=60)
            guest.mount("tmpfs", "none", "/mnt/there", MS_NOSUID, "size=1m", timeout=60)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        with AgentSession(client) as guest:
            guest.hello(TIMEOUT)
            # The new session has ended what the old one left.
            assert guest.exec(["kill", "-0", str(left.pid)], timeout=60).wait(60).code == 1
            capture = Capture()
            process = guest.exec(["stty", "size"], tty=(33, 99), stdout=capture, timeout=60)
            assert process.wait(60).code == 0
            assert capture.data.strip() == b"33 99"
            process = guest.exec(["sleep", "100000"], timeout=60)
            process.signal(signal.SIGTERM)
            assert process.wait(60).signal == signal.SIGTERM
            guest.poweroff(timeout=60)


@pytest.mark.guest
@pytest.mark.timeout(500)
def test_agent_in_a_guest(guest_kit: kit.GuestKit, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(guest_kit.disk.read_bytes())
    config = MachineConfig(
        initrd=guest_agent.build().initramfs, disks=(DiskConfig(disk, "qcow2"),), cmdline="root=/dev/vda rw"
    )
    failures: list[BaseException] = []
    with ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        seen = bytearray()
        machine = Machine(config, stack.enter_context(Console(null, null)), stack)
        machine.uart.output = seen.extend
        path = tmp_path / "agent"
        stack.callback(PortListener(machine.loop, machine.agent_ports, path).close)

        def client() -> None:
            try:
                talk(path)
            except BaseException as failure:
                failures.append(failure)
                machine.end(0, "the test failed")

        thread = threading.Thread(target=client)
        thread.start()
        outcome = machine.run(timeout=TIMEOUT)
    thread.join(10)
    if failures:
        raise failures[0]
    assert outcome.code == 0, seen.decode(errors="replace")[-2000:]
