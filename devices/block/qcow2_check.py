"""Whether the tables of a qcow2 image agree: every reference counted, and compared with the refcounts.

Command line; nothing is written. QEMU docs/interop/qcow2.txt.

It reads the tables on its own, not through `Refcounts` and `ClusterMap`, which refuse a contradiction where
this has to count them all. What counts as what is QEMU's rule: a refcount that is too high is a leak, all
else that does not agree is a corruption.
"""

from __future__ import annotations

import os
import sys
from array import array

from devices.block.qcow2_header import Header
from devices.block.qcow2_mapping import (
    COMPRESSED_FLAG,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO_FLAG,
)
from devices.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Bounds the memory for counting to 512 MiB: 4 TiB of file with clusters of 64 KiB.
MAX_CLUSTERS = 1 << 26
MAX_MESSAGES = 20
LOW_BITS = 0x1FF  # reserved in a refcount table entry


class Report:
    """What was found. `problems` tells the first of the corruptions, a line each."""

    __slots__ = (
        "allocated_clusters",
        "compressed_clusters",
        "corruptions",
        "fragmented_clusters",
        "image_end",
        "leaks",
        "problems",
        "total_clusters",
    )

    def __init__(self) -> None:
        self.leaks = self.corruptions = 0
        self.allocated_clusters = self.compressed_clusters = self.fragmented_clusters = 0
        self.total_clusters = 0  # of the disk, not of the file
        self.image_end = 0  # bytes: behind the last cluster that is in use
        self.problems: list[str] = []

    def corrupt(self, text: str) -> None:
        self.corruptions += 1
        if len(self.problems) < MAX_MESSAGES:
            self.problems.append(text)


def check_qcow2(fd: int, advance: Callable[[int, int], None] | None = None) -> Report:
    """Check the image in `fd`. `advance` is told now and then how many L2 tables of how many are done.

    ImageError when nothing can be said: the header is bad, or there is something in the image that this does
    not count.
    """
    header = Header(fd)
    if header.nb_snapshots:
        raise ImageError(f"it has {header.nb_snapshots} internal snapshots: check it with qemu-img check")
    if header.has_bitmaps:
        raise ImageError("it has persistent bitmaps: check it with qemu-img check")
    return _Checker(fd, header).run(advance)


class _Checker:
    __slots__ = ("_bits", "_counts", "_fd", "_file_size", "_header", "_next", "_report", "_size", "_used")

    def __init__(self, fd: int, header: Header) -> None:
        self._fd = fd
        self._header = header
        self._bits = header.cluster_bits
        self._size = 1 << self._bits
        self._file_size = os.lseek(fd, 0, os.SEEK_END)
        clusters = -(-self._file_size >> self._bits)
        if clusters > MAX_CLUSTERS:
            raise ImageError(f"the file has {clusters} clusters, too many: check it with qemu-img check")
        # Pages of it that nothing counts in are never touched, so that a sparse file costs what is in it.
        self._used = memoryview(bytearray(4 * clusters)).cast("I")
        self._counts = memoryview(bytearray(4 * clusters)).cast("I")
        self._next = -1
        self._report = Report()

    def run(self, advance: Callable[[int, int], None] | None) -> Report:
        header = self._header
        report = self._report
        report.total_clusters = -(-header.size >> self._bits)
        self._use(0, self._size, "header")
        self._use(header.l1_table_offset, header.l1_size * 8, "L1 table")
        table_size = header.refcount_table_clusters << self._bits
        self._use(header.refcount_table_offset, table_size, "refcount table")
        blocks = self._read_counts(self._read_table(header.refcount_table_offset, table_size))
        tables = self._read_table(header.l1_table_offset, header.l1_size * 8)
        walked: set[int] = set()
        for index, entry in enumerate(tables):
            if entry:
                self._check_l1_entry(entry, index, walked)
            if advance is not None and (entry or index % 1024 == 0):
                advance(index, len(tables))
        for offset in blocks:
            if self._used[offset >> self._bits] != 1:
                report.corrupt(f"the refcount block at {offset:#x} is used for something else as well")
        self._compare()
        return report

    def _read_table(self, offset: int, size: int) -> array[int]:
        """Table entries; those past the end of the file are 0. None at all if all are: a sparse file may have
        millions of such tables.
        """
        data = os.pread(self._fd, size, offset)
        if not data.strip(b"\0"):
            return array("Q")
        table = array("Q", data.ljust(size, b"\0"))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def _use(self, offset: int, size: int, what: str) -> bool:
        """Count a reference to all clusters of the range. False when it is outside the file."""
        if not size:
            return True
        # A compressed cluster is rounded up to sectors, which the end of the file may lack.
        if offset + size - self._file_size >= self._size:
            self._report.corrupt(f"the {what} at {offset:#x} is outside the file")
            return False
        used = self._used
        for cluster in range(offset >> self._bits, ((offset + size - 1) >> self._bits) + 1):
            if cluster < len(used):
                used[cluster] += 1
        return True

    def _read_counts(self, table: array[int]) -> list[int]:
        """Read all refcount blocks that are where they can be, and return their offsets."""
        per_block = self._size * 8 >> self._header.refcount_order
        blocks: set[int] = set()
        for index, entry in enumerate(table):
            if not entry:
                continue
            if entry & LOW_BITS or entry & (self._size - 1):
                self._report.corrupt(f"refcount table entry {index}, {entry:#x}, makes no sense")
                continue
            if not self._use(entry, self._size, "refcount block") or entry in blocks:
                continue
            blocks.add(entry)
            first = index * per_block
            if first < len(self._counts):
                self._unpack(first, os.pread(self._fd, self._size, entry).ljust(self._size, b"\0"))
        return sorted(blocks)

    def _unpack(self, first: int, block: bytes) -> None:
        counts = self._counts
        end = min(len(counts), first + (len(block) * 8 >> self._header.refcount_order))
        values = _unpack_counts(block, self._header.refcount_order)
        for cluster, value in zip(range(first, end), values, strict=False):
            if value:
                counts[cluster] = min(value, 0xFFFF_FFFF)

    def _check_l1_entry(self, entry: int, index: int, walked: set[int]) -> None:
        report = self._report
        offset = entry & OFFSET_MASK
        if entry & L1_RESERVED:
            report.corrupt(f"L1 entry {index}, {entry:#x}, has reserved bits set")
        if not offset:
            return
        if offset & (self._size - 1):
            report.corrupt(f"L1 entry {index}, {entry:#x}, is not aligned to clusters")
            return
        if not self._use(offset, self._size, "L2 table"):
            return
        self._check_copied(entry, offset, "L1")
        if offset in walked:
            # Once is enough, also for time: its clusters now have two owners, and one is counted.
            report.corrupt(f"L1 entry {index}, {entry:#x}, points to the L2 table of another")
            return
        walked.add(offset)
        self._next = -1
        for l2_entry in self._read_table(offset, self._size):
            if l2_entry:
                self._check_l2_entry(l2_entry)

    def _check_copied(self, entry: int, offset: int, what: str) -> None:
        cluster = offset >> self._bits
        count = self._counts[cluster] if cluster < len(self._counts) else 0
        if (count == 1) != bool(entry & COPIED):
            self._report.corrupt(
                f"the COPIED flag of {what} entry {entry:#x} is wrong: the refcount is {count}"
            )

    def _check_l2_entry(self, entry: int) -> None:
        report = self._report
        if entry & COMPRESSED_FLAG:
            if entry & COPIED:
                report.corrupt(f"L2 entry {entry:#x} is compressed and has the COPIED flag")
            shift = 70 - self._bits
            offset = entry & ((1 << shift) - 1)
            sectors = (entry >> shift & ((1 << (self._bits - 8)) - 1)) + 1
            report.allocated_clusters += 1
            report.compressed_clusters += 1
            report.fragmented_clusters += 1
            self._use(offset, sectors * 512 - (offset & 511), "compressed cluster")
            return
        if entry & L2_RESERVED:
            report.corrupt(f"L2 entry {entry:#x} has reserved bits set")
        if entry & ZERO_FLAG and self._header.version < 3:
            report.corrupt(f"L2 entry {entry:#x} has the zero flag, which version 2 does not know")
        offset = entry & OFFSET_MASK
        if not offset:
            return
        if offset & (self._size - 1):
            report.corrupt(f"L2 entry {entry:#x} is not aligned to clusters")
            return
        report.allocated_clusters += 1
        report.fragmented_clusters += self._next not in (-1, offset)
        self._next = offset + self._size
        self._use(offset, self._size, "data cluster")
        self._check_copied(entry, offset, "L2")

    def _compare(self) -> None:
        report = self._report
        last = -1
        for cluster, (count, used) in enumerate(zip(self._counts, self._used, strict=True)):
            if count or used:
                last = cluster
                if count > used:
                    report.leaks += 1
                elif count < used:
                    report.corrupt(f"cluster {cluster} has refcount {count} and {used} references")
        report.image_end = (last + 1) << self._bits


def _unpack_counts(block: bytes, order: int) -> Sequence[int]:
    if order == 3:
        return block
    if order > 3:
        values = array("HIQ"[order - 4], block)
        if sys.byteorder == "little":
            values.byteswap()
        return values
    width = 1 << order
    mask = (1 << width) - 1
    return [byte >> shift & mask for byte in block for shift in range(0, 8, width)]
