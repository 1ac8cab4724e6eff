"""What a worker may take of the host: memory and the size of its image. Real workers."""

import os
import resource
import struct
from pathlib import Path

import pytest

from devices.block.qcow2_create import create_qcow2
from devices.virtio.device import VIRTIO_ID_BLOCK
from devices.worker import sandbox
from tests.unit.test_worker_sandbox import inside
from tests.unit.worker_session import Session

VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR = 0, 1
VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT = 0, 1
QUOTA = 4 << 20
PIECE = 1 << 16


def write(session: Session, offset: int) -> int:
    session.offer(0, [struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, offset // 512), b"w" * 4096], [1])
    ((_, _, answer),) = session.collect(0)
    return answer[-1]


def read(session: Session, offset: int) -> tuple[int, bytes]:
    session.offer(0, [struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, offset // 512)], [4096, 1])
    ((_, _, answer),) = session.collect(0)
    return answer[-1], answer[:-1]


@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_an_image_does_not_grow_beyond_its_quota(tmp_path: Path, suffix: str) -> None:
    """The guest that fills its disk gets I/O errors; what it wrote before is there, and the worker lives."""
    path = tmp_path / f"disk.{suffix}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        if suffix == "qcow2":
            create_qcow2(fd, 1 << 30)
        else:
            os.ftruncate(fd, 1 << 30)
        words = {"format": suffix, "quota": str(QUOTA)}
        with Session("blk", VIRTIO_ID_BLOCK, 1, words, {"image": fd}) as session:
            statuses = [write(session, offset) for offset in range(0, 2 * QUOTA, PIECE)]
            assert statuses[0] == VIRTIO_BLK_S_OK and statuses[-1] == VIRTIO_BLK_S_IOERR
            fitted = statuses.index(VIRTIO_BLK_S_IOERR)
            assert QUOTA // PIECE // 2 < fitted <= QUOTA // PIECE
            for offset in (0, (fitted - 1) * PIECE):
                assert read(session, offset) == (VIRTIO_BLK_S_OK, b"w" * 4096)
            assert write(session, 0) == VIRTIO_BLK_S_OK
            assert session.worker.exit_code is None
        # The last tables of a qcow2 image may not fit either: then its end says so.
        assert session.worker.describe_exit().endswith(("exited with status 0", "File too large"))
        assert suffix == "raw" or os.fstat(fd).st_size <= QUOTA
    finally:
        os.close(fd)


TAKE = """
import mmap
def take(flags):
    kept = []
    try:
        for _ in range(256):
            kept.append(mmap.mmap(-1, 16 << 20, flags=flags))
    except (OSError, MemoryError):
        pass
    return len(kept) * 16
report["private"] = take(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
report["shared"] = take(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
"""


def test_memory_has_a_bound() -> None:
    """Of 4 GiB that an intruder would take."""
    report = inside(TAKE, enter="memory=64 << 20")
    assert 64 <= report["private"] <= sandbox.MAX_DATA >> 20
    assert 512 <= report["shared"] <= (sandbox.MAX_ADDRESS_SPACE + (64 << 20)) >> 20


def test_a_worker_at_work_is_far_from_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with open(path, "w+b") as file:
        file.truncate(1 << 20)
        memory = 1 << 20
        words = {"format": "raw", "memory": str(memory)}
        with Session("blk", VIRTIO_ID_BLOCK, 1, words, {"image": file.fileno()}) as session:
            assert write(session, 0) == VIRTIO_BLK_S_OK
            statm = Path(f"/proc/{session.worker.pid}/statm").read_text().split()
            page = resource.getpagesize()
            assert int(statm[5]) * page < sandbox.MAX_DATA // 2
            limits = Path(f"/proc/{session.worker.pid}/limits").read_text()
            (limit,) = [line.split()[3] for line in limits.splitlines() if line.startswith("Max address")]
            assert int(statm[0]) * page < int(limit) - sandbox.MAX_ADDRESS_SPACE // 2
