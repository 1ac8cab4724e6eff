"""Interoperation: our front end with qemu-storage-daemon's back end, our back end with QEMU's front end."""

import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.vhost.backend import Backend
from devices.vhost.channel import Channel
from devices.vhost.frontend import VhostUserDevice
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VIRTIO_ID_BLOCK
from devices.virtio.queue import Chain, SplitQueue
from tests.unit.vhost_toy import MIB, ToyBoard, ToyDriver, ToyEvents, guest_memory, open_fds, readable

STORAGE_DAEMON = shutil.which("qemu-storage-daemon")
QEMU = shutil.which("qemu-system-x86_64")

VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT = 0, 1
SECTOR = 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"".join(bytes([sector]) * SECTOR for sector in range(128)))
    return disk


@pytest.fixture
def storage_daemon(tmp_path: Path, disk: Path) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    if STORAGE_DAEMON is None:
        pytest.skip("needs qemu-storage-daemon (Debian package qemu-system-common)")
    path = tmp_path / "vhost.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()
    number = listener.fileno()
    daemon = subprocess.Popen(
        [
            *(STORAGE_DAEMON, "--blockdev", f"driver=file,node-name=disk,filename={disk}"),
            *(
                "--export",
                f"type=vhost-user-blk,id=blk,node-name=disk,writable=on,addr.type=fd,addr.str={number}",
            ),
        ],
        pass_fds=(number,),
    )
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
        listener.close()
        yield daemon, sock
    daemon.terminate()
    daemon.wait(20)


class BlkDriver(ToyDriver):
    def transfer(self, kind: int, sector: int, data: bytes) -> None:
        """One virtio-blk request: a write of `data`, or a read of as much."""
        self.memory.write(self.buffers, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(self.buffers + 0x200, data if kind == VIRTIO_BLK_T_OUT else bytes(len(data)))
        self.memory.write(self.buffers + 0x100, b"\xff")
        self.chain(
            0,
            [
                (self.buffers, 16, False),
                (self.buffers + 0x200, len(data), kind == VIRTIO_BLK_T_IN),
                (self.buffers + 0x100, 1, True),
            ],
        )

    def result(self, size: int) -> bytes:
        assert self.memory.read(self.buffers + 0x100, 1) == b"\0", "the request failed"
        return self.memory.read(self.buffers + 0x200, size)


def test_our_front_end_reads_and_writes_through_qemu_storage_daemon(
    storage_daemon: tuple[subprocess.Popen[bytes], socket.socket], disk: Path
) -> None:
    daemon, sock = storage_daemon
    events = ToyEvents(1)
    board = ToyBoard()
    failures: list[str] = []
    with guest_memory() as memory:
        device = VhostUserDevice(
            sock,
            name="disk0",
            device_id=VIRTIO_ID_BLOCK,
            queue_sizes=(128,),
            memory=memory,
            board=board,
            on_failure=failures.append,
        )
        assert device.features & VIRTIO_F_VERSION_1
        assert struct.unpack("<Q", device.read_config(0, 8)) == (128,)

        def run(driver: BlkDriver, kind: int, sector: int, data: bytes) -> bytes:
            used = driver.used_idx()
            driver.transfer(kind, sector, data)
            os.eventfd_write(events.kicks[0], 1)
            while driver.used_idx() == used:  # the daemon also signals at the start of a ring
                assert readable(events.calls[0])
                os.eventfd_read(events.calls[0])
            assert driver.used_idx() == used + 1
            return driver.result(len(data))

        for base in (0x4000, 16 * MIB):  # the second life of the device has its ring in the other region
            driver = BlkDriver(memory, 0, base)
            device.activate(device.features, [driver.config], events)
            for sector in (3, 77, 3, 127):
                assert run(driver, VIRTIO_BLK_T_IN, sector, bytes(SECTOR)) == bytes([sector]) * SECTOR
            run(driver, VIRTIO_BLK_T_OUT, 9, b"vmrun".ljust(SECTOR, b"!"))
            assert run(driver, VIRTIO_BLK_T_IN, 9, bytes(SECTOR)).startswith(b"vmrun!")
            device.reset()
        assert failures == []
        assert disk.read_bytes()[9 * SECTOR :].startswith(b"vmrun!")

        daemon.terminate()
        daemon.wait(20)
        while not failures:
            assert board.turn()
        assert failures == ["disk0: the peer closed the connection"]
        device.close()
    events.close()


# At 0x7c00, real mode: read the second sector through INT 13h and put its first byte to the debug-exit port,
# which ends QEMU.
BOOT_SECTOR = (
    bytes.fromhex(
        "31c08ed88ec0"  # xor ax, ax; mov ds, ax; mov es, ax
        "b80102"  # mov ax, 0x0201: read one sector
        "b90200"  # mov cx, 2: cylinder 0, sector 2
        "b600"  # mov dh, 0; dl is the drive we came from
        "bb007e"  # mov bx, 0x7e00
        "cd13"  # int 0x13
        "a0007e"  # mov al, [0x7e00]
        "e6f4"  # out 0xf4, al
        "f4"  # hlt
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


class BlkDevice:
    """A disk in memory, enough for SeaBIOS to boot from: it only reads, and serves its queue from `poll`."""

    features = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC
    queue_count = 1

    def __init__(self, disk: bytes) -> None:
        self.disk = disk
        self.reads = 0
        self.starts = 0
        self._running: tuple[SplitQueue, int, int] | None = None

    def set_features(self, features: int) -> None: ...

    def read_config(self, offset: int, size: int) -> bytes:
        config = struct.pack("<QII4xI", len(self.disk) // SECTOR, 0, 126, SECTOR)
        return config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None: ...

    def configure(self, offset: int, data: bytes) -> None: ...

    def start_queue(self, index: int, queue: SplitQueue, kick_fd: int, call_fd: int, err_fd: int) -> None:
        self.starts += 1
        self._running = (queue, kick_fd, call_fd)
        self.serve()

    def set_call(self, index: int, call_fd: int) -> None:
        assert self._running is not None
        self._running = (*self._running[:2], call_fd)

    def stop_queue(self, index: int) -> int:
        assert self._running is not None
        queue, self._running = self._running[0], None
        return queue.next_avail

    def kick_fd(self) -> int:
        return -1 if self._running is None else self._running[1]

    def serve(self) -> None:
        assert self._running is not None
        queue, _, call_fd = self._running
        while (chain := queue.pop()) is not None:
            queue.push(chain.head, self._read(chain))
            if call_fd >= 0:
                os.eventfd_write(call_fd, 1)

    def _read(self, chain: Chain) -> int:
        kind, _, sector = struct.unpack("<IIQ", b"".join(bytes(view) for view in chain.readable)[:16])
        assert kind == VIRTIO_BLK_T_IN
        self.reads += 1
        position = sector * SECTOR
        answer = self.disk[position : position + chain.writable_size - 1] + b"\0"
        done = 0
        for view in chain.writable:
            view[:] = answer[done : done + len(view)]
            done += len(view)
        return done


def test_qemu_boots_from_our_back_end(tmp_path: Path) -> None:
    """QEMU, emulating and so without KVM: its BIOS boots a sector from our back end, which reads another."""
    if QEMU is None:
        pytest.skip("needs qemu-system-x86_64 (Debian package qemu-system-x86)")
    before = open_fds()
    # Of some cylinders, without which a BIOS reads nothing.
    device = BlkDevice((BOOT_SECTOR + b"\x15" * SECTOR).ljust(4 * MIB, b"\0"))
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        path = os.fspath(tmp_path / "blk.sock")
        listener.bind(path)
        listener.listen()
        listener.settimeout(30)
        qemu = subprocess.Popen(
            [
                *(QEMU, "-accel", "tcg", "-m", "32", "-display", "none", "-nodefaults", "-no-user-config"),
                *("-object", "memory-backend-memfd,id=ram,size=32M,share=on", "-M", "pc,memory-backend=ram"),
                *("-chardev", f"socket,id=blk,path={path}"),
                *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1,bootindex=1"),
                *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
            ],
            stdin=subprocess.DEVNULL,
        )
        stack.callback(qemu.wait, 20)
        stack.callback(qemu.kill)
        sock, _ = listener.accept()
        backend = Backend(Channel(sock), device)
        stack.callback(backend.close)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                kick = device.kick_fd()
                if kick >= 0:
                    poll.register(kick, select.POLLIN)
                ready = [fd for fd, _ in poll.poll(1000)]
                if kick >= 0:
                    poll.unregister(kick)
                if sock.fileno() in ready:
                    backend.handle()
                elif kick in ready:
                    os.eventfd_read(kick)
                    device.serve()
        except EOFError:
            pass
        # isa-debug-exit: the byte, shifted, with the lowest bit set.
        assert qemu.wait(20) == 0x15 << 1 | 1
    assert device.reads >= 2
    assert device.starts >= 1
    assert open_fds() == before


def test_qemu_boots_from_a_worker_started_by_hand(tmp_path: Path) -> None:
    """`vmrun worker blk`, as docs/guide.md has it: sandbox, lock and in-flight buffer included."""
    if QEMU is None:
        pytest.skip("needs qemu-system-x86_64 (Debian package qemu-system-x86)")
    disk, path = tmp_path / "disk.img", tmp_path / "blk.sock"
    disk.write_bytes((BOOT_SECTOR + b"\x15" * SECTOR).ljust(4 * MIB, b"\0"))
    with ExitStack() as stack:
        command = [sys.executable, "-m", "vmrun", "worker", "blk", "--socket", str(path), "--disk", str(disk)]
        worker = stack.enter_context(subprocess.Popen(command))
        stack.callback(worker.kill)
        deadline = time.monotonic() + 30
        while not path.exists():
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        qemu = subprocess.run(
            [
                *(QEMU, "-accel", "tcg", "-m", "32", "-display", "none", "-nodefaults", "-no-user-config"),
                *("-object", "memory-backend-memfd,id=ram,size=32M,share=on", "-M", "pc,memory-backend=ram"),
                *("-chardev", f"socket,id=blk,path={path}"),
                *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1,bootindex=1"),
                *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
            ],
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        assert qemu.returncode == 0x15 << 1 | 1
        assert worker.wait(20) == 0
