"""The virtio-blk device over a disk in memory, through a real ring."""

import errno
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.block.image import Image
from devices.errors import GuestError, ImageError
from devices.virtio import blk
from devices.virtio.blk import BlkDevice
from devices.worker.ring import DRAINED, MORE
from tests.unit.worker_driver import Guest

SECTORS = 64
OK, IOERR, UNSUPP = 0, 1, 2
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13


class MemoryImage(Image):
    """A disk in a bytearray that keeps a record; every operation raises `failure()`."""

    def __init__(self, read_only: bool = False) -> None:
        self.data = bytearray(bytes(range(256)) * 2 * SECTORS)
        self.size = len(self.data)
        self.read_only = read_only
        self.block_size = 4096
        self.discard_granularity = 65536
        self.failure: Callable[[], Exception] | None = None
        self.record: list[str] = []

    def _note(self, what: str) -> None:
        self.record.append(what)
        if self.failure is not None:
            raise self.failure()

    def readv(self, offset: int, buffers: list[memoryview]) -> None:
        self._note("read")
        for buffer in buffers:
            assert len(buffer) > 0
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def writev(self, offset: int, buffers: list[memoryview]) -> None:
        self._note("write")
        data = b"".join(buffers)
        self.data[offset : offset + len(data)] = data

    def discard(self, offset: int, size: int) -> None:
        self._note(f"discard {offset} {size}")

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        self._note(f"zero {offset} {size} {unmap}")
        self.data[offset : offset + size] = bytes(size)

    def flush(self) -> None:
        self._note("flush")

    def close(self) -> None:
        self._note("close")


class Disk:
    """A guest with a disk: `request` is one request from the driver's side."""

    def __init__(self, read_only: bool = False, features: int = blk.VIRTIO_BLK_F_FLUSH) -> None:
        self.image = MemoryImage(read_only)
        self.device = BlkDevice(self.image, b"serial")
        self.device.set_features(features)
        self.guest = Guest()
        self.queue = self.guest.queue()

    def request(
        self, kind: int, sector: int, readable: list[bytes], writable: list[int]
    ) -> tuple[int, int, bytes]:
        """Returns status, used length, and what was written before the status."""
        return self.raw([header(kind, sector), *readable], [*writable, 1])

    def raw(self, readable: list[bytes], writable: list[int]) -> tuple[int, int, bytes]:
        head = self.guest.offer(readable, writable)
        assert self.device.process(0, self.queue) == DRAINED
        ((used_head, length, data),) = self.guest.collect()
        assert used_head == head
        assert not self.queue.in_flight
        return data[-1], length, data[:-1]

    def close(self) -> None:
        self.queue.release()
        self.guest.close()


def header(kind: int, sector: int) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, count, flags)


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.close()


@pytest.fixture
def read_only_disk() -> Iterator[Disk]:
    disk = Disk(read_only=True)
    yield disk
    disk.close()


def test_read(disk: Disk) -> None:
    disk.image.data[512:1536] = b"r" * 1024
    assert disk.request(IN, 1, [], [1024]) == (OK, 1025, b"r" * 1024)
    assert disk.request(IN, 1, [], [100, 412, 512]) == (OK, 1025, b"r" * 1024)


def test_write(disk: Disk) -> None:
    assert disk.request(OUT, 2, [b"a" * 500, b"b" * 12], []) == (OK, 1, b"")
    assert disk.image.data[1024:1536] == b"a" * 500 + b"b" * 12
    assert disk.image.record == ["write"]


def test_last_sector(disk: Disk) -> None:
    assert disk.request(IN, SECTORS - 1, [], [512])[0] == OK
    assert disk.request(OUT, SECTORS - 1, [b"x" * 512], [])[0] == OK


@pytest.mark.parametrize("sector", [SECTORS, SECTORS - 1, 1 << 55, (1 << 64) - 1])
def test_out_of_range(disk: Disk, sector: int) -> None:
    before = bytes(disk.image.data)
    assert disk.request(IN, sector, [], [1024]) == (IOERR, 1, b"\xee" * 1024)
    assert disk.request(OUT, sector, [bytes(1024)], []) == (IOERR, 1, b"")
    for kind in (DISCARD, WRITE_ZEROES):
        assert disk.request(kind, 0, [segment(sector, 2)], [])[0] == IOERR
    assert disk.image.record == []
    assert disk.image.data == before


def test_sizes_that_are_not_sectors(disk: Disk) -> None:
    assert disk.request(IN, 0, [], [511])[0] == IOERR
    assert disk.request(OUT, 0, [b"x" * 513], [])[0] == IOERR
    assert disk.request(IN, 0, [], [])[:2] == (OK, 1)
    assert disk.request(OUT, 0, [], [])[:2] == (OK, 1)


def test_flush(disk: Disk) -> None:
    assert disk.request(FLUSH, 0, [], []) == (OK, 1, b"")
    assert disk.image.record == ["flush"]


def test_a_driver_that_never_flushes_gets_stable_writes() -> None:
    disk = Disk(features=0)
    try:
        disk.request(OUT, 0, [bytes(512)], [])
        disk.request(WRITE_ZEROES, 0, [segment(0, 1)], [])
        assert disk.image.record == ["write", "flush", "zero 0 512 False", "flush"]
    finally:
        disk.close()


def test_get_id(disk: Disk) -> None:
    assert disk.request(GET_ID, 0, [], [20]) == (OK, 21, b"serial".ljust(20, b"\0"))
    assert disk.request(GET_ID, 0, [], [3, 2]) == (OK, 6, b"seria")
    assert disk.request(GET_ID, 0, [], [30]) == (OK, 21, b"serial".ljust(20, b"\0") + b"\xee" * 10)


def test_discard_and_write_zeroes(disk: Disk) -> None:
    assert disk.request(DISCARD, 0, [segment(8, 8), segment(0, 1)], [])[0] == OK
    assert disk.request(WRITE_ZEROES, 0, [segment(4, 2, 1) + segment(6, 1)], [])[0] == OK
    assert disk.image.record == [
        "discard 4096 4096",
        "discard 0 512",
        "zero 2048 1024 True",
        "zero 3072 512 False",
    ]


def test_bad_segments_do_nothing(disk: Disk) -> None:
    good = segment(0, 1)
    assert disk.request(DISCARD, 0, [good, segment(0, 1, 1)], [])[0] == UNSUPP
    assert disk.request(WRITE_ZEROES, 0, [good, segment(0, 1, 2)], [])[0] == UNSUPP
    assert disk.request(WRITE_ZEROES, 0, [good, segment(0, 0xFFFFFFFF)], [])[0] == IOERR
    assert disk.request(DISCARD, 0, [good, b"x"], [])[0] == IOERR
    assert disk.request(DISCARD, 0, [], [])[0] == IOERR
    assert disk.request(DISCARD, 0, [good * (blk.MAX_SEGMENTS + 1)], [])[0] == IOERR
    assert disk.image.record == []


@pytest.mark.parametrize("kind", [2, 3, 5, 10, 14, 0x80000000, 0xFFFFFFFF])
def test_unknown_requests(disk: Disk, kind: int) -> None:
    assert disk.request(kind, 0, [bytes(512)], [512]) == (UNSUPP, 1, b"\xee" * 512)


@pytest.mark.parametrize("failure", [lambda: OSError(errno.EIO, "bad disk"), lambda: ImageError("bad image")])
def test_failures_are_the_requests_own(disk: Disk, failure: Callable[[], Exception]) -> None:
    disk.image.failure = failure
    assert disk.request(IN, 0, [], [512])[:2] == (IOERR, 1)
    assert disk.request(OUT, 0, [bytes(512)], [])[:2] == (IOERR, 1)
    assert disk.request(FLUSH, 0, [], [])[:2] == (IOERR, 1)
    assert disk.request(DISCARD, 0, [segment(0, 1)], [])[:2] == (IOERR, 1)
    disk.image.failure = None
    assert disk.request(IN, 0, [], [512])[0] == OK


def test_read_only(read_only_disk: Disk) -> None:
    disk = read_only_disk
    assert disk.device.features & blk.VIRTIO_BLK_F_RO
    assert not disk.device.features & (blk.VIRTIO_BLK_F_DISCARD | blk.VIRTIO_BLK_F_WRITE_ZEROES)
    assert disk.request(OUT, 0, [bytes(512)], [])[0] == IOERR
    assert disk.request(DISCARD, 0, [segment(0, 1)], [])[0] == IOERR
    assert disk.image.record == []
    assert disk.request(IN, 0, [], [512])[0] == OK


@pytest.mark.parametrize(
    ("readable", "writable"), [([], [512, 1]), ([b"x" * 15], [1]), ([header(OUT, 0), bytes(512)], [])]
)
def test_requests_without_header_or_status(disk: Disk, readable: list[bytes], writable: list[int]) -> None:
    disk.guest.offer(readable, writable)
    with pytest.raises(GuestError):
        disk.device.process(0, disk.queue)
    assert disk.guest.collect() == []


@given(
    cuts=st.lists(st.integers(1, 1040), max_size=6),
    write=st.booleans(),
    with_status=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_layout(cuts: list[int], write: bool, with_status: bool) -> None:
    """Header, data and status may be cut into descriptors anywhere (VIRTIO_F_ANY_LAYOUT)."""
    disk = Disk()
    try:
        payload = bytes(index * 7 & 0xFF for index in range(1024))
        if write:
            message = header(OUT, 3) + payload
            edges = [0, *sorted({cut for cut in cuts if cut < len(message)}), len(message)]
            readable = [message[start:end] for start, end in pairwise(edges)]
            assert disk.raw(readable, [1]) == (OK, 1, b"")
            assert disk.image.data[3 * 512 : 5 * 512] == payload
        else:
            disk.image.data[3 * 512 : 5 * 512] = payload
            size = 1025 if with_status else 1024
            edges = [0, *sorted({cut for cut in cuts if cut < size}), size]
            writable = [end - start for start, end in pairwise(edges)]
            message = header(IN, 3)
            readable = [message[: cuts[0] % 16], message[cuts[0] % 16 :]] if cuts else [message]
            assert disk.raw(readable, writable if with_status else [*writable, 1]) == (OK, 1025, payload)
    finally:
        disk.close()


def test_a_batch_is_bounded_and_each_head_is_used_once(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk, "BATCH", 4)
    heads = [disk.guest.offer([header(IN, 0)], [512, 1]) for _ in range(6)]
    assert disk.device.process(0, disk.queue) == MORE
    assert disk.device.process(0, disk.queue) == DRAINED
    assert [head for head, _, _ in disk.guest.collect()] == heads


def test_a_batch_of_huge_requests_is_a_small_one(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that is to stop, for a reset or the end of the machine, is not kept waiting for minutes."""
    monkeypatch.setattr(blk, "BATCH_BYTES", 4096)
    for _ in range(4):
        disk.guest.offer([header(IN, 0)], [4096, 1])
    assert disk.device.process(0, disk.queue) == MORE
    assert len(disk.guest.collect()) == 1


def test_config(disk: Disk) -> None:
    config = disk.device.read_config(0, 60)
    assert struct.unpack_from("<QII", config) == (SECTORS, 0, 126)
    assert struct.unpack_from("<IBBH", config, 20) == (512, 3, 0, 8)
    # writeback, unused, num_queues; max_discard_sectors, max_discard_seg, discard_sector_alignment
    assert struct.unpack_from("<BBHIII", config, 32) == (0, 0, 1, 1 << 22, 32, 128)
    assert struct.unpack_from("<IIB", config, 48) == (1 << 22, 32, 1)
    assert disk.device.read_config(56, 8) == b"\1" + bytes(7)
    assert disk.device.read_config(1000, 4) == bytes(4)
    with pytest.raises(GuestError):
        disk.device.write_config(32, b"\0")


def test_a_long_serial_is_cut() -> None:
    disk = Disk()
    try:
        disk.device = BlkDevice(disk.image, b"0123456789abcdefghijklmnop")
        assert disk.request(GET_ID, 0, [], [20]) == (OK, 21, b"0123456789abcdefghij")
    finally:
        disk.close()
