"""A blk worker with the VMM's front end before it: real processes, real images, qemu-img as the judge."""

import os
import random
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devices.virtio.device import VIRTIO_ID_BLOCK
from tests.unit.worker_session import Session

MIB = 1 << 20
IN, OUT, FLUSH, GET_ID, DISCARD = 0, 1, 4, 8, 11


@contextmanager
def disk(path: Path, image_format: str, **arguments: str) -> Iterator[Session]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        words = {"format": image_format, **arguments}
        with Session("blk", VIRTIO_ID_BLOCK, 1, words, {"image": fd}) as session:
            yield session
    finally:
        os.close(fd)


def submit(session: Session, kind: int, sector: int, readable: list[bytes], writable: list[int]) -> None:
    session.offer(0, [struct.pack("<IIQ", kind, 0, sector), *readable], [*writable, 1])


def request(session: Session, kind: int, sector: int, readable: list[bytes], writable: list[int]) -> bytes:
    submit(session, kind, sector, readable, writable)
    ((_, _, data),) = session.collect(0)
    assert data[-1] == 0
    return data[:-1]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    return path


def test_a_disk(raw: Path) -> None:
    with disk(raw, "raw", serial="wd-42") as session:
        assert session.device.read_config(0, 8) == (4 * MIB // 512).to_bytes(8, "little")
        request(session, OUT, 8, [b"hello" + bytes(507)], [])
        assert request(session, IN, 8, [], [512]) == b"hello" + bytes(507)
        assert request(session, GET_ID, 0, [], [20]) == b"wd-42".ljust(20, b"\0")
        request(session, FLUSH, 0, [], [])
        request(session, DISCARD, 0, [struct.pack("<QII", 0, 4096, 0)], [])
        assert request(session, IN, 8, [], [512]) == bytes(512)
    assert session.failures == []
    assert session.worker.describe_exit() == "worker blk0 exited with status 0"


def test_reset_and_again(raw: Path) -> None:
    """A driver that comes back after a reset (a reboot) finds everything as it left it."""
    with disk(raw, "raw") as session:
        for number in range(5):
            request(session, OUT, number, [bytes([number]) * 512], [])
            session.device.reset()
            guest = session.guests[0]
            guest.restart()
            session.activate()
            assert request(session, IN, number, [], [512]) == bytes([number]) * 512


def test_a_broken_ring_needs_reset_and_the_worker_lives(raw: Path) -> None:
    with disk(raw, "raw") as session:
        session.offer(0, [b"short"], [1])
        while not session.events.resets:
            assert session.board.turn(30)
        session.device.reset()
        session.guests[0].restart()
        session.activate()
        assert request(session, IN, 0, [], [512]) == bytes(512)
        assert not session.worker.poll()
    assert "header of 5 bytes" in session.worker.describe_exit()


def test_a_killed_worker_is_a_failure_with_its_name(raw: Path) -> None:
    with disk(raw, "raw") as session:
        os.kill(session.worker.pid, signal.SIGKILL)
        while not session.failures:
            assert session.board.turn(30)
        assert session.failures[0].startswith("blk0: ")
        assert session.worker.wait(30)
        assert session.worker.describe_exit() == "worker blk0 was killed by signal 9"


def test_what_was_written_before_the_end_is_in_the_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "16M")
    with disk(path, "qcow2") as session:
        request(session, OUT, 100, [b"q" * 65536], [])
    qemu_img("check", "-q", str(path))
    with disk(path, "qcow2") as session:
        assert request(session, IN, 100, [], [65536]) == b"q" * 65536


def qemu_img(*arguments: str) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img (Debian: qemu-utils)")
    subprocess.run(["qemu-img", *arguments], check=True, timeout=120)


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_random_writes_leave_qcow2_equal_to_raw(tmp_path: Path, cluster_size: int) -> None:
    """16,384 writes of random sizes at random places, with reads and flushes between them, to both
    formats at once.
    """
    size = 32 * MIB
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    paths = {"raw": tmp_path / "disk.raw", "qcow2": tmp_path / "disk.qcow2"}
    with paths["raw"].open("wb") as file:
        file.truncate(size)
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", str(paths["qcow2"]), str(size)
    )
    expected = bytearray(size)
    with disk(paths["raw"], "raw") as one, disk(paths["qcow2"], "qcow2") as other:
        for _ in range(1024):
            for _ in range(16):
                count = min(chance.randint(1, 1 << chance.randint(0, 6)), 64)
                sector = chance.randrange(size // 512 - count)
                data = chance.randbytes(64) * (8 * count)
                cut = chance.randrange(1, len(data))
                expected[sector * 512 : (sector + count) * 512] = data
                for session in (one, other):
                    submit(session, OUT, sector, [data[:cut], data[cut:]], [])
            for session in (one, other):
                assert all(answer[2] == b"\0" for answer in session.collect(0, 16))
            if chance.random() < 0.1:
                sector = chance.randrange(size // 512 - 64)
                for session in (one, other):
                    data = request(session, IN, sector, [], [1000, 64 * 512 - 1000])
                    assert data == expected[sector * 512 : (sector + 64) * 512]
            if chance.random() < 0.02:
                request(other, FLUSH, 0, [], [])
    assert paths["raw"].read_bytes() == expected
    qemu_img("check", "-q", str(paths["qcow2"]))
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", str(paths["raw"]), str(paths["qcow2"]))
