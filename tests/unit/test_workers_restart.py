"""Workers that die under load and are started again: every request is answered once, and the data are right
(vmrun/machine/workers.py)."""

import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.board import Board, IrqLine, Kick, MsiVector
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
from tests.unit.test_worker_disk import qemu_img
from tests.unit.vhost_toy import ToyEvents, open_fds
from tests.unit.worker_driver import Guest
from vmrun.errors import EXIT_IMAGE, EXIT_VMM, UserError
from vmrun.host.disks import Disks
from vmrun.machine import workers
from vmrun.machine.config import DiskConfig
from vmrun.machine.loop import EventLoop
from vmrun.machine.workers import SupervisedWorker

MIB = 1 << 20
IN, OUT, FLUSH = 0, 1, 4
FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC
SECTORS = 16 * MIB // 512


class LoopBoard(Board):
    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self.loop.watch(fd, callback)

    def unwatch(self, fd: int) -> None:
        self.loop.unwatch(fd)

    def irq_line(self, gsi: int) -> IrqLine:
        raise NotImplementedError

    def msi_vector(self) -> MsiVector:
        raise NotImplementedError

    def kick_on_write(self, space: str, address: int, size: int, fd: int, value: int | None = None) -> Kick:
        raise NotImplementedError


class Machine:
    """A disk worker under supervision, with a main loop and a guest that drives its queue. `run` lets `guest`
    run on a thread of its own, as a vCPU would.
    """

    def __init__(self, path: Path, image_format: str, stack: ExitStack) -> None:
        (self.disk,) = stack.enter_context(Disks([DiskConfig(path, image_format)]))
        self.loop = EventLoop()
        worker = SupervisedWorker("blk", "blk0", self.disk.words, self.disk.fds, MIB)
        self.worker = stack.enter_context(worker)
        stack.callback(self.loop.close)
        self.guest = Guest()
        stack.callback(self.guest.close)
        self.events = ToyEvents(1)
        stack.callback(self.events.close)
        self.ends: list[tuple[int, str]] = []
        self.device = self.worker.connect(self.guest.memory, LoopBoard(self.loop), self.loop, self.end)
        stack.callback(self.worker.quit)
        self.activate()

    def activate(self) -> None:
        features = self.device.features & (FEATURES | 0xFFFFFF)
        self.device.activate(features, [self.guest.config], self.events)

    def end(self, code: int, reason: str) -> None:
        self.ends.append((code, reason))
        self.loop.stop()

    def kill(self) -> None:
        if not self.worker.worker.poll():
            signal.pidfd_send_signal(self.worker.worker.pidfd, signal.SIGKILL)

    def submit(self, kind: int, sector: int, readable: list[bytes], writable: list[int]) -> int:
        head = self.guest.offer([struct.pack("<IIQ", kind, 0, sector), *readable], [*writable, 1])
        os.eventfd_write(self.events.kicks[0], 1)
        return head

    def collect(self, seconds: float = 60.0) -> list[tuple[int, int, bytes]]:
        """Wait for an interrupt, which comes with something used; [] when the machine ended."""
        while not self.ends:
            poll = select.poll()
            poll.register(self.events.calls[0], select.POLLIN)
            if poll.poll(100):
                os.eventfd_read(self.events.calls[0])
                if answers := self.guest.collect():
                    return answers
            seconds -= 0.1
            assert seconds > 0, "no interrupt"
        return []

    def request(self, kind: int, sector: int, readable: list[bytes], writable: list[int]) -> bytes:
        self.submit(kind, sector, readable, writable)
        ((_, _, data),) = self.collect()
        assert data[-1] == 0
        return data[:-1]

    def run(self, guest: Callable[[], None]) -> None:
        errors: list[BaseException] = []

        def live() -> None:
            try:
                guest()
            except BaseException as error:
                errors.append(error)
            self.loop.stop()

        thread = threading.Thread(target=live)
        thread.start()
        self.loop.run()
        thread.join()
        if errors:
            raise errors[0]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    before = open_fds()
    with ExitStack() as stack:

        def make(image_format: str = "raw") -> Machine:
            path = tmp_path / f"disk.{image_format}"
            if image_format == "raw":
                with path.open("wb") as file:
                    file.truncate(16 * MIB)
            else:
                qemu_img("create", "-q", "-f", image_format, str(path), "16M")
            return Machine(path, image_format, stack)

        yield make
    assert open_fds() == before, "descriptors leaked"


@pytest.fixture
def immortal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_RESTARTS", 1 << 30)
    monkeypatch.setattr(workers, "RESTART_DELAYS", (0.0,))


def load(machine: Machine, rng: random.Random, going: Callable[[], bool]) -> tuple[int, dict[int, bytes]]:
    """Up to 32 requests at once, while `going`: how many there were, and what the disk must hold now."""
    disk: dict[int, bytes] = {}
    waiting: dict[int, tuple[int, int, bytes]] = {}
    number = 0
    while waiting or going():
        while going() and len(waiting) < 32:
            number += 1
            busy = {sector for _, sector, _ in waiting.values()}
            sector = next(s for s in iter(lambda: rng.randrange(SECTORS // 8) * 8, -1) if s not in busy)
            if rng.random() < 0.05:
                waiting[machine.submit(FLUSH, 0, [], [])] = (FLUSH, -number, b"")
            elif rng.random() < 0.3 or sector in disk:
                waiting[machine.submit(IN, sector, [], [512])] = (IN, sector, disk.get(sector, bytes(512)))
            else:
                data = b"%d" % number + bytes(512 - len(b"%d" % number))
                waiting[machine.submit(OUT, sector, [data], [])] = (OUT, sector, data)
        for head, _, data in machine.collect():
            kind, sector, expected = waiting.pop(head)  # KeyError: answered twice
            assert data[-1] == 0
            if kind == IN:
                assert data[:-1] == expected, f"sector {sector}"
            elif kind == OUT:
                disk[sector] = expected
        assert not machine.ends, machine.ends
    return number, disk


def kill_under_load(machine: Machine, kills: int) -> None:
    rng = random.Random(kills)
    done = [0]

    def kill() -> None:
        machine.kill()
        done[0] += 1
        if done[0] < kills:
            # A worker takes some 0.1 s to start: some of them die before they serve, most do not.
            machine.loop.call_later(rng.uniform(0, 0.4), kill)

    def guest() -> None:
        number, disk = load(machine, rng, lambda: done[0] < kills)
        assert number > kills
        for sector, data in disk.items():
            assert machine.request(IN, sector, [], [512]) == data

    machine.loop.call_later(0.1, kill)
    machine.run(guest)
    assert machine.ends == []
    assert machine.worker.restarts >= kills // 2


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.usefixtures("immortal")
def test_killed_under_load(make: Callable[[str], Machine], image_format: str) -> None:
    kill_under_load(make(image_format), 12)


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.usefixtures("immortal")
def test_killed_hundreds_of_times(make: Callable[[str], Machine], image_format: str) -> None:
    kill_under_load(make(image_format), 300)


def test_who_dies_again_and_again_ends_the_machine(
    make: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RESTART_DELAYS", (0.0,))
    machine = make("raw")

    def guest() -> None:
        while not machine.ends:
            machine.loop.call_soon(machine.kill)
            machine.submit(FLUSH, 0, [], [])
            machine.collect()

    machine.run(guest)
    (end,) = machine.ends
    assert end == (
        EXIT_VMM,
        "worker blk0 was killed by signal 9 (and 3 times before within 60 s)",
    )


def test_deaths_long_ago_do_not_count(
    make: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RESTART_DELAYS", (0.0,))
    monkeypatch.setattr(workers, "RESTART_WINDOW", 0.0)
    machine = make("raw")

    def guest() -> None:
        for sector in range(workers.MAX_RESTARTS + 2):
            before = machine.worker.restarts
            machine.loop.call_soon(machine.kill)
            while machine.worker.restarts == before:
                machine.request(OUT, sector, [b"s" * 512], [])

    machine.run(guest)
    assert machine.ends == []


def test_reset_while_there_is_no_worker(
    make: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver resets and comes back before the next worker does: that one serves the new rings."""
    monkeypatch.setattr(workers, "RESTART_DELAYS", (0.5,))
    machine = make("raw")

    def guest() -> None:
        machine.request(OUT, 7, [b"7" * 512], [])
        capacity = machine.device.read_config(0, 8)
        machine.loop.call_soon(machine.kill)
        while not machine.device.failed:
            threading.Event().wait(0.001)  # no request: its answer would be the next worker's
        assert machine.device.read_config(0, 8) == capacity
        machine.device.reset()
        machine.guest.restart()
        machine.activate()
        assert machine.request(IN, 7, [], [512]) == b"7" * 512
        assert machine.worker.restarts == 1

    machine.run(guest)
    assert machine.ends == []


def test_a_bad_image_is_not_tried_again(make: Callable[[str], Machine]) -> None:
    machine = make("qcow2")

    def guest() -> None:
        os.pwrite(machine.disk.fd, b"no qcow2", 0)
        machine.loop.call_soon(machine.kill)
        deadline = time.monotonic() + 30
        while not machine.ends and time.monotonic() < deadline:
            time.sleep(0.01)

    machine.run(guest)
    ((code, reason),) = machine.ends
    assert code == EXIT_IMAGE
    assert "qcow2" in reason
    assert machine.worker.restarts == 1


def test_a_bad_image_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "16M")
    with path.open("r+b") as file:
        file.seek(0x30000)  # the L1 table: an entry that is not aligned to a cluster
        file.write((0x10123).to_bytes(8, "big"))
    with ExitStack() as stack, pytest.raises(UserError) as caught:
        Machine(path, "qcow2", stack)
    assert caught.value.code == EXIT_IMAGE


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_resize(make: Callable[[str], Machine], image_format: str) -> None:
    machine = make(image_format)

    def capacity() -> int:
        return int.from_bytes(machine.device.read_config(0, 8), "little") * 512

    def guest() -> None:
        machine.request(OUT, SECTORS - 1, [b"e" * 512], [])
        machine.device.resize(48 * MIB)
        while not machine.events.config_changes:
            threading.Event().wait(0.01)
        assert capacity() == 48 * MIB
        assert machine.request(IN, SECTORS - 1, [], [1024]) == b"e" * 512 + bytes(512)
        machine.request(OUT, 3 * SECTORS - 1, [b"E" * 512], [])
        with pytest.raises(Exception, match="cannot be resized"):
            machine.device.resize(16 * MIB)
        # The next worker knows as well.
        machine.loop.call_soon(machine.kill)
        while not machine.worker.restarts:
            assert machine.request(IN, 3 * SECTORS - 1, [], [512]) == b"E" * 512
        assert capacity() == 48 * MIB

    machine.run(guest)
    assert machine.ends == []


def test_a_stream_has_no_second_worker() -> None:
    """It may have been killed in the middle of a frame: what the next one sends would be read as the rest."""
    ends: list[tuple[int, str]] = []
    with ExitStack() as stack:
        ours, _far = map(stack.enter_context, socket.socketpair())
        words = {"mac": "52:54:00:12:34:56", "local": "100.64.0.2", "hostmac": "02:00:64:40:00:02"}
        worker = SupervisedWorker("net", "net0", words, {"stream": ours.fileno()}, MIB)
        stack.enter_context(worker)
        loop = EventLoop()
        stack.callback(loop.close)
        guest = Guest()
        stack.callback(guest.close)

        def end(code: int, reason: str) -> None:
            ends.append((code, reason))
            loop.stop()

        def look() -> None:
            if worker.restarts:
                loop.stop()
            loop.call_later(0.1, look)

        worker.connect(guest.memory, LoopBoard(loop), loop, end)
        stack.callback(worker.quit)
        signal.pidfd_send_signal(worker.worker.pidfd, signal.SIGKILL)
        look()
        loop.run()
        assert ends == [(EXIT_VMM, "worker net0 was killed by signal 9")] and worker.restarts == 0


def test_what_a_worker_had_not_written_when_it_was_killed_while_it_was_let_go(
    make: Callable[[str], Machine],
) -> None:
    machine = make("qcow2")
    worker = machine.worker

    def guest() -> None:
        for sector in range(0, SECTORS, 512):
            machine.request(OUT, sector, [b"w" * 512], [])
        machine.device.pause()
        signal.pidfd_send_signal(worker.worker.pidfd, signal.SIGSTOP)
        machine.loop.call_soon(machine.kill)
        with pytest.raises(OSError, match="killed by signal 9"):
            worker.release()
        # As a snapshot that fails for it does: the same files, and the journal.
        machine.device.restart(
            machine.loop.ask(lambda: worker.launch_another(machine.disk.words, machine.disk.fds))
        )
        machine.device.unpause()
        for sector in range(0, SECTORS, 512):
            assert machine.request(IN, sector, [], [512]) == b"w" * 512

    machine.run(guest)
    assert machine.ends == []


def test_a_worker_that_does_not_end_when_the_machine_does(make: Callable[[str], Machine]) -> None:
    machine = make("raw")

    def guest() -> None:
        machine.device.pause()
        signal.pidfd_send_signal(machine.worker.worker.pidfd, signal.SIGSTOP)
        machine.loop.stop()
        with pytest.raises(OSError, match="ended meanwhile"):
            machine.worker.release()
        machine.kill()

    machine.run(guest)
