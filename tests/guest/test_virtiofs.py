"""Linux mounts directories of the host's: in a machine that boots with them, and in one made of a snapshot
that has places for them.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from vmrun.agent.process import Capture
from vmrun.agent.session import AgentSession
from vmrun.errors import EXIT_VMM, UserError
from vmrun.guestkit import guest_agent, kit
from vmrun.host import virtiofsd
from vmrun.host.console import Console
from vmrun.machine.config import DiskConfig, MachineConfig, Mount
from vmrun.machine.machine import Machine, Outcome
from vmrun.machine.ports import PortListener
from vmrun.machine.saving import Saving
from vmrun.snapshot.restore import Snapshot

TIMEOUT = 400.0
SIZE = 256 * 1024

pytestmark = [
    pytest.mark.slow,
    pytest.mark.by_hand,
    pytest.mark.skipif(virtiofsd.find() is None, reason="needs virtiofsd"),
]


@pytest.fixture
def shares(tmp_path: Path) -> dict[str, Path]:
    """Two directories to be shared, and beside them what the guest must not reach."""
    found = {}
    for name in ("work", "fixed"):
        found[name] = tmp_path / "shares" / name
        found[name].mkdir(parents=True)
        (found[name] / "hello").write_text(f"the host's {name}\n")
    (found["work"] / "large").write_bytes(os.urandom(SIZE))
    (tmp_path / "shares" / "secret").write_text("not for guests\n")
    return found


@pytest.fixture
def config(guest_kit: kit.GuestKit) -> MachineConfig:
    disk = DiskConfig(guest_kit.disk, "qcow2", read_only=True)
    return MachineConfig(
        initrd=guest_agent.build().initramfs, disks=(disk,), cmdline="root=/dev/vda ro loglevel=4"
    )


class Shell:
    """A shell in the guest, whose root is read-only."""

    def __init__(self, session: AgentSession) -> None:
        self.session = session
        session.mount("tmpfs", "none", "/mnt", timeout=TIMEOUT)

    def __call__(self, script: str) -> tuple[int, str]:
        output = Capture()
        process = self.session.exec(["sh", "-c", f"exec 2>&1; {script}"], stdout=output, timeout=TIMEOUT)
        return process.wait(TIMEOUT).code or 0, bytes(output.data).decode()

    def mount(self, tag: str, path: str) -> None:
        self.session.mount("virtiofs", tag, path, timeout=TIMEOUT)


def run(
    directory: Path,
    config: MachineConfig,
    script: Callable[[Machine, Shell], None],
    saved: Snapshot | None = None,
) -> Outcome:
    """Run a machine to its end, with `script` beside it in a thread of its own."""
    failures: list[BaseException] = []
    seen = bytearray()
    with ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        machine = Machine(config, stack.enter_context(Console(null, null)), stack, saved)
        machine.uart.output = seen.extend
        path = directory / "agent"
        stack.callback(PortListener(machine.loop, machine.agent_ports, path).close)

        def client() -> None:
            try:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(os.fspath(path))
                    with AgentSession(sock) as session:
                        session.hello(TIMEOUT)
                        script(machine, Shell(session))
            except BaseException as failure:
                failures.append(failure)
                machine.end(0, "the script failed")

        thread = threading.Thread(target=client)
        thread.start()
        outcome = machine.run(timeout=TIMEOUT)
    thread.join(10)
    if failures:
        raise AssertionError(seen.decode(errors="replace")[-2000:]) from failures[0]
    return outcome


def use(shell: Shell, shares: dict[str, Path]) -> None:
    """What a guest does with a directory that it may write to, at /mnt/work."""
    work = shares["work"]
    assert shell("cat /mnt/work/hello") == (0, "the host's work\n")
    code, said = shell("sha256sum < /mnt/work/large; cp /mnt/work/large /mnt/work/copy")
    assert (code, said.split()[0]) == (0, hashlib.sha256((work / "large").read_bytes()).hexdigest())
    assert (work / "copy").read_bytes() == (work / "large").read_bytes()
    # Live, both ways.
    assert shell("echo there > /mnt/work/new") == (0, "")
    assert (work / "new").read_text() == "there\n"
    (work / "later").write_text("later\n")
    assert shell(
        "cat /mnt/work/later; rm /mnt/work/later; mkdir /mnt/work/d; mv /mnt/work/new /mnt/work/d"
    ) == (
        0,
        "later\n",
    )
    assert not (work / "later").exists() and (work / "d" / "new").read_text() == "there\n"
    # A link means what it means in the guest.
    secret = work.parent / "secret"
    code, said = shell(
        f"ln -s ../secret /mnt/work/out; ln -s {secret} /mnt/work/far; cat /mnt/work/out /mnt/work/far"
    )
    assert code != 0 and "not for guests" not in said
    shell("echo overwritten > /mnt/work/out; echo overwritten > /mnt/work/far")
    assert os.readlink(work / "out") == "../secret" and os.readlink(work / "far") == str(secret)
    assert secret.read_text() == "not for guests\n"
    code, said = shell("ls /mnt/work/..; cat /mnt/work/../secret; mknod /mnt/work/null c 1 3")
    assert code != 0 and "not for guests" not in said
    assert not (work / "null").exists()


@pytest.mark.timeout(500)
def test_linux_mounts_directories(tmp_path: Path, shares: dict[str, Path], config: MachineConfig) -> None:
    mounts = (Mount(shares["work"], "work"), Mount(shares["fixed"], "fixed", read_only=True))

    def script(machine: Machine, shell: Shell) -> None:
        shell.mount("work", "/mnt/work")
        use(shell, shares)
        # The guest may mount it as it likes: it is the host that refuses.
        shell.mount("fixed", "/mnt/fixed")
        assert shell("cat /mnt/fixed/hello") == (0, "the host's fixed\n")
        for attempt in ("echo x > /mnt/fixed/x", "echo x > /mnt/fixed/hello", "rm /mnt/fixed/hello"):
            code, said = shell(attempt)
            assert code != 0 and "Read-only file system" in said
        assert shell("chmod 777 /mnt/fixed/hello; mount -o remount,rw /mnt/fixed; touch /mnt/fixed/x")[0] != 0
        assert [path.name for path in shares["fixed"].iterdir()] == ["hello"]
        assert (shares["fixed"] / "hello").read_text() == "the host's fixed\n"
        process = machine._mounts[0].virtiofsd
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)

    outcome = run(tmp_path, replace(config, mounts=mounts), script)
    assert outcome == Outcome(EXIT_VMM, f"the virtiofsd of {shares['work']} was killed by signal 9")


@pytest.mark.timeout(1000)
def test_a_clone_mounts_what_its_template_had_a_place_for(
    tmp_path: Path, shares: dict[str, Path], config: MachineConfig
) -> None:
    def save(machine: Machine, shell: Shell) -> None:
        assert shell("true") == (0, "")
        saving = Saving(machine)
        machine.loop.call_soon(lambda: saving.begin(tmp_path / "template", end=True, done=results.append))

    results: list[object] = []
    outcome = run(tmp_path, replace(config, mounts=(Mount(None, "work"), Mount(None, "other"))), save)
    assert outcome.code == 0, outcome
    assert not isinstance(results[0], UserError)
    with Snapshot(tmp_path / "template") as snapshot:
        with pytest.raises(UserError, match="no place for a mount else"):
            snapshot.config(mounts=[Mount(shares["work"], "else")])
        mounted = snapshot.config(mounts=[Mount(shares["work"], "work")])

        def script(machine: Machine, shell: Shell) -> None:
            shell.mount("work", "/mnt/work")
            use(shell, shares)
            # What is mounted cannot be saved, but can hold still.
            with pytest.raises(UserError, match="known to virtiofsd only"):
                Saving(machine).begin(tmp_path / "another", end=False, done=results.append)
            still = threading.Event()
            machine.loop.call_soon(lambda: machine.pause.pause(lambda error: still.set()))
            assert still.wait(TIMEOUT)
            machine.loop.call_soon(machine.pause.resume)
            assert shell("cat /mnt/work/hello") == (0, "the host's work\n")
            assert shell("umount /mnt/work")[0] == 0
            machine.end(0, "all was said")

        outcome = run(tmp_path, mounted, script, snapshot)
    assert outcome == Outcome(0, "all was said")
