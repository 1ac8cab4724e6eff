"""Guest memory in a snapshot: a sparse file as long as RAM, and its checksums beside it. VMM process.

Pages that nobody ever touched, or that hold only zeros, are holes. Checksums (`devices.pager.checksums`) are
for chunks of 64 KiB, and are checked when a chunk is brought in, so that opening a snapshot takes the same
time for any size. The checksum file's own hash goes into the manifest: so the three belong together.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from devices.memory import PAGE_SIZE
from devices.pager.checksums import CHUNK_SIZE, Checksums, build
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.snapshot.manifest import open_file
from vmrun.snapshot.sha256 import sha256

# A guest of more than that many times the host's memory is a lie, and its checksums, a byte for 13 KiB, would
# fill what there is.
_MOST_OF_HOST = 256

_ZERO_PAGE = bytes(PAGE_SIZE)
_ZERO_CHUNK = bytes(CHUNK_SIZE)


@dataclass(frozen=True)
class MemoryFacts:
    """What the manifest says of the memory file. `sha256` is the checksum file's, in hex."""

    size: int
    chunk_size: int
    data_chunks: int
    sha256: str

    def save(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, state: dict[str, Any]) -> "MemoryFacts":
        """Raises ValueError for what `save` does not give."""
        numbers = [state.get(key) for key in ("size", "chunk_size", "data_chunks")]
        checksum = state.get("sha256")
        if not isinstance(checksum, str) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("what it says of the memory file makes no sense")
        return cls(state["size"], state["chunk_size"], state["data_chunks"], checksum)


class OpenMemory:
    """A snapshot's memory, open for reading. A context manager; owns `fd` and `checksums_fd`."""

    def __init__(self, path: Path, fd: int, checksums_fd: int, checksums: Checksums) -> None:
        self.path = path
        self.fd = fd
        self.checksums_fd = checksums_fd
        self.checksums = checksums

    def read_chunk(self, chunk: int) -> bytes:
        """UserError when its bytes are not what was saved."""
        if not self.checksums.is_data(chunk):
            return bytes(self.checksums.length(chunk))
        data = os.pread(self.fd, self.checksums.length(chunk), chunk * CHUNK_SIZE)
        if not self.checksums.matches(chunk, data):
            raise self.damaged(chunk)
        return data

    def damaged(self, chunk: int) -> UserError:
        return UserError(
            f"{self.path}: the snapshot's memory is damaged at offset {chunk * CHUNK_SIZE:#x}: "
            "take it from a backup, or take a new snapshot",
            EXIT_IMAGE,
        )

    def data(self) -> Iterator[int]:
        """The numbers of the chunks that hold data."""
        chunk = self.checksums.kinds.find(1)
        while chunk >= 0:
            yield chunk
            chunk = self.checksums.kinds.find(1, chunk + 1)

    def verify_all(self) -> None:
        """Read everything, holes included. UserError for the first chunk that is not what was saved."""
        for chunk in self.data():
            self.read_chunk(chunk)
        for start, end in extents(self.fd, self.checksums.size):
            for chunk in range(start // CHUNK_SIZE, -(-end // CHUNK_SIZE)):
                if not self.checksums.is_data(chunk):
                    found = os.pread(self.fd, self.checksums.length(chunk), chunk * CHUNK_SIZE)
                    if found.count(0) != len(found):
                        raise self.damaged(chunk)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.checksums_fd)

    def __enter__(self) -> "OpenMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checksums_path(path: Path) -> Path:
    """Where the checksums of the memory file `path` are."""
    return path.with_name(path.name + ".sums")


def open_memory(path: Path, facts: MemoryFacts) -> OpenMemory:
    """The memory file `path` of a snapshot whose manifest says `facts`. Takes no time that grows with
    the memory's contents. UserError when a file is missing, truncated, damaged or another snapshot's.
    """
    beside = checksums_path(path)
    if facts.size > _MOST_OF_HOST * os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE:
        raise UserError(f"{path}: the snapshot's memory of {facts.size} bytes is too much here", EXIT_IMAGE)
    checksums_fd = _open(beside)
    try:
        # Whoever made the snapshot may have put a sparse file of any length there. One that fits has five
        # bytes for each chunk, and a header.
        length = os.fstat(checksums_fd).st_size
        if length > 5 * (facts.size // CHUNK_SIZE) + PAGE_SIZE:
            raise _of_another(beside)
        raw = os.pread(checksums_fd, length, 0)
        try:
            checksums = Checksums(raw)
        except ValueError as error:
            raise UserError(f"{beside}: the snapshot's checksum file {error}", EXIT_IMAGE) from None
        found = MemoryFacts(checksums.size, CHUNK_SIZE, checksums.data_chunks, sha256(raw).hexdigest())
        if found != facts:
            raise _of_another(beside)
        fd = _open(path)
    except BaseException:
        os.close(checksums_fd)
        raise
    memory = OpenMemory(path, fd, checksums_fd, checksums)
    length = os.fstat(fd).st_size
    if length != facts.size:
        memory.close()
        what = "is truncated" if length < facts.size else "is too long"
        raise UserError(
            f"{path}: the snapshot's memory file {what}: {length} bytes instead of {facts.size}", EXIT_IMAGE
        )
    return memory


def _of_another(beside: Path) -> UserError:
    return UserError(f"{beside}: this checksum file belongs to another snapshot", EXIT_IMAGE)


def _open(path: Path) -> int:
    try:
        return open_file(path)
    except OSError as error:
        raise UserError(
            f"{path}: {(error.strerror or str(error)).lower()}: the snapshot is incomplete", EXIT_IMAGE
        ) from None


def write_memory(ram_fd: int, size: int, path: Path, source: OpenMemory | None = None) -> MemoryFacts:
    """Save the `size` bytes of the memfd `ram_fd` in the new file `path`, with the checksums beside it, and
    have both on the disk; their directory is the caller's to sync.

    Nobody writes to the memory meanwhile. `source` is the memory that the machine was restored from, if some
    of it may not have been brought in yet: a page that is in the memfd counts, for others `source` does. A
    pager may go on bringing pages in. Raises OSError, and UserError when a chunk of `source` is damaged.
    """
    chunks = -(-size // CHUNK_SIZE)
    kinds, crcs = bytearray(chunks), [0] * chunks
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with (
        open(os.open(path, flags, 0o600), "r+b", buffering=0) as file,
        open(os.open(checksums_path(path), flags, 0o600), "r+b", buffering=0) as checksums_file,
    ):
        os.ftruncate(file.fileno(), size)
        for chunk, data in _chunks(ram_fd, size, source):
            if data == _ZERO_CHUNK[: len(data)]:
                continue
            kinds[chunk] = 1
            crcs[chunk] = crc32(data)
            _write_pages(file.fileno(), data, chunk * CHUNK_SIZE)
        raw = build(size, kinds, crcs)
        checksums_file.write(raw)
        os.fsync(file.fileno())
        os.fsync(checksums_file.fileno())
    return MemoryFacts(size, CHUNK_SIZE, kinds.count(1), sha256(raw).hexdigest())


def _chunks(ram_fd: int, size: int, source: OpenMemory | None) -> Iterator[tuple[int, bytes]]:
    """Each chunk that may hold data, once, in order."""
    present = extents(ram_fd, size)
    if source is None:
        done = 0
        for start, end in present:
            for chunk in range(max(done, start // CHUNK_SIZE), -(-end // CHUNK_SIZE)):
                yield chunk, os.pread(ram_fd, min(CHUNK_SIZE, size - chunk * CHUNK_SIZE), chunk * CHUNK_SIZE)
                done = chunk + 1
        return
    extent = next(present, None)
    for chunk in range(-(-size // CHUNK_SIZE)):
        start = chunk * CHUNK_SIZE
        end = min(start + CHUNK_SIZE, size)
        while extent is not None and extent[1] <= start:
            extent = next(present, None)
        if extent is not None and extent[0] <= start and end <= extent[1]:
            yield chunk, os.pread(ram_fd, end - start, start)
            continue
        touched = extent is not None and extent[0] < end
        if not source.checksums.is_data(chunk):
            if touched:
                yield chunk, os.pread(ram_fd, end - start, start)
            continue
        data = bytearray(source.read_chunk(chunk))
        # Asked for anew: a page that came in since is the same in both places.
        for first, last in extents(ram_fd, end, start) if touched else ():
            data[first - start : last - start] = os.pread(ram_fd, last - first, first)
        yield chunk, bytes(data)


def extents(fd: int, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The parts of a sparse file from `start` to `end` that are no holes, as (start, end)."""
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        if first >= end:
            return
        start = min(os.lseek(fd, first, os.SEEK_HOLE), end)
        yield first, start


def _write_pages(fd: int, data: bytes, offset: int) -> None:
    """All of `data` but its pages of zeros."""
    start = 0
    while start < len(data):
        if data[start : start + PAGE_SIZE] == _ZERO_PAGE:
            start += PAGE_SIZE
            continue
        end = start + PAGE_SIZE
        while end < len(data) and data[end : end + PAGE_SIZE] != _ZERO_PAGE:
            end += PAGE_SIZE
        rest = memoryview(data)[start:end]
        while rest:
            count = os.pwrite(fd, rest, offset + start)
            start += count
            rest = rest[count:]
