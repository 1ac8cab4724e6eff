"""Linux guests that are paused, saved, restored and cloned in the middle of their work.

The guest is the kit's, on a qcow2 root disk, with a card, a disc and two CPUs. In place of a shell it runs
snapshot_load.c, which hashes memory on each CPU, writes blocks and reads them back, exchanges packets with
the host, and counts what is wrong. It boots once, and every test goes on from the snapshots made there: one
while it rests, one while it works.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.guest.conftest import Build
from vmrun.control import runtime
from vmrun.control.client import MachineClient
from vmrun.guestkit import kit

pytestmark = [pytest.mark.slow, pytest.mark.by_hand, pytest.mark.root, pytest.mark.timeout(1800)]

PROGRAM = Path(__file__).with_name("snapshot_load.c")
MIB = 1 << 20
ANSWER_SECONDS = 300.0
BOOT_SECONDS = 600.0
CPUS = 2
MAC = "52:54:00:12:34:56"
HOST, GUEST, PORT = "10.88.0.1", "10.88.0.2", 7777
NIC = f"tap0,ip={HOST}/24,mac={MAC}"
DISC = bytes(range(256)) * 2048
# A disk may have 16 files below it, and each snapshot that a machine goes on from adds one.
GENERATIONS = 12
SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]


def vmrun(*arguments: str | Path, inside: tuple[str, ...] = ()) -> str:
    command = [*inside, sys.executable, "-m", "vmrun", *map(str, arguments)]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{command[3:]}: {result.stderr}"
    return result.stdout


class Guest:
    """A running machine and its console. A context manager that ends it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.said = ""
        with MachineClient(name) as machine:
            self._console = machine.console()
        self._console.settimeout(ANSWER_SECONDS)
        self._questions = 0

    def until(self, pattern: str, seconds: float = ANSWER_SECONDS) -> re.Match[str]:
        """Read on until it has said `pattern`, which is forgotten with all before it."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.said)) is None:
            self._console.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._console.recv(65536)
            except TimeoutError:
                data = b""
            assert data, f"{self.name} does not say {pattern!r}: {self.said[-2000:]}\n{self.log()}"
            self.said += data.decode(errors="replace").replace("\r", "")
        self.said = self.said[found.end() :]
        return found

    def log(self) -> str:
        return vmrun("log", self.name, "--vmm")

    def ask(self, command: str) -> str:
        """What comes behind the word that only this answer has."""
        self._questions += 1
        word = f"{self.name}.{self._questions}"
        self._console.sendall(f"{command} {word}\n".encode())
        return self.until(rf"{command} {re.escape(word)}(.*)\n")[1].strip()

    def status(self) -> dict[str, str]:
        return dict(pair.split("=") for pair in self.ask("status").split())

    def clock(self) -> "Ahead":
        """How many seconds its wall clock is ahead of ours: it reads it after our question and before its
        first byte, between which there may be seconds on a busy host.
        """
        answers = [self._clock() for _ in range(4)]
        return Ahead(max(each.least for each in answers), min(each.most for each in answers))

    def _clock(self) -> "Ahead":
        self._questions += 1
        asked = time.time()
        self._console.sendall(f"clock clock{self._questions}\n".encode())
        self._console.settimeout(ANSWER_SECONDS)
        self.said += self._console.recv(1).decode()
        answered = time.time()
        told = float(self.until(rf"clock clock{self._questions} (\S+)\n")[1])
        return Ahead(told - answered, told - asked)

    def works(self) -> None:
        """Everything in it goes on from here: both CPUs, the disk, the card (if the host answers)."""
        before = self.status()
        keys = ["writes", "reads", *(f"cpu{cpu}" for cpu in range(CPUS))]
        deadline = time.monotonic() + ANSWER_SECONDS
        while any(int((now := self.status())[key]) <= int(before[key]) for key in keys):
            assert time.monotonic() < deadline, f"{before} {now}"
        nothing_is_wrong(now)

    def talks(self, echo: "Echo") -> None:
        """It gets packets from the host, and the host from it, from here on."""
        before, got = int(self.status()["received"]), len(echo.numbers)
        deadline = time.monotonic() + ANSWER_SECONDS
        while int((now := self.status())["received"]) <= before + 5 or len(echo.numbers) <= got + 2:
            assert time.monotonic() < deadline, now

    def end(self, load: Path) -> None:
        """Have it look through everything, shut down, and compare its memory with what it should be."""
        with MachineClient(self.name) as machine:
            self._questions += 1
            self._console.sendall(f"end last{self._questions}\n".encode())
            self.until(r"status last\S+ ")
            nothing_is_wrong(dict(pair.split("=") for pair in self.until(r"(.*)\n")[1].split()))
            for cpu in range(CPUS):
                rounds, found = self.until(rf"memory {cpu} (\d+) (\w+)\n").groups()
                expected = subprocess.run(
                    [load, str(cpu), rounds], capture_output=True, text=True, check=True, timeout=300
                ).stdout
                assert found == expected.strip(), f"CPU {cpu} after {rounds} rounds"
            assert machine.wait(ANSWER_SECONDS).code == 0
        self._console.close()

    def inspect(self) -> dict[str, Any]:
        with MachineClient(self.name) as machine:
            return machine.inspect()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        pid = runtime.running().get(self.name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def nothing_is_wrong(status: dict[str, str]) -> None:
    wrong = {key: status[key] for key in ("bad", "failures", "doubled", "corrupt") if status[key] != "0"}
    assert not wrong, status


class Echo:
    """The host's end: sends packets back, and packets of its own. A context manager, of a thread that lives
    in the network namespace of whoever makes it.
    """

    def __init__(self, address: str = GUEST) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("", PORT))
        self._sock.settimeout(0.05)
        self._guest = (address, PORT)
        self._over = threading.Event()
        self.numbers: list[int] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                self._sock.sendto(packet(b"h", number), self._guest)
            except OSError:
                pass  # there is no such network just now
            try:
                data, sender = self._sock.recvfrom(2048)
                self.numbers.append(int.from_bytes(data[8:16], "little"))
                self._sock.sendto(data, sender)
            except OSError:
                pass

    def __enter__(self) -> "Echo":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sock.close()


def packet(kind: bytes, number: int) -> bytes:
    """snapshot_load.c's struct packet."""
    kind_of = int.from_bytes(kind, "little")
    words = [kind_of, number]
    words += [((number + word) * 0x9E3779B97F4A7C15 % (1 << 64)) ^ kind_of for word in range(30)]
    return b"".join(word.to_bytes(8, "little") for word in words)


@dataclass(frozen=True)
class Ahead:
    """A clock is ahead of ours by a number of seconds between these."""

    least: float
    most: float

    def is_no_worse_than(self, before: "Ahead") -> bool:
        """The kit's guests lose time at boot. A restore keeps that until the agent gets to setting the clock,
        and the time is then as old as its way there was long.
        """
        return self.most > before.least - 0.3 and self.least < max(before.most, 0) + 0.3


@dataclass(frozen=True)
class Saved:
    """The snapshots, and how much the guest's clock was ahead of the host's in them."""

    resting: Path
    working: Path
    ahead: Ahead


@pytest.fixture(scope="module")
def load(static_program: Build) -> Path:
    return static_program([PROGRAM], "snapshot_load")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for disks and snapshots, and machines of our own."""
    path = tmp_path_factory.mktemp("snapshots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMRUN_RUNTIME", str(path / "run"))
        patch.setenv("TMPDIR", str(path))
        yield path
        for pid in runtime.running().values():
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def saved(place: Path, guest_kit: kit.GuestKit, load: Path) -> Saved:
    raw, disk, iso = place / "disk.raw", place / "disk.qcow2", place / "disc.iso"
    subprocess.run(["qemu-img", "convert", "-O", "raw", guest_kit.disk, raw], check=True)
    edits = f"write {load} /bin/load\nset_inode_field /bin/load mode 0100755\n"
    subprocess.run(["debugfs", "-w", "-f", "/dev/stdin", raw], input=edits, text=True, check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, disk], check=True)
    raw.unlink()
    iso.write_bytes(DISC)
    parameters = f"{guest_kit.disk_cmdline} vmrun.run=/bin/load vmrun.ip={GUEST}/24"
    machine = ("boot", "-d", "--name", "booted", "--disk", disk, "--cdrom", iso, "--cpus", CPUS, "--nic", NIC)
    vmrun(*map(str, machine), "--append", parameters, inside=("unshare", "-n"))
    with Guest("booted") as guest:
        guest.until(rf"load: ready, {CPUS} CPUs", BOOT_SECONDS)
        guest.works()
        guest.ask("rest")
        ahead = guest.clock()
        vmrun("snapshot", "booted", place / "resting")
        guest.ask("work")
        guest.works()
        vmrun("snapshot", "booted", place / "working", "--stop")
    return Saved(place / "resting", place / "working", ahead)


def restore(directory: Path, name: str, *arguments: str) -> Guest:
    assert vmrun("restore", directory, "-d", "--name", name, *arguments).strip() == name
    return Guest(name)


def check_disk(path: Path) -> None:
    """Its tables are in order, and the file system on it is."""
    result = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    result = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    raw.unlink()
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.usefixtures("network_namespace")
@pytest.mark.parametrize("cycles", [100, pytest.param(1000, marks=SLOW)])
def test_pausing_under_load(saved: Saved, place: Path, load: Path, cycles: int) -> None:
    with Echo() as echo, restore(saved.working, f"paused{cycles}") as guest:
        guest.talks(echo)
        with MachineClient(guest.name) as machine:
            for cycle in range(cycles):
                machine.pause()
                machine.resume()
                # It gets somewhere between two: now and then far, mostly a few instructions.
                if cycle % 50 == 0:
                    guest.works()
        guest.works()
        guest.talks(echo)
        guest.end(load)
        assert len(set(echo.numbers)) == len(echo.numbers)
    check_disk(place / f"disk.paused{cycles}.qcow2")


@pytest.mark.usefixtures("network_namespace")
@pytest.mark.parametrize("cycles", [10, pytest.param(100, marks=SLOW)])
def test_saving_and_restoring_under_load(saved: Saved, place: Path, load: Path, cycles: int) -> None:
    """One machine that lives in many processes, one after the other; and then another one, when it has gone
    from disk to disk so often that another would not be taken.
    """
    done = line = 0
    while done < cycles:
        line += 1
        folder = place / f"line{cycles}.{line}"
        folder.mkdir()
        snapshot, disks = saved.working, {*place.glob("disk*.qcow2")}
        with Echo() as echo:
            for generation in range(GENERATIONS):
                name = f"line{cycles}-{line}-{generation}"
                with restore(snapshot, name) as guest:
                    done += 1
                    if generation % 4 == 0:
                        guest.talks(echo)
                    guest.works()
                    if done == cycles or generation == GENERATIONS - 1:
                        guest.talks(echo)
                        guest.end(load)
                        break
                    snapshot = folder / str(generation)
                    vmrun("snapshot", name, snapshot, "--stop")
            assert len(set(echo.numbers)) == len(echo.numbers)
        made = {*place.glob("disk*.qcow2")} - disks
        check_disk(max(made, key=lambda path: path.stat().st_mtime_ns))
        for path in made:
            path.unlink()
        shutil.rmtree(folder)


@pytest.mark.usefixtures("network_namespace")
def test_another_tap_and_the_clock(saved: Saved, load: Path) -> None:
    with restore(saved.working, "moved", "--nic", f"tap7,ip={HOST}/24", "--throw-away") as guest:
        assert guest.clock().is_no_worse_than(saved.ahead)
        assert guest.status()["mac"] == MAC
        taps = [name for _, name in socket.if_nameindex() if name.startswith("tap")]
        assert taps == ["tap7"]  # /sys/class/net is of the namespace that it was mounted in
        with Echo() as echo:
            guest.talks(echo)
        hash_of = 14695981039346656037
        for byte in DISC[: 1 << 18]:
            hash_of = (hash_of ^ byte) * 1099511628211 % (1 << 64)
        assert guest.ask("disc") == f"{hash_of:016x}"
        guest.works()
        guest.end(load)


@pytest.mark.usefixtures("network_namespace")
def test_a_restored_guest_outlives_its_helpers(saved: Saved, place: Path, load: Path) -> None:
    """Its disk's worker, its card's and its pager are killed, and nothing is lost but packets."""
    with Echo() as echo, restore(saved.working, "hurt") as guest:
        workers = guest.inspect()["workers"]
        os.kill(child_of(guest.inspect()["pid"], "pager"), signal.SIGKILL)
        guest.works()
        for name in ("blk0", "net0"):
            os.kill(workers[name], signal.SIGKILL)
        guest.works()
        guest.talks(echo)
        state = guest.inspect()
        assert state["restarts"] == {"blk0": 1, "net0": 1}
        assert {"blk0", "net0"} == {name for name, pid in state["workers"].items() if pid != workers[name]}
        assert "worker pager was killed by signal 9; it is started again" in guest.log()
        guest.end(load)
    check_disk(place / "disk.hurt.qcow2")


@pytest.mark.usefixtures("network_namespace")
def test_a_restored_guest_dies_alone(saved: Saved, place: Path, load: Path) -> None:
    """kill -9 of the VMM: no process is left, the snapshot is as good as before, and so is the disk."""
    with restore(saved.working, "killed") as guest:
        guest.works()
        state = guest.inspect()
        pids = [state["pid"], *state["workers"].values(), child_of(state["pid"], "pager")]
        os.kill(state["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(os.path.exists(f"/proc/{pid}") for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "tap0" not in [name for _, name in socket.if_nameindex()]
    result = subprocess.run(["qemu-img", "check", place / "disk.killed.qcow2"], check=False)
    assert result.returncode in (0, 3)  # 3: clusters that nothing refers to
    with restore(saved.working, "killed", "--throw-away") as guest:
        guest.works()
        guest.end(load)


def child_of(pid: int, word: str) -> int:
    """The process that the VMM started with `word` on its command line."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if word.encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"process {pid} has no child {word}")


@pytest.mark.usefixtures("network_namespace")
def test_ten_clones(saved: Saved, load: Path) -> None:
    names = [f"clone-{number}" for number in range(1, 11)]
    with ExitStack() as stack:
        nic = f"tap{{}},ip={HOST.rpartition('.')[0]}.1/24"
        assert vmrun("clone", saved.resting, "-n", "10", "--name", "clone", "--nic", nic).split() == names
        guests = [stack.enter_context(Guest(name)) for name in names]
        assert all(guest.clock().is_no_worse_than(saved.ahead) for guest in guests)
        facts = [guest.inspect() for guest in guests]
        full = facts[0]["memory"]
        used = [each["memory_used"] for each in facts]
        # A whole guest holds about 19 MiB that are not zero, of 128.
        assert 0 < sum(used) < full, used
        guests[3].ask("work")
        guests[3].works()
        guests[3].end(load)
        for name, guest in zip(names, guests, strict=True):
            if guest is not guests[3]:
                vmrun("stop", "-f", "-w", name)
