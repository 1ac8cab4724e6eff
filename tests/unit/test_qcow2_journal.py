"""A worker is killed, the guest lives on: the next worker has every completed write, flushed or not.

Killed at every place between two changes of the file or the journal (by an exception that nobody catches),
and killed for real, at random moments. One request may be under way then: each of its sectors holds the old
or the new, and the guest's request will be done again.
"""

import errno
import gc
import mmap
import os
import random
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.block import transfer
from devices.block.image import Image
from devices.block.open import open_image
from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_journal import FIRST_RECORD, JOURNAL_SIZE, MAGIC, MIN_SIZE, Journal
from devices.errors import ImageError
from tests.unit.qcow2_writer import (
    SECTOR,
    Operation,
    assert_at_most_leaks,
    content,
    operations,
    perform,
    read_sectors,
)

SIZE = 2 << 20
# Cluster size, version, refcount bits, with a backing file, size of the journal.
Shape = tuple[int, int, int, bool, int]
SHAPES: list[Shape] = [
    (512, 3, 64, False, MIN_SIZE),
    (512, 2, 16, False, JOURNAL_SIZE),
    (4096, 3, 1, True, JOURNAL_SIZE),
    (65536, 3, 16, False, JOURNAL_SIZE),
]


class Disk:
    """An image, its backing file and its journal: what outlives a worker. Knows what must be in it."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path = path
        self.cluster_size, version, refcount_bits, backed, journal_size = shape
        self.backing = path.with_suffix(".base") if backed else None
        self.sectors = [bytes(SECTOR)] * (SIZE // SECTOR)
        if self.backing is not None:
            # Shorter than the disk, and no whole number of clusters.
            base = b"".join(struct.pack("<Q", number) * (SECTOR // 8) for number in range(1000))
            self.backing.write_bytes(base)
            self.sectors[:1000] = [base[start : start + SECTOR] for start in range(0, len(base), SECTOR)]
        with path.open("wb") as file:
            create_qcow2(
                file.fileno(),
                SIZE,
                self.cluster_size,
                version,
                refcount_bits,
                str(self.backing) if self.backing else None,
                "raw" if self.backing else None,
            )
        self.journal = os.memfd_create("journal")
        os.ftruncate(self.journal, journal_size)

    def open(self, path: Path | None = None, journal: int | None = None) -> Image:
        backing = None
        if self.backing is not None:
            backing = open_image("raw", os.open(self.backing, os.O_RDONLY), True)
        fd = os.open(path or self.path, os.O_RDWR)
        return open_image("qcow2", fd, False, backing, os.dup(self.journal if journal is None else journal))

    def operations(self, seed: int) -> Iterator[Operation]:
        return operations(seed, len(self.sectors), self.cluster_size)

    def expect(self, image: Image, seed: int, completed: int) -> None:
        """Compare with `image` after `completed` operations of writer `seed`, and perhaps a part of one
        more.
        """
        done = self.operations(seed)
        for number, operation in zip(range(completed), done, strict=False):
            _, first, count = operation
            self.sectors[first : first + count] = [content(seed, number, operation)] * count
        under_way = next(done)
        _, first, count = under_way
        maybe = content(seed, completed, under_way)
        after = read_sectors(image)
        for sector, data in enumerate(after):
            if data != self.sectors[sector]:
                assert first <= sector < first + count and data == maybe, f"sector {sector} after {completed}"
        self.sectors = after

    def check_a_copy(self) -> None:
        """What the next worker would find, commit and leave behind."""
        copy = self.path.with_suffix(".copy")
        shutil.copyfile(self.path, copy)
        journal = os.memfd_create("copy")
        size = os.fstat(self.journal).st_size
        os.pwrite(journal, os.pread(self.journal, size, 0), 0)
        image = self.open(copy, journal)
        assert read_sectors(image) == self.sectors
        image.close()
        assert struct.unpack("4Q", os.pread(journal, 32, 0)) == (MAGIC, 0, 0, 0)
        os.close(journal)
        assert_at_most_leaks(copy)


@pytest.fixture(params=SHAPES, ids=str)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk.qcow2", request.param)
    yield disk
    os.close(disk.journal)


class Killed(BaseException):
    pass


class Killer:
    """Ends a worker before, in the middle of or after the change of the file or journal that `countdown`
    reaches. Before that, one write in fifty finds no space.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
        self.countdown = -1
        self.kills: Counter[str] = Counter()
        self._rng = rng
        pwritev = os.pwritev

        def write(fd: int, buffers: list[memoryview], offset: int) -> int:
            def half() -> None:
                data = b"".join(buffers)
                cut = (offset + self._rng.randrange(len(data))) // SECTOR * SECTOR - offset
                pwritev(fd, [memoryview(data)[: max(0, cut)]], offset)

            return self._step("write", pwritev, half, fd, buffers, offset)  # type: ignore[no-any-return]

        def wrap(owner: Any, name: str) -> None:
            original = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *arguments: self._step(name, original, lambda: None, *arguments)
            )

        monkeypatch.setattr(os, "pwritev", write)
        monkeypatch.setattr(os, "fdatasync", lambda fd: None)
        for owner, name in (
            (os, "ftruncate"),
            (os, "fdatasync"),
            (transfer, "_try_fallocate"),
            (Journal, "add"),
            (Journal, "clear"),
        ):
            wrap(owner, name)

    def _step(self, name: str, original: Any, half: Any, *arguments: Any) -> Any:
        self.countdown -= 1
        if self.countdown > 0 and name == "write" and self._rng.random() < 0.02:
            raise OSError(errno.ENOSPC, "no space for a while")
        if self.countdown != 0:
            return original(*arguments)
        moment = self._rng.choice(["before", "half", "after"])
        if moment == "half":
            half()
        elif moment == "after":
            original(*arguments)
        self.kills[f"{moment} {name}"] += 1
        raise Killed


def perform_at_last(image: Image, seed: int, number: int, operation: Operation) -> None:
    """A guest that repeats what failed."""
    while True:
        try:
            perform(image, seed, number, operation)
            return
        except OSError:
            pass


def bury(image: Image) -> None:
    """What the kernel does with the descriptors of a worker that died."""
    for fd in (image._file.fd, image._file.journal._fd):  # type: ignore[attr-defined]
        os.close(fd)
    image._file.journal._fd = -1  # type: ignore[attr-defined]
    if image.backing is not None:  # type: ignore[attr-defined]
        image.backing.close()  # type: ignore[attr-defined]


def kill_between_changes(disk: Disk, monkeypatch: pytest.MonkeyPatch, rounds: int) -> Counter[str]:
    rng = random.Random(disk.cluster_size)
    replays = 0
    kinds: Counter[str] = Counter()
    for seed in range(rounds):
        replays += struct.unpack("2Q", os.pread(disk.journal, 16, 0))[1] > 0
        image = disk.open()
        completed = 0
        with monkeypatch.context() as patch:
            killer = Killer(patch, rng)
            killer.countdown = rng.randrange(1, 120)
            try:
                for number, operation in enumerate(disk.operations(seed)):
                    perform_at_last(image, seed, number, operation)
                    completed = number + 1
            except Killed:
                pass
        kinds += killer.kills
        bury(image)
        survivor = disk.open()
        disk.expect(survivor, seed, completed)
        bury(survivor)
        if seed % 20 == 0:
            disk.check_a_copy()
    disk.check_a_copy()
    assert replays > rounds // 2
    return kinds


def test_killed_between_changes(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_between_changes(disk, monkeypatch, 60)


@pytest.mark.slow
def test_killed_between_changes_hundreds_of_times(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = kill_between_changes(disk, monkeypatch, 800)
    for name in ("write", "fdatasync", "add", "clear"):
        for moment in ("before", "half", "after"):
            assert kinds[f"{moment} {name}"], f"never killed {moment} {name}"


def work_until_killed(disk: Disk, seed: int, counter: memoryview, seconds: float, early: bool) -> None:
    """The child's life: SIGALRM ends it as abruptly as SIGKILL. `early`: that may be in the replay."""
    if early:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    image = disk.open()
    if not early:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    for number, operation in enumerate(disk.operations(seed)):
        perform(image, seed, number, operation)
        counter[0] = number + 1


def kill_again_and_again(disk: Disk, rounds: int) -> None:
    rng = random.Random(disk.cluster_size)
    shared = mmap.mmap(-1, 4096)
    counter = memoryview(shared).cast("Q")
    replays = total = 0
    for seed in range(rounds):
        counter[0] = 0
        early = rng.random() < 0.3
        seconds = rng.uniform(0.0001, 0.015)
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                work_until_killed(disk, seed, counter, seconds, early)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the writer died of something else"
        replays += struct.unpack("2Q", os.pread(disk.journal, 16, 0))[1] > 0
        total += counter[0]
        survivor = disk.open()
        disk.expect(survivor, seed, counter[0])
        bury(survivor)
        if seed % 20 == 0:
            disk.check_a_copy()
    disk.check_a_copy()
    counter.release()
    shared.close()
    assert replays > rounds // 3
    assert total > 4 * rounds


def test_killed(disk: Disk) -> None:
    kill_again_and_again(disk, 25)


@pytest.mark.slow
def test_killed_hundreds_of_times(disk: Disk) -> None:
    kill_again_and_again(disk, 300)


def test_killed_after_a_commit_that_failed_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file points to a cluster that the journal knows to be free again: it is freed once, not twice."""
    disk = Disk(tmp_path / "disk.qcow2", (512, 3, 16, False, MIN_SIZE))
    image = disk.open()
    image.writev(0, [memoryview(b"1" * SECTOR)])
    image.flush()
    # One entry for a table that is in use, one for a table that the L1 table must get first.
    image.writev(SECTOR, [memoryview(b"2" * SECTOR)])
    image.writev(SIZE // 2, [memoryview(b"3" * SECTOR)])
    pwritev = os.pwritev

    def no_space_in_l1(fd: int, buffers: list[memoryview], offset: int) -> int:
        if image._map._l1_offset <= offset < image._map._l1_offset + SECTOR:  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, "no space for a while")
        return pwritev(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", no_space_in_l1)
        with pytest.raises(OSError, match="no space"):
            image.flush()
    image.discard(SECTOR, SECTOR)
    bury(image)
    image = disk.open()
    image.close()
    os.close(disk.journal)
    assert_at_most_leaks(disk.path)


@pytest.mark.parametrize("journal_size", [MIN_SIZE, JOURNAL_SIZE])
def test_a_full_journal_is_a_commit(tmp_path: Path, journal_size: int) -> None:
    disk = Disk(tmp_path / "disk.qcow2", (512, 3, 16, False, journal_size))
    room = (journal_size // 8 - FIRST_RECORD) // 3
    image = disk.open()
    assert image._map.journal._capacity == room  # type: ignore[attr-defined]
    # Every other sector, so that each is a record of its own.
    for sector in range(0, min(2 * room, 1000) + 2, 2):
        image.writev(sector * SECTOR, [memoryview(b"x" * SECTOR)])
    count = struct.unpack("2Q", os.pread(disk.journal, 16, 0))[1]
    assert 0 < count <= room
    bury(image)
    survivor = disk.open()
    data = b"".join(read_sectors(survivor))
    assert data.count(b"x") == (min(2 * room, 1000) // 2 + 1) * SECTOR
    survivor.close()
    os.close(disk.journal)
    assert_at_most_leaks(disk.path)


def test_a_failed_flush_is_remembered_by_the_next_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / "disk.qcow2", SHAPES[-1])
    image = disk.open()
    image.writev(0, [memoryview(b"x" * SECTOR)])

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            image.flush()
    bury(image)
    image = disk.open()
    assert read_sectors(image)[0] == b"x" * SECTOR
    with pytest.raises(OSError, match="an earlier flush"):
        image.flush()
    with pytest.raises(OSError, match="an earlier flush"):
        image.close()
    os.close(disk.journal)


def words(*values: int) -> bytes:
    return struct.pack(f"{len(values)}Q", *values).ljust(MIN_SIZE, b"\0")


COPIED = 1 << 63


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1000),
        bytes(MIN_SIZE + 4),
        words(MAGIC + 1),
        words(MAGIC, 171),
        words(MAGIC, 1 << 63),
        words(MAGIC, 1, 0, 0, 0, COPIED, (1 << 63) | 1),
        words(MAGIC, 1, 0, 0, 0, 0, 1 << 40),
        words(MAGIC, 1, 0, 0, 1 << 40, 0, 2),
        words(MAGIC, 1, 0, 0, (1 << 64) - 1, 0, 2),
        words(MAGIC, 1, 0, 0, 0, COPIED | 0, 3),
        words(MAGIC, 1, 0, 0, 0, COPIED | 65536, 3),
        words(MAGIC, 1, 0, 0, 0, COPIED | 65536, 2),
        words(MAGIC, 1, 0, 0, 0, COPIED | 65537 * 2, 2),
        words(MAGIC, 1, 0, 0, 0, COPIED | 512, 3),
        words(MAGIC, 1, 0, 0, 0, COPIED | 1 << 40, 3),
        words(MAGIC, 1, 0, 0, 0, COPIED | 1 << 55, 3),
        words(MAGIC, 1, 0, 0, 0, 1 << 62 | 65536, 2),
        words(MAGIC, 1, 0, 0, 0, 1 << 57, 2),
    ],
)
def test_a_hostile_journal_is_an_error(tmp_path: Path, data: bytes) -> None:
    """A worker that the guest took over may have written anything: its successor must not follow it."""
    disk = Disk(tmp_path / "disk.qcow2", SHAPES[-1])
    os.ftruncate(disk.journal, len(data))
    os.pwrite(disk.journal, data, 0)
    fd = os.open(disk.path, os.O_RDWR)
    with pytest.raises(ImageError, match=r"journal|qcow2 L2 entry|outside the qcow2 disk"):
        open_image("qcow2", fd, False, None, disk.journal)
    os.close(fd)
    os.close(disk.journal)
    gc.collect()
    assert_at_most_leaks(disk.path)


def test_random_journals_never_harm_the_tables(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk.qcow2", SHAPES[2])
    image = disk.open()
    for number, operation in zip(range(50), disk.operations(1), strict=False):
        perform(image, 1, number, operation)
    image.close()
    whole = disk.path.read_bytes()
    rng = random.Random(3)
    for _ in range(200):
        disk.path.write_bytes(whole)
        count = rng.randrange(1, 20)
        values = []
        for _ in range(count):
            host = rng.randrange(len(whole) // 4096 + 1) << 12 | rng.choice([0, 0, 0, 1, COPIED, COPIED | 1])
            values += [rng.randrange(SIZE // 4096), host, rng.randrange(1, 4) << 1 | rng.randrange(2)]
        os.pwrite(disk.journal, words(MAGIC, count, 0, 0, *values), 0)
        fd, journal = os.open(disk.path, os.O_RDWR), os.dup(disk.journal)
        backing = open_image("raw", os.open(tmp_path / "disk.base", os.O_RDONLY), True)
        try:
            image = open_image("qcow2", fd, False, backing, journal)
        except ImageError:
            os.close(fd)
            os.close(journal)
            backing.close()
            continue
        try:
            image.writev(rng.randrange(SIZE - 65536), [memoryview(b"y" * 65536)])
            image.close()
        except ImageError:
            with pytest.raises(ImageError):
                image.close()
            if image._file.fd >= 0:  # type: ignore[attr-defined]
                bury(image)
    os.close(disk.journal)


def test_only_a_writable_qcow2_image_has_a_journal(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk.qcow2", SHAPES[-1])
    with disk.path.open("rb") as file:
        for fmt in ("qcow2", "raw"):
            with pytest.raises(ImageError, match="restart journal"):
                open_image(fmt, file.fileno(), True, None, disk.journal)
    os.close(disk.journal)
