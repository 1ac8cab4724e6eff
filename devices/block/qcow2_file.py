"""The host file of a qcow2 image: reading and writing metadata, barriers, and which clusters are metadata.

Worker process. Nothing here knows what a table means; it knows which clusters hold tables, so that no guest
data is ever written over one, whatever the tables of a hostile image say.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from devices.block.qcow2_header import MAX_HOST_CLUSTERS
from devices.block.qcow2_journal import Journal
from devices.block.transfer import read_into, write_from
from devices.errors import ImageError

# ctypes makes this one for big-endian structures; it swaps an entry when it is looked at, not the whole
# table.
_u64_be = ctypes.c_uint64.__ctype_be__


class CorruptImage(ImageError):
    """The metadata contradict themselves: an image that is written to on top of that only gets worse."""


class EntryTable:
    """A table of big-endian 64-bit entries: `entries` are the numbers, `data` the same memory as it is on
    disk.
    """

    __slots__ = ("data", "entries")

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.entries: ctypes.Array[ctypes.c_uint64] = (_u64_be * (len(data) // 8)).from_buffer(data)

    def extended(self, count: int) -> EntryTable:
        """A copy with `count` more entries, all 0."""
        return EntryTable(self.data + bytes(8 * count))


class Qcow2File:
    """`end` is the first cluster that was never part of the file; from there on clusters read as zeroes."""

    __slots__ = (
        "_metadata",
        "_sync_failed",
        "cluster_bits",
        "cluster_size",
        "end",
        "fd",
        "journal",
        "regular",
        "size",
    )

    def __init__(self, fd: int, cluster_bits: int) -> None:
        self.fd = fd
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.end = -(-self.size >> cluster_bits)
        self._metadata = bytearray()
        self._sync_failed = False
        self.journal: Journal | None = None

    def claim(self, offset: int, size: int, what: str) -> None:
        """Remember [offset, offset + size) as metadata.

        CorruptImage when another table is there or the file ends before.
        """
        first = offset >> self.cluster_bits
        last = (offset + size - 1) >> self.cluster_bits
        if offset + size > self.size and last >= self.end:
            raise CorruptImage(f"the qcow2 {what} at {offset:#x} is outside the file")
        metadata = self._metadata
        if last >> 3 >= len(metadata):
            metadata.extend(bytes((last >> 3) + 1 - len(metadata)))
        for cluster in range(first, last + 1):
            bit = 1 << (cluster & 7)
            if metadata[cluster >> 3] & bit:
                raise CorruptImage(f"the qcow2 {what} at {offset:#x} overlaps other metadata")
            metadata[cluster >> 3] |= bit

    def release(self, offset: int, size: int) -> None:
        """[offset, offset + size) is no longer metadata."""
        for cluster in range(offset >> self.cluster_bits, ((offset + size - 1) >> self.cluster_bits) + 1):
            self._metadata[cluster >> 3] &= ~(1 << (cluster & 7))

    def is_metadata(self, cluster: int) -> bool:
        index = cluster >> 3
        return index < len(self._metadata) and bool(self._metadata[index] >> (cluster & 7) & 1)

    def took(self, first: int, count: int) -> None:
        """Clusters up to `first + count` are in use now."""
        if first + count > MAX_HOST_CLUSTERS:
            raise OSError(errno.EFBIG, f"a qcow2 file of more than {MAX_HOST_CLUSTERS} clusters")
        if first + count > self.end:
            if not self.regular:
                raise OSError(errno.ENOSPC, "the block device under the qcow2 image is full")
            self.end = first + count

    def is_fresh(self, cluster: int) -> bool:
        """Whether `cluster` is known to read as zeroes: a file grows by zeroes, a block device does not."""
        return self.regular and cluster >= self.end

    def read(self, offset: int, size: int, what: str) -> bytearray:
        """Exactly `size` bytes of metadata."""
        data = bytearray(size)
        if read_into(self.fd, [memoryview(data)], offset, size) < size:
            raise CorruptImage(f"the qcow2 {what} at {offset:#x} is cut off by the end of the file")
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        write_from(self.fd, [memoryview(data)], offset, len(data))

    def extend(self) -> None:
        """Let the file reach to the end of its last cluster, so that nothing points past it."""
        end = self.end << self.cluster_bits
        if self.regular and end > self.size:
            # A data write may have made the file longer than `size` says, but never longer than `end`.
            os.ftruncate(self.fd, end)
            self.size = end

    def sync(self) -> None:
        """A barrier: what was written before is on stable storage when this returns."""
        if self._sync_failed or (self.journal is not None and self.journal.sync_failed):
            # The kernel reports a failed write-back once and then forgets it: a later success would be a lie.
            raise OSError(errno.EIO, "an earlier flush of the image failed")
        try:
            os.fdatasync(self.fd)
        except OSError:
            self._sync_failed = True
            if self.journal is not None:
                self.journal.note_failed_sync()
            raise
