"""Memory that comes in when it is touched: by whom, in which order, and what happens when it cannot.

Real processes and real userfaultfds: the pager is the one that machines have.
"""

import errno
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from devices.memory import PAGE_SIZE
from devices.pager import userfaultfd
from devices.pager.checksums import CHUNK_SIZE
from devices.pager.messages import CHUNK, Report
from devices.vhost.channel import Channel
from devices.vhost.connection import Connection
from devices.vhost.messages import (
    MEM_REGION,
    MEM_TABLE,
    U64,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VRING_ADDR,
    VRING_STATE,
    ProtocolError,
    ProtocolFeature,
    Request,
)
from devices.vhost.postcopy import share_memory
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
from devices.worker import launcher, seccomp
from devices.worker.launcher import launch
from tests.unit.worker_driver import SIZE as QUEUE_SIZE
from tests.unit.worker_driver import Guest
from vmrun.errors import EXIT_IMAGE, EXIT_VMM, UserError
from vmrun.machine.layout import FOUR_GIB, PCI_HOLE_START
from vmrun.machine.memory import Ram
from vmrun.snapshot.memory_file import OpenMemory, open_memory, write_memory
from vmrun.snapshot.pager import MAX_RESTARTS, LazyRam, MemoryLost

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.access(userfaultfd.DEVICE, os.R_OK | os.W_OK), reason="no /dev/userfaultfd"),
]

MIB = 1 << 20
SIZE = 16 * MIB
SECONDS = 30.0
ROOT = Path(__file__).parents[2]


def pattern(size: int = SIZE) -> bytes:
    """Every page differs; the third quarter is untouched, and every eighth page elsewhere is zeros."""
    pages = []
    for page in range(size // PAGE_SIZE):
        blank = page % 8 == 5 or size // 2 <= page * PAGE_SIZE < 3 * size // 4
        pages.append(bytes(PAGE_SIZE) if blank else struct.pack("<Q", page + 1) * (PAGE_SIZE // 8))
    return b"".join(pages)


PATTERN = pattern()


class Restore:
    """A machine's RAM that comes out of a file, and what the machine was told."""

    def __init__(self, stack: ExitStack, path: Path, *, prefetch: bool = False, size: int = SIZE) -> None:
        fd = os.memfd_create("saved")
        os.ftruncate(fd, size)
        os.pwrite(fd, PATTERN, 0)
        if size > SIZE:
            os.pwrite(fd, PATTERN, size - SIZE)
        self.path = path
        self.facts = write_memory(fd, size, path)
        os.close(fd)
        self.memory: OpenMemory = stack.enter_context(open_memory(path, self.facts))
        self.ram = stack.enter_context(Ram(size))
        self.told: list[Any] = []
        self.ended = threading.Event()
        self.lazy = stack.enter_context(
            LazyRam(self.ram, self.memory, self._end, self._halt, prefetch=prefetch)
        )

    def _end(self, code: int, reason: str) -> None:
        self.told.append((code, reason))

    def _halt(self) -> None:
        self.told.append("halt")
        self.ended.set()

    @property
    def uffd(self) -> int:
        return self.lazy._clients["vmm"][1]

    def pager(self) -> int:
        return self.lazy._worker.pid

    def present(self) -> int:
        """Bytes of RAM that are there."""
        return os.fstat(self.ram.fd).st_blocks * 512

    def await_fault(self) -> None:
        """Somebody in this process waits for a page, and the (stopped) pager has not read of it."""
        poll = select.poll()
        poll.register(self.uffd, select.POLLIN)
        assert poll.poll(SECONDS * 1000)


Start = Callable[..., Restore]


@pytest.fixture
def restore(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(**arguments: bool | int) -> Restore:
            made = Restore(stack, tmp_path / "memory", **arguments)  # type: ignore[arg-type]
            made.lazy.start()
            return made

        yield start


class Reader(threading.Thread):
    """Reads guest memory as a vCPU thread does on an exit."""

    def __init__(self, made: Restore, gpa: int, size: int = 16) -> None:
        super().__init__()
        self.result: bytes | Exception | None = None
        self._made, self._gpa, self._size = made, gpa, size
        self.start()

    def run(self) -> None:
        try:
            self.result = self._made.ram.memory.read(self._gpa, self._size)
        except Exception as error:
            self.result = error

    def finish(self) -> bytes | Exception | None:
        self.join(SECONDS)
        assert not self.is_alive()
        return self.result


def test_only_what_is_touched_comes_in(restore: Start) -> None:
    made = restore()
    assert made.present() == 0
    chosen = random.Random(1).sample(range(SIZE // PAGE_SIZE), 20)
    for page in chosen:
        at = page * PAGE_SIZE
        assert made.ram.memory.read(at, PAGE_SIZE) == PATTERN[at : at + PAGE_SIZE]
    assert 0 < made.present() <= 20 * CHUNK_SIZE
    assert made.lazy.pending
    made.lazy.complete()
    assert not made.lazy.pending
    assert os.pread(made.ram.fd, SIZE, 0) == PATTERN
    assert made.told == []


def test_views_across_chunks_and_what_the_guest_wrote_stay(restore: Start) -> None:
    made = restore()
    memory = made.ram.memory
    memory.write(3 * CHUNK_SIZE - 5, b"guest wrote")
    assert memory.read(0, 4 * CHUNK_SIZE)[:100] == PATTERN[:100]
    made.lazy.complete()
    expected = bytearray(PATTERN)
    expected[3 * CHUNK_SIZE - 5 : 3 * CHUNK_SIZE + 6] = b"guest wrote"
    assert os.pread(made.ram.fd, SIZE, 0) == expected


def test_a_page_that_was_there_before_stays(restore: Start) -> None:
    """The kernel refuses a page in the middle of a chunk; those around it come in."""
    made = restore()
    os.pwrite(made.ram.fd, b"n" * PAGE_SIZE, 7 * PAGE_SIZE)  # no fault: not through a mapping
    expected = bytearray(PATTERN[:CHUNK_SIZE])
    expected[7 * PAGE_SIZE : 8 * PAGE_SIZE] = b"n" * PAGE_SIZE
    assert made.ram.memory.read(0, CHUNK_SIZE) == expected


def test_a_page_that_came_by_another_way_while_somebody_waited_for_it(restore: Start) -> None:
    made = restore()
    made.ram.memory.read(0, 8)  # it has started, and will wake nobody for that
    os.kill(made.pager(), signal.SIGSTOP)
    reader = Reader(made, 5 * MIB)
    made.await_fault()
    os.pwrite(made.ram.fd, b"n" * PAGE_SIZE, 5 * MIB)  # which wakes nobody
    os.kill(made.pager(), signal.SIGCONT)
    assert reader.finish() == b"n" * 16
    assert made.ram.memory.read(5 * MIB + PAGE_SIZE, 8) == PATTERN[5 * MIB + PAGE_SIZE :][:8]


def test_prefetch_brings_all_in_and_ends_the_pager(restore: Start) -> None:
    made = restore(prefetch=True)
    assert made.lazy._done.wait(SECONDS)
    assert not made.lazy.pending
    assert os.pread(made.ram.fd, SIZE, 0) == PATTERN
    assert made.lazy._worker.wait(SECONDS)
    assert made.lazy._worker.describe_exit() == "worker pager exited with status 0"
    assert made.ram.memory.read(SIZE // 2, 8) == bytes(8)
    assert made.told == [] and made.lazy.restarts == 0


def test_memory_on_both_sides_of_the_pci_hole(restore: Start) -> None:
    size = PCI_HOLE_START + SIZE
    made = restore(size=size)
    memory = made.ram.memory
    for at in (0, PAGE_SIZE, SIZE - PAGE_SIZE):
        assert memory.read(at, PAGE_SIZE) == PATTERN[at : at + PAGE_SIZE]
        assert memory.read(FOUR_GIB + at, PAGE_SIZE) == PATTERN[at : at + PAGE_SIZE]
    assert memory.read(1 << 30, PAGE_SIZE) == bytes(PAGE_SIZE)
    made.lazy.complete()
    assert os.pread(made.ram.fd, SIZE, PCI_HOLE_START) == PATTERN
    assert made.present() < 3 * SIZE


def test_the_pager_is_small_and_in_its_sandbox(restore: Start) -> None:
    made = restore()
    made.ram.memory.read(0, 8)
    status = Path(f"/proc/{made.pager()}/status").read_text()
    assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status and "CapEff:\t0000000000000000" in status
    assert made.ram.memory.regions[0].fd == made.ram.fd
    rollup = Path(f"/proc/{made.pager()}/smaps_rollup").read_text()
    dirty = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Dirty:"))
    assert dirty < 8192


def test_a_pager_killed_before_it_read_the_fault(restore: Start) -> None:
    made = restore()
    made.ram.memory.read(0, 8)
    os.kill(made.pager(), signal.SIGSTOP)
    reader = Reader(made, 5 * MIB)
    made.await_fault()
    os.kill(made.pager(), signal.SIGKILL)
    assert reader.finish() == PATTERN[5 * MIB : 5 * MIB + 16]
    assert made.lazy.restarts == 1 and made.told == []


def test_a_pager_killed_between_the_fault_and_its_answer(restore: Start) -> None:
    made = restore()
    made.ram.memory.read(0, 8)
    former = made.pager()
    os.kill(former, signal.SIGSTOP)
    reader = Reader(made, 5 * MIB)
    made.await_fault()
    # Taken out of the queue, as the pager would have done: nobody else will be told of it.
    assert userfaultfd.faults(made.uffd)
    os.kill(former, signal.SIGKILL)
    assert reader.finish() == PATTERN[5 * MIB : 5 * MIB + 16]
    made.lazy.complete()
    assert os.pread(made.ram.fd, SIZE, 0) == PATTERN
    assert made.told == []


def test_a_pager_killed_while_it_prefetches(restore: Start) -> None:
    made = restore()
    os.kill(made.pager(), signal.SIGSTOP)
    completer = threading.Thread(target=made.lazy.complete)
    completer.start()
    # Not before it was told: the next one has to know of it.
    while not made.lazy._prefetch:
        os.sched_yield()
    os.kill(made.pager(), signal.SIGKILL)
    completer.join(SECONDS)
    assert not completer.is_alive() and made.lazy.restarts == 1
    assert os.pread(made.ram.fd, SIZE, 0) == PATTERN


def test_a_pager_that_dies_again_and_again_ends_the_machine(
    restore: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = restore()
    made.ram.memory.read(0, 8)
    os.kill(made.pager(), signal.SIGSTOP)
    reader = Reader(made, 5 * MIB)
    made.await_fault()
    original = made.lazy._launch

    def stillborn() -> None:
        original()
        os.kill(made.pager(), signal.SIGKILL)

    monkeypatch.setattr(made.lazy, "_launch", stillborn)
    os.kill(made.pager(), signal.SIGKILL)
    assert made.ended.wait(SECONDS)
    result = reader.finish()
    assert isinstance(result, MemoryLost) and result.errno == errno.EIO
    assert made.told[1] == "halt" and made.told[0][0] == EXIT_VMM
    assert "was killed by signal 9" in made.told[0][1] and f"{MAX_RESTARTS} times" in made.told[0][1]
    with pytest.raises(MemoryLost):
        made.lazy.complete()


def test_a_damaged_chunk_ends_the_machine_and_nobody_sees_it(restore: Start) -> None:
    made = restore()
    with made.path.open("r+b") as file:
        file.seek(5 * MIB + 100)
        file.write(b"?")
    assert made.ram.memory.read(4 * MIB, 8) == PATTERN[4 * MIB : 4 * MIB + 8]
    result = Reader(made, 5 * MIB, 4096).finish()
    assert isinstance(result, MemoryLost)
    ((code, reason), halt) = made.told
    assert (code, halt) == (EXIT_IMAGE, "halt")
    assert str(made.path) in reason and "damaged at offset 0x500000" in reason
    assert os.pread(made.ram.fd, CHUNK_SIZE, 5 * MIB) == bytes(CHUNK_SIZE)


def test_a_file_truncated_while_the_machine_runs(restore: Start) -> None:
    made = restore(prefetch=True)
    os.kill(made.pager(), signal.SIGSTOP)
    os.truncate(made.path, 8 * MIB)
    os.kill(made.pager(), signal.SIGCONT)
    made.ended.wait(SECONDS)
    assert made.told[0][0] == EXIT_IMAGE


def test_nobody_who_waits_hears_before_vcpus_and_workers_were_stopped(restore: Start) -> None:
    made = restore()
    made.ram.memory.read(0, 8)
    os.kill(made.pager(), signal.SIGSTOP)
    reader = Reader(made, 5 * MIB)
    made.await_fault()
    waited = []
    original = made.lazy._halt

    def halt() -> None:
        waited.append(reader.is_alive())
        original()

    made.lazy._halt = halt
    made.lazy._fail(EXIT_VMM, "for the test")
    reader.finish()
    assert waited == [True]


def test_without_userfaultfd_everything_is_read_at_once(
    restore: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userfaultfd, "DEVICE", "/nonexistent/userfaultfd")
    made = restore()
    assert not made.lazy.pending and made.lazy.userfault_fd == -1
    assert os.pread(made.ram.fd, SIZE, 0) == PATTERN
    assert made.present() < SIZE
    made.lazy.complete()


def test_without_userfaultfd_a_damaged_chunk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userfaultfd, "DEVICE", "/nonexistent/userfaultfd")
    with ExitStack() as stack:
        made = Restore(stack, tmp_path / "memory")
        with made.path.open("r+b") as file:
            file.write(b"?")
        with pytest.raises(UserError, match="damaged at offset 0x0"):
            made.lazy.start()


def test_memory_is_saved_while_some_of_it_is_missing(restore: Start, tmp_path: Path) -> None:
    made = restore()
    made.ram.memory.write(5 * MIB, b"since then")
    made.ram.memory.write(9 * MIB, b"and here")
    before = made.present()
    facts = write_memory(made.ram.fd, SIZE, tmp_path / "second", made.memory)
    assert made.present() == before
    expected = bytearray(PATTERN)
    expected[5 * MIB : 5 * MIB + 10] = b"since then"
    expected[9 * MIB : 9 * MIB + 8] = b"and here"
    with open_memory(tmp_path / "second", facts) as again:
        again.verify_all()
        assert b"".join(again.read_chunk(chunk) for chunk in range(SIZE // CHUNK_SIZE)) == expected


def test_memory_of_another_size(restore: Start) -> None:
    made = restore()
    with Ram(2 * SIZE) as ram, pytest.raises(ValueError, match="the machine 33554432"):
        LazyRam(ram, made.memory, made._end, made._halt, prefetch=False)


CHILD = f"""
import ctypes, mmap, os, socket, struct, sys
sys.path[0:0] = [{str(ROOT)!r}]
from devices.pager import userfaultfd
sock = socket.socket(fileno=int(sys.argv[1]))
ram = mmap.mmap(int(sys.argv[2]), {SIZE})
uffd = userfaultfd.create(int(sys.argv[3]))
pin = ctypes.c_char.from_buffer(ram)
address = ctypes.addressof(pin)
userfaultfd.register(uffd, address, {SIZE})
socket.send_fds(sock, [struct.pack("=Q", address)], [uffd])
view = memoryview(ram)
while command := sock.recv(17):
    kind, at, size = struct.unpack("=cQQ", command)
    if kind == b"r":
        os.write(sock.fileno(), view[at : at + size])
    elif kind == b"w":  # the first half of each page is read from a file, straight into memory
        with open("/proc/self/exe", "rb") as file:
            os.preadv(file.fileno(), [view[at : at + size]], 0)
        os.write(sock.fileno(), b"done")
    else:
        sock.sendall(bytes(view[at : at + size]))
"""


class Child:
    """Another process that maps the RAM, as a worker does; it touches pages in the kernel (preadv, write)."""

    def __init__(self, made: Restore, name: str = "child") -> None:
        self.sock, theirs = socket.socketpair()
        fds = (theirs.fileno(), made.ram.fd, made.lazy.userfault_fd)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CHILD, *map(str, fds)], pass_fds=fds, close_fds=True
        )
        theirs.close()
        self.sock.settimeout(SECONDS)
        data, (uffd,), _, _ = socket.recv_fds(self.sock, 8, 1)
        made.lazy.add_client(name, uffd, [(struct.unpack("=Q", data)[0], SIZE, 0)])
        made.lazy.client_registered(name)

    def ask(self, kind: bytes, at: int, size: int) -> bytes:
        self.sock.sendall(struct.pack("=cQQ", kind, at, size))
        return self.answer(4 if kind == b"w" else size)

    def answer(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece
            data += piece
        return data

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self.process.kill()
        self.process.wait()


def test_another_process_touches_memory_in_the_kernel(restore: Start) -> None:
    made = restore()
    with Child(made) as child:
        assert child.ask(b"r", 5 * MIB, 3 * PAGE_SIZE) == PATTERN[5 * MIB : 5 * MIB + 3 * PAGE_SIZE]
        assert child.ask(b"u", 6 * MIB, 99) == PATTERN[6 * MIB : 6 * MIB + 99]
        assert child.ask(b"u", 9 * MIB, 8) == bytes(8)  # no data anywhere near
        # preadv writes a part of a page: the rest of it comes from the snapshot.
        child.ask(b"w", 7 * MIB, 100)
        page = made.ram.memory.read(7 * MIB, PAGE_SIZE)
        assert page[:4] == b"\x7fELF" and page[100:] == PATTERN[7 * MIB + 100 : 7 * MIB + PAGE_SIZE]
        # What this process has brought in, that one sees, and the other way round.
        made.ram.memory.write(8 * MIB - PAGE_SIZE, b"shared")
        assert child.ask(b"r", 8 * MIB - PAGE_SIZE, 6) == b"shared"
        made.lazy.complete()
        assert child.ask(b"u", 10 * MIB, 8) == bytes(8)  # zeros, from the kernel again
        assert child.ask(b"u", 0, SIZE)[: 7 * MIB] == PATTERN[: 7 * MIB]


def test_both_processes_wait_for_one_page(restore: Start) -> None:
    made = restore()
    with Child(made) as child:
        made.ram.memory.read(0, 8)
        os.kill(made.pager(), signal.SIGSTOP)
        reader = Reader(made, 5 * MIB)
        child.sock.sendall(struct.pack("=cQQ", b"r", 5 * MIB + PAGE_SIZE, 8))
        made.await_fault()
        poll = select.poll()
        poll.register(made.lazy._clients["child"][1], select.POLLIN)
        assert poll.poll(SECONDS * 1000)
        os.kill(made.pager(), signal.SIGCONT)
        assert reader.finish() == PATTERN[5 * MIB : 5 * MIB + 16]
        assert child.answer(8) == PATTERN[5 * MIB + PAGE_SIZE :][:8]


def test_another_process_waits_when_the_pager_is_killed(restore: Start) -> None:
    made = restore()
    with Child(made) as child:
        os.kill(made.pager(), signal.SIGSTOP)
        child.sock.sendall(struct.pack("=cQQ", b"r", 5 * MIB, 8))
        uffd = made.lazy._clients["child"][1]
        poll = select.poll()
        poll.register(uffd, select.POLLIN)
        assert poll.poll(SECONDS * 1000)
        userfaultfd.faults(uffd)
        os.kill(made.pager(), signal.SIGKILL)
        assert child.answer(8) == PATTERN[5 * MIB : 5 * MIB + 8]


def test_a_client_that_dies_and_its_successor(restore: Start) -> None:
    made = restore()
    for at in range(3):
        with Child(made) as child:
            assert child.ask(b"r", at * MIB, 8) == PATTERN[at * MIB : at * MIB + 8]
    assert made.ram.memory.read(4 * MIB, 8) == PATTERN[4 * MIB : 4 * MIB + 8]
    assert len(made.lazy._clients) == 2 and made.lazy.restarts == 0


def test_a_client_that_comes_when_everything_is_in(restore: Start) -> None:
    made = restore()
    made.lazy.complete()
    with Child(made) as child:
        assert child.ask(b"u", 10 * MIB, 8) == bytes(8)
        assert child.ask(b"r", 5 * MIB, 8) == PATTERN[5 * MIB : 5 * MIB + 8]
    assert not made.lazy._clients


def test_a_client_that_lies_about_its_addresses_stops_only_itself(restore: Start) -> None:
    made = restore()
    with Child(made) as child:
        _, uffd, ((address, size, _),) = made.lazy._clients["child"]
        made.lazy.add_client("child", os.dup(uffd), [(address + 4 * MIB, size - 4 * MIB, 0)])
        # It waits for one page and gets another one's data brought in, where that belongs.
        child.sock.sendall(struct.pack("=cQQ", b"r", 5 * MIB, 8))
        while made.present() < CHUNK_SIZE:
            os.sched_yield()
        assert os.pread(made.ram.fd, CHUNK_SIZE, MIB) == PATTERN[MIB : MIB + CHUNK_SIZE]
        assert made.ram.memory.read(6 * MIB, 8) == PATTERN[6 * MIB : 6 * MIB + 8]
        assert made.lazy.restarts == 0


def test_a_client_that_gives_something_else_than_a_userfaultfd(restore: Start, tmp_path: Path) -> None:
    made = restore()
    ours, theirs = socket.socketpair()
    with ours, theirs, open(tmp_path / "memory", "rb") as file:
        theirs.sendall(b"x")
        # The pager would wait in a read of it, or not be able to listen to it at all.
        for name, fd in (("socket", ours.fileno()), ("file", file.fileno())):
            made.lazy.add_client(name, os.dup(fd), [(1 << 32, SIZE, 0)])
        made.lazy.add_client("file", os.dup(ours.fileno()), [(1 << 32, SIZE, 0)])
        for at in range(4):
            assert made.ram.memory.read(at * MIB, 8) == PATTERN[at * MIB : at * MIB + 8]
        assert made.lazy.restarts == 0
        assert ours.recv(1) == b"x"


def table_of(ram: Ram) -> tuple[bytes, list[int]]:
    regions = ram.memory.regions
    table = MEM_TABLE.pack(len(regions), 0)
    for region in regions:
        table += MEM_REGION.pack(region.gpa, region.size, (1 << 46) + region.gpa, region.offset)
    return table, [region.fd for region in regions]


class Disk:
    """A disk's worker that shares memory which is not there yet, and a driver. A context manager."""

    def __init__(self, made: Restore, path: Path) -> None:
        self.made = made
        self.image = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(self.image, b"old" * (MIB // 3 + 1), 0)
        os.ftruncate(self.image, MIB)
        self.guest = Guest(made.ram.memory)
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        fds = {"image": self.image, "userfault": made.lazy.userfault_fd}
        self.worker = launch("blk", "blk0", {"format": "raw"}, fds)
        connection = self.connection = Connection(self.worker.channel, SECONDS)
        assert connection.ask_u64(Request.GET_PROTOCOL_FEATURES) & ProtocolFeature.PAGEFAULT
        wanted = ProtocolFeature.PAGEFAULT | ProtocolFeature.REPLY_ACK
        connection.set(Request.SET_PROTOCOL_FEATURES, U64.pack(wanted))
        connection.reply_ack = True
        connection.set(Request.SET_OWNER)
        features = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VHOST_USER_F_PROTOCOL_FEATURES
        connection.set(Request.SET_FEATURES, U64.pack(features))

    def start(self) -> None:
        """As a driver that comes, or that comes back after a reset."""
        connection, config = self.connection, self.guest.config
        self.guest.restart()
        share_memory(connection, "blk0", *table_of(self.made.ram), self.made.lazy)
        connection.set(Request.SET_VRING_NUM, VRING_STATE.pack(0, QUEUE_SIZE))
        connection.set(Request.SET_VRING_BASE, VRING_STATE.pack(0, 0))
        at = [(1 << 46) + gpa for gpa in (config.descriptors, config.used, config.available)]
        connection.set(Request.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, *at, 0))
        connection.set(Request.SET_VRING_CALL, U64.pack(0), (self.call,))
        connection.set(Request.SET_VRING_KICK, U64.pack(0), (self.kick,))
        connection.set(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1))

    def stop(self) -> None:
        self.connection.ask(Request.GET_VRING_BASE, VRING_STATE.pack(0, 0))

    def write(self, sector: int, source: int) -> None:
        """Begin to write 512 bytes that are in guest memory at `source`."""
        _offer(self.guest, struct.pack("<IIQ", 1, 0, sector), source)
        os.eventfd_write(self.kick, 1)

    def answered(self, milliseconds: float = SECONDS * 1000) -> bool:
        poll = select.poll()
        poll.register(self.call, select.POLLIN)
        if not poll.poll(milliseconds):
            return False
        os.eventfd_read(self.call)
        return True

    def read(self, sector: int) -> bytes:
        return os.pread(self.image, 512, sector * 512)

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.worker.stop()
        for fd in (self.image, self.kick, self.call):
            os.close(fd)


def test_a_disks_worker_shares_memory_that_is_not_there_yet(restore: Start, tmp_path: Path) -> None:
    made = restore()
    with Disk(made, tmp_path / "disk") as disk:
        for number in range(3):
            disk.start()
            # The worker's pwritev fetches the data from the snapshot.
            source = (5 + number) * MIB + CHUNK_SIZE * 3
            disk.write(8 + number, source)
            assert disk.answered(), disk.worker.describe_exit()
            assert disk.read(8 + number) == PATTERN[source : source + 512]
            disk.stop()
        made.lazy.complete()
    assert disk.worker.describe_exit() == "worker blk0 exited with status 0"
    assert made.told == []


def test_no_zeros_reach_the_disk_when_the_machine_ends(restore: Start, tmp_path: Path) -> None:
    """The VMM lets go of everything while a worker waits for data to write: it waits until it is killed."""
    made = restore()
    made.ram.memory.read(0, MIB)  # what the driver itself touches
    with Disk(made, tmp_path / "disk") as disk:
        disk.start()
        os.kill(made.pager(), signal.SIGSTOP)
        disk.write(8, 5 * MIB)
        poll = select.poll()
        poll.register(made.lazy._clients["blk0"][1], select.POLLIN)
        assert poll.poll(SECONDS * 1000)
        made.lazy.close()
        assert not disk.answered(300)
        signal.pidfd_send_signal(disk.worker.pidfd, signal.SIGKILL)
        assert disk.worker.wait(SECONDS)  # the wait is one that can be killed
        assert disk.read(8) == (b"old" * 1500)[8 * 512 % 3 :][:512]


def _offer(guest: Guest, header: bytes, source: int) -> None:
    """A chain whose data are wherever `source` says."""
    base, memory = guest.base, guest.memory
    memory.write(base + 0x10000, header)
    memory.write(base + 0x20000, struct.pack("<QIHH", base + 0x10000, 16, 1, 1))
    memory.write(base + 0x20010, struct.pack("<QIHH", source, 512, 1, 2))
    memory.write(base + 0x20020, struct.pack("<QIHH", base + 0x10100, 1, 2, 0))
    memory.write(base + 0x1000, struct.pack("<QIHH", base + 0x20000, 48, 4, 0))
    memory.write(base + 0x2004, struct.pack("<H", 0))
    memory.write(base + 0x2002, struct.pack("<H", 1))


def test_a_worker_without_userfaultfd_does_not_offer_it(tmp_path: Path) -> None:
    image = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT, 0o600)
    with launch("blk", "blk0", {"format": "raw"}, {"image": image}) as worker:
        connection = Connection(worker.channel, SECONDS)
        assert not connection.ask_u64(Request.GET_PROTOCOL_FEATURES) & ProtocolFeature.PAGEFAULT
        with pytest.raises((EOFError, OSError)):
            connection.ask_fd(Request.POSTCOPY_ADVISE, b"")
        connection.close()
    os.close(image)


@pytest.mark.parametrize("lie", ["address", "size", "shorter", "kernel"])
def test_a_back_end_that_lies_in_its_answer_is_refused(restore: Start, lie: str) -> None:
    made = restore()
    ours, theirs = socket.socketpair()
    table, fds = table_of(made.ram)

    def back_end() -> None:
        channel = Channel(theirs)
        message = channel.receive()
        channel.send(message.request, fds=(made.ram.fd,), flags=4)
        message = channel.receive()
        channel.send(message.request, bytes(8), flags=4)
        message = channel.receive()
        message.close()
        gpa, size, _, offset = MEM_REGION.unpack_from(table, MEM_TABLE.size)
        region = {
            "address": (gpa, size, 4097, offset),
            "size": (gpa, size - 4096, 4096, offset),
            "shorter": (gpa, size, 4096, offset),
            "kernel": (gpa, size, 1 << 63, offset),
        }[lie]
        answer = table[: MEM_TABLE.size] + MEM_REGION.pack(*region)
        channel.send(Request.SET_MEM_TABLE, answer[:-8] if lie == "shorter" else answer, flags=4)
        channel.close()

    thread = threading.Thread(target=back_end)
    thread.start()
    connection = Connection(ours, SECONDS)
    with pytest.raises(ProtocolError, match=r"answered by another|no address space"):
        share_memory(connection, "blk0", table, fds, made.lazy)
    thread.join()
    connection.close()
    assert list(made.lazy._clients) == ["vmm"]


# What only other hosts or moments need, as in test_worker_syscalls.py: another C library, a heap that grows
# or shrinks, a stopped process that goes on, a module that asks; and threads, of which the pager has none.
NOT_HERE = {
    *("preadv", "poll", "shutdown", "fcntl", "mremap", "mprotect", "madvise", "brk", "getpid", "futex"),
    *("rt_sigreturn", "rt_sigaction", "restart_syscall", "clock_gettime", "exit", "mmap", "munmap", "write"),
}
FATAL_STUB = """import sys; sys.path[0:0] = [{{root!r}}]
from devices.worker import seccomp
allowed = tuple(entry for entry in seccomp.PAGER_ALLOWED if entry.name != {name!r})
seccomp.FATAL += tuple((e.name, e.number) for e in seccomp.PAGER_ALLOWED if e.name == {name!r})
original = seccomp.assemble
seccomp.assemble = lambda _: original(allowed)
from devices.pager.main import main; main()"""


@pytest.mark.slow
@pytest.mark.by_hand  # once in a while a call is made only after the end was noticed
@pytest.mark.parametrize(
    "name", [entry.name for entry in seccomp.PAGER_ALLOWED if entry.name not in NOT_HERE]
)
def test_every_call_is_needed(
    restore: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setattr(launcher, "STUB", FATAL_STUB.format(name=name))
    made = restore()
    with Child(made), Child(made):  # the second takes the first one's place
        reader = Reader(made, 5 * MIB)
        try:
            made.lazy.complete()
        except MemoryLost:
            pass
        reader.finish()
        made.lazy._worker.wait(SECONDS)
    if name == "exit_group":
        assert made.lazy._worker.exit_code == -signal.SIGSYS
    else:
        assert "killed by signal 31" in caplog.text


def test_reports_are_what_the_pager_sends() -> None:
    assert (Report.COMPLETE, Report.BAD_CHUNK, CHUNK.size) == (1, 2, 8)
