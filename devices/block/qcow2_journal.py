"""The restart journal of a qcow2 image: what the tables in memory know and the file does not yet.

Worker process. It lies in a memfd that the VMM made and keeps, so that it outlives a worker that is killed.
Before a request that changed the tables is completed, each change is recorded here; the commit that brings
the tables to the file empties it. The worker that is started next replays what it finds
(`devices.block.qcow2_replay`). It is no help against a power cut, and none is needed: then the guest is gone
as well, and unflushed writes may be.

The journal is native 64-bit words:

    0   MAGIC, or 0 while nobody has used it
    1   how many records there are
    2   1 after a flush of the file failed: every later one must fail as well, in the next worker too
    3   0
    4   the records, of three words each:
            the guest cluster
            the L2 entry it got
            count << 1 | new: `count` clusters from there on. new = 1: they got `count` adjacent host clusters
            that were free before, from the one in the entry on. new = 0: each got this very entry.

A record is complete before the count says so, and the count is one aligned store: a process that is killed
has stored it or not.
"""

from __future__ import annotations

import mmap
import os

from devices.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = 0x6C6E_6A32_7763_7101  # "\x01qcw2jnl", of which the first byte is the version
JOURNAL_SIZE = 256 << 10  # what the VMM makes: 10922 records
MIN_SIZE = 4096
COUNT = 1
SYNC_FAILED = 2
FIRST_RECORD = 4
RECORD_WORDS = 3
# Clusters in all records: bounds the memory and the time of a replay.
MAX_CLUSTERS = 1 << 18


class Journal:
    """The journal in memfd `fd`, whose owner it becomes when the constructor returns."""

    __slots__ = ("_capacity", "_clusters", "_count", "_fd", "_map", "_words")

    def __init__(self, fd: int) -> None:
        """ImageError when it is none."""
        size = os.fstat(fd).st_size
        if size < MIN_SIZE or size % 8:
            raise ImageError(f"a qcow2 restart journal of {size} bytes makes no sense")
        self._map = mmap.mmap(fd, size)
        self._words = memoryview(self._map).cast("Q")
        self._fd = fd
        self._capacity = (size // 8 - FIRST_RECORD) // RECORD_WORDS
        self._count = self._words[COUNT]
        if self._words[0] not in (0, MAGIC) or self._count > self._capacity:
            raise ImageError("the qcow2 restart journal is damaged")
        self._clusters = sum(count for _, _, count, _ in self.records())
        self._words[0] = MAGIC

    @property
    def empty(self) -> bool:
        return not self._count

    def has_room(self, clusters: int) -> bool:
        """Whether one more record, of `clusters` clusters, may be added."""
        return self._count < self._capacity and self._clusters + clusters <= MAX_CLUSTERS

    def add(self, cluster: int, entry: int, count: int, new: bool) -> None:
        """Record one change of the tables. The caller has asked for room."""
        words = self._words
        index = FIRST_RECORD + RECORD_WORDS * self._count
        words[index] = cluster
        words[index + 1] = entry
        words[index + 2] = count << 1 | new
        self._clusters += count
        self._count += 1
        words[COUNT] = self._count

    def records(self) -> Iterator[tuple[int, int, int, bool]]:
        """Guest cluster, entry, count and whether the host clusters are new, oldest first.

        Whoever filled the journal may have been taken over by a guest: nothing here is checked yet but the
        sum of the counts.
        """
        words = self._words
        clusters = 0
        for index in range(FIRST_RECORD, FIRST_RECORD + RECORD_WORDS * self._count, RECORD_WORDS):
            last = words[index + 2]
            clusters += last >> 1
            if clusters > MAX_CLUSTERS:
                raise ImageError("the qcow2 restart journal is damaged")
            yield words[index], words[index + 1], last >> 1, bool(last & 1)

    def clear(self) -> None:
        """The tables are in the file."""
        self._words[COUNT] = self._count = self._clusters = 0

    @property
    def sync_failed(self) -> bool:
        return bool(self._words[SYNC_FAILED])

    def note_failed_sync(self) -> None:
        self._words[SYNC_FAILED] = 1

    def close(self) -> None:
        if self._fd >= 0:
            self._words.release()
            self._map.close()
            os.close(self._fd)
            self._fd = -1
