"""From guest offset to host cluster: the L1 and L2 tables of a qcow2 image, cached, and the order they are
written in.

Worker process. QEMU docs/interop/qcow2.txt, "Cluster mapping". Changes stay in memory until `commit`, which
writes them so that the file is whole at every moment:

  1. refcounts of new clusters, and new L2 tables, which nothing points to yet; the guest's data are there
     already;
  2. barrier;
  3. changed entries of L2 tables that are in use, and L1 entries;
  4. barrier;
  5. lower refcounts of clusters that nothing points to any more; only now may they be used again.

A process that dies anywhere in between leaves, at worst, clusters with a count but no use. The barriers make
the same true for a power cut: writes that were not flushed may be lost, those that were are there, and the
tables agree.
"""

from __future__ import annotations

from devices.block.qcow2_file import CorruptImage, EntryTable, Qcow2File
from devices.block.qcow2_header import L1_SIZE_FIELD, MAX_L1_SIZE, Header, l1_entries
from devices.block.qcow2_journal import Journal
from devices.block.qcow2_refcounts import Refcounts
from devices.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterator

# Table entries. Bits 9 to 55 are the host offset, of an L2 table or of a data cluster.
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63  # the refcount of the cluster is exactly 1: it may be written in place
COMPRESSED_FLAG = 1 << 62
ZERO_FLAG = 1  # version 3: reads as zeroes, whether it has a host offset or not
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE

# What `lookup` finds.
UNALLOCATED = 0  # reads from the backing file, or as zeroes
ZERO = 1
DATA = 2  # at the host offset, writable in place
ZERO_ALLOCATED = 3  # reads as zeroes; its own host cluster lies ready
SHARED = 4  # at the host offset, which others may refer to as well: copy before writing
COMPRESSED = 5  # the L2 entry stands in place of the host offset

CACHE_BYTES = 16 << 20
CACHE_TABLES = 8192
PENDING_LIMIT = 4096


class L2Table:
    """One L2 table in memory.

    Entries [first, last) differ from the file; `new`: no L1 entry on disk points to it.
    """

    __slots__ = ("data", "entries", "first", "last", "new", "offset", "referenced")

    def __init__(self, offset: int, table: EntryTable, new: bool) -> None:
        self.offset = offset
        self.data = table.data
        self.entries = entries = table.entries
        self.new = new
        self.referenced = True
        self.first = 0 if new else len(entries)
        self.last = len(entries) if new else 0


class ClusterMap:
    """The active L1 table and a bounded cache of its L2 tables."""

    __slots__ = (
        "_cache_limit",
        "_dirty",
        "_file",
        "_foreign_bits",
        "_has_zero_flag",
        "_index_mask",
        "_l1",
        "_l1_dirty",
        "_l1_offset",
        "_l1_used",
        "_l2_bits",
        "_refcounts",
        "_tables",
        "journal",
    )

    def __init__(self, file: Qcow2File, header: Header, refcounts: Refcounts) -> None:
        self._file = file
        self._refcounts = refcounts
        self._l2_bits = file.cluster_bits - 3
        self._index_mask = (1 << self._l2_bits) - 1
        self._has_zero_flag = header.version >= 3
        # An entry of a plain data cluster has COPIED and an aligned offset: none of these bits but COPIED.
        self._foreign_bits = ~(OFFSET_MASK & ~(file.cluster_size - 1)) & 0xFFFF_FFFF_FFFF_FFFF
        self._l1_offset = header.l1_table_offset
        self._l1_used = header.l1_size
        size = header.l1_size * 8
        if size:
            file.claim(self._l1_offset, size, "L1 table")
        l1 = EntryTable(file.read(self._l1_offset, size, "L1 table"))
        for entry in l1.entries:
            if entry:
                offset = entry & OFFSET_MASK
                if entry & L1_RESERVED or not offset or offset & (file.cluster_size - 1):
                    raise CorruptImage(f"the qcow2 L1 entry {entry:#x} makes no sense")
                file.claim(offset, file.cluster_size, "L2 table")
        # Entries that the file has no room for stay 0 until `_grow_l1`.
        missing = l1_entries(header.size, file.cluster_bits) - header.l1_size
        if missing > 0:
            l1 = l1.extended(missing)
        self._l1: ctypes.Array[ctypes.c_uint64] = l1.entries
        self._l1_dirty: set[int] = set()
        self.journal: Journal | None = None  # what `replay_journal` has brought up to date
        self._tables: dict[int, L2Table] = {}
        self._dirty: set[int] = set()
        self._cache_limit = min(CACHE_TABLES, max(4, CACHE_BYTES >> file.cluster_bits))

    @property
    def dirty(self) -> bool:
        """Whether a commit would write anything to the tables."""
        journal = self.journal
        return bool(
            self._dirty or self._l1_dirty or self._refcounts.pending or (journal and not journal.empty)
        )

    def _load(self, l1_index: int) -> L2Table | None:
        entry = self._l1[l1_index]
        if not entry:
            return None
        self._make_room()
        offset = entry & OFFSET_MASK
        data = self._file.read(offset, self._file.cluster_size, "L2 table")
        table = L2Table(offset, EntryTable(data), False)
        self._tables[l1_index] = table
        return table

    def _make_room(self) -> None:
        """Second chance: a table that was used since the last round goes to the end of the queue."""
        tables = self._tables
        while len(tables) >= self._cache_limit:
            l1_index = next(iter(tables))
            table = tables[l1_index]
            if table.referenced:
                table.referenced = False
                del tables[l1_index]
                tables[l1_index] = table
            else:
                if l1_index in self._dirty:
                    self.commit()
                del tables[l1_index]

    def lookup(self, offset: int, size: int) -> tuple[int, int, int]:
        """What is at guest `offset`: its kind, its host offset (COMPRESSED: its entry), and for how many
        bytes.

        The run is at most `size` bytes; DATA, UNALLOCATED and ZERO run over clusters, the others end with
        theirs.
        """
        file = self._file
        cluster_size = file.cluster_size
        cluster = offset >> file.cluster_bits
        index = cluster & self._index_mask
        within = offset & (cluster_size - 1)
        run = cluster_size - within
        table = self._tables.get(cluster >> self._l2_bits)
        if table is None:
            table = self._load(cluster >> self._l2_bits)
            if table is None:
                run += (self._index_mask - index) << file.cluster_bits
                return UNALLOCATED, 0, run if run < size else size
        table.referenced = True
        entries = table.entries
        entry = entries[index]
        if entry & self._foreign_bits == COPIED and entry != COPIED:
            kind = DATA
            host = entry & OFFSET_MASK
            self._check_data(host >> file.cluster_bits)
            step = cluster_size
        else:
            kind, host = self._classify(entry)
            if kind > ZERO:
                return kind, host + (within if kind != COMPRESSED else 0), run if run < size else size
            step = 0
        while run < size and index < self._index_mask:
            index += 1
            entry += step
            if entries[index] != entry:
                break
            if step:
                self._check_data((entry & OFFSET_MASK) >> file.cluster_bits)
            run += cluster_size
        return kind, host + within, run if run < size else size

    def _check_data(self, cluster: int) -> None:
        if cluster >= self._file.end:
            raise CorruptImage(f"a qcow2 L2 entry points to cluster {cluster}, outside the file")
        if self._file.is_metadata(cluster):
            raise CorruptImage(f"a qcow2 L2 entry points to cluster {cluster}, which holds metadata")

    def _classify(self, entry: int) -> tuple[int, int]:
        if entry & COMPRESSED_FLAG:
            if entry & COPIED:
                raise CorruptImage(
                    f"the qcow2 L2 entry {entry:#x} is compressed and yet to be written in place"
                )
            first, count = self.host_clusters(entry)
            for cluster in range(first, first + count):
                if cluster < self._file.end or cluster == first:
                    self._check_data(cluster)
            return COMPRESSED, entry
        host = entry & OFFSET_MASK
        if (
            entry & L2_RESERVED
            or host & (self._file.cluster_size - 1)
            or (entry & ZERO_FLAG and not self._has_zero_flag)
        ):
            raise CorruptImage(f"the qcow2 L2 entry {entry:#x} makes no sense")
        if not host:
            return (ZERO if entry & ZERO_FLAG else UNALLOCATED), 0
        self._check_data(host >> self._file.cluster_bits)
        if entry & ZERO_FLAG:
            # Without COPIED the cluster is not ours to write: as good as none.
            return (ZERO_ALLOCATED, host) if entry & COPIED else (ZERO, 0)
        return SHARED, host

    def compressed_extent(self, entry: int) -> tuple[int, int]:
        """Host offset and size in bytes, of at most whole sectors, of a compressed cluster."""
        shift = 70 - self._file.cluster_bits
        offset = entry & ((1 << shift) - 1)
        sectors = (entry >> shift & ((1 << (self._file.cluster_bits - 8)) - 1)) + 1
        return offset, sectors * 512 - (offset & 511)

    def compressed_entry(self, offset: int, size: int) -> int:
        """The L2 entry of a compressed cluster of `size` bytes at host `offset`: the sectors it touches."""
        sectors = ((offset + size - 1) >> 9) - (offset >> 9)
        return COMPRESSED_FLAG | sectors << 70 - self._file.cluster_bits | offset

    def host_clusters(self, entry: int) -> tuple[int, int]:
        """The host clusters a valid L2 entry refers to: the first and how many, 0 for none."""
        bits = self._file.cluster_bits
        if entry & COMPRESSED_FLAG:
            offset, size = self.compressed_extent(entry)
            return offset >> bits, ((offset + size - 1) >> bits) - (offset >> bits) + 1
        host = entry & OFFSET_MASK
        return host >> bits, 1 if host else 0

    def clusters_to_table_end(self, offset: int) -> int:
        """How many clusters from guest `offset` share one L2 table: what one `replace` may change."""
        return self._index_mask + 1 - (offset >> self._file.cluster_bits & self._index_mask)

    def _writable_table(self, l1_index: int) -> L2Table:
        table = self._tables.get(l1_index) or self._load(l1_index)
        if table is None:
            return self._new_table(l1_index)
        if not self._l1[l1_index] & COPIED:
            count = self._refcounts.get(table.offset >> self._file.cluster_bits)
            if count != 1:
                # Without snapshots, which are refused, an L2 table has one owner.
                raise CorruptImage(f"the qcow2 L2 table at {table.offset:#x} has refcount {count}")
            self._l1[l1_index] |= COPIED
            self._l1_dirty.add(l1_index)
        return table

    def _new_table(self, l1_index: int) -> L2Table:
        if l1_index >= self._l1_used:
            self._grow_l1()
        self._make_room()
        file = self._file
        first, _, _ = self._refcounts.allocate(1)
        offset = first << file.cluster_bits
        file.claim(offset, file.cluster_size, "L2 table")
        table = L2Table(offset, EntryTable(bytearray(file.cluster_size)), True)
        self._tables[l1_index] = table
        self._dirty.add(l1_index)
        self._l1[l1_index] = offset | COPIED
        self._l1_dirty.add(l1_index)
        return table

    def _grow_l1(self) -> None:
        """Give the L1 table in the file all the entries the disk needs: a new table, then the header, then
        the old.
        """
        self.commit()
        file = self._file
        size = len(self._l1) * 8
        clusters = -(-size >> file.cluster_bits)
        first = self._refcounts.allocate_adjacent(clusters)
        offset = first << file.cluster_bits
        file.claim(offset, size, "L1 table")
        file.write(offset, bytes(self._l1).ljust(clusters << file.cluster_bits, b"\0"))
        self._refcounts.write()
        file.extend()
        file.sync()
        file.write(L1_SIZE_FIELD, len(self._l1).to_bytes(4, "big") + offset.to_bytes(8, "big"))
        file.sync()
        old_offset, old_size = self._l1_offset, self._l1_used * 8
        self._l1_offset = offset
        self._l1_used = len(self._l1)
        if old_size:
            file.release(old_offset, old_size)
            self._refcounts.give_back(old_offset >> file.cluster_bits, -(-old_size >> file.cluster_bits))

    def grow(self, size: int) -> None:
        """Make the L1 table in the file long enough for a disk of `size` bytes."""
        needed = l1_entries(size, self._file.cluster_bits)
        if needed * 8 > MAX_L1_SIZE:
            raise ImageError(f"a qcow2 image with such clusters cannot have {size} bytes")
        missing = needed - len(self._l1)
        if missing > 0:
            self._l1 = EntryTable(bytearray(self._l1)).extended(missing).entries
        if needed > self._l1_used:
            self._grow_l1()

    def replace(self, offset: int, count: int, entry: int, step: int = 0) -> None:
        """Point `count` clusters from guest `offset` to `entry`, `entry + step`, ...; all in one L2 table.

        `step` is the cluster size for host clusters fresh from `allocate`, and 0 for all else. What they
        pointed to before is freed by the commit that makes this durable. After an OSError nothing points
        elsewhere than before.
        """
        bits = self._file.cluster_bits
        cluster = offset >> bits
        journal = self.journal
        if journal is not None and not journal.has_room(count):
            self.commit()
        first_entry = entry
        l1_index = cluster >> self._l2_bits
        table = self._writable_table(l1_index)
        start = cluster & self._index_mask
        entries = table.entries
        for index in range(start, start + count):
            old = entries[index]
            if old != entry:
                if old:
                    old_first, old_count = self.host_clusters(old)
                    if old_count and (old & COMPRESSED_FLAG or old_first != (entry & OFFSET_MASK) >> bits):
                        self._refcounts.free_later(old_first, old_count)
                entries[index] = entry
            entry += step
        if start < table.first:
            table.first = start
        if start + count > table.last:
            table.last = start + count
        self._dirty.add(l1_index)
        if journal is not None:
            journal.add(cluster, first_entry, count, step != 0)

    def entry(self, cluster: int) -> int:
        """The L2 entry of guest `cluster`."""
        l1_index = cluster >> self._l2_bits
        table = self._tables.get(l1_index) or self._load(l1_index)
        return table.entries[cluster & self._index_mask] if table else 0

    def check_entry(self, cluster: int, entry: int) -> None:
        """CorruptImage when `entry` cannot be guest `cluster`'s."""
        if cluster >= len(self._l1) << self._l2_bits:
            raise CorruptImage(f"cluster {cluster} is outside the qcow2 disk")
        self._classify(entry)

    def data_references(self) -> Iterator[tuple[int, int]]:
        """The host clusters of every L2 entry, checked: the first and how many.

        For repair, before any change.
        """
        for l1_index in range(len(self._l1)):
            table = self._load_uncached(l1_index)
            for entry in table.entries if table else ():
                if entry:
                    self._classify(entry)
                    yield self.host_clusters(entry)

    def _load_uncached(self, l1_index: int) -> EntryTable | None:
        offset = self._l1[l1_index] & OFFSET_MASK
        if not offset:
            return None
        return EntryTable(self._file.read(offset, self._file.cluster_size, "L2 table"))

    def fix_copied_flags(self, refcounts: Refcounts) -> None:
        """Set COPIED where the count is 1 and nowhere else, straight in the file.

        For repair, with the dirty bit set.
        """
        file = self._file
        for l1_index in range(self._l1_used):
            table = self._load_uncached(l1_index)
            if table is None:
                continue
            before = bytes(table.data)
            for index, entry in enumerate(table.entries):
                first, count = self.host_clusters(entry)
                if count and not entry & COMPRESSED_FLAG:
                    flag = COPIED if refcounts.get(first) == 1 else 0
                    table.entries[index] = entry & ~COPIED | flag
            offset = self._l1[l1_index] & OFFSET_MASK
            if table.data != before:
                file.write(offset, table.data)
            if not self._l1[l1_index] & COPIED:
                self._l1[l1_index] |= COPIED
                file.write(self._l1_offset + l1_index * 8, self._l1[l1_index].to_bytes(8, "big"))

    def commit_if_large(self) -> None:
        """Bound what waits in memory."""
        if self._refcounts.pending > PENDING_LIMIT:
            self.commit()

    def commit(self) -> None:
        """Write all changes in the order the module describes.

        An error leaves them in memory, for another try.
        """
        refcounts = self._refcounts
        if not self.dirty:
            refcounts.write()
            return
        file = self._file
        refcounts.write()
        dirty = [(l1_index, self._tables[l1_index]) for l1_index in sorted(self._dirty)]
        for _, table in dirty:
            if table.new:
                file.write(table.offset, table.data)
        file.extend()
        file.sync()
        for _, table in dirty:
            if not table.new:
                changed = memoryview(table.data)[table.first * 8 : table.last * 8]
                file.write(table.offset + table.first * 8, changed)
        for l1_index in sorted(self._l1_dirty):
            file.write(self._l1_offset + l1_index * 8, self._l1[l1_index].to_bytes(8, "big"))
        file.sync()
        if self.journal is not None:
            # Before anything is freed: no record may name a cluster that is in use for something else.
            self.journal.clear()
        for _, table in dirty:
            table.new = False
            table.first = len(table.entries)
            table.last = 0
        self._dirty.clear()
        self._l1_dirty.clear()
        if refcounts.pending:
            refcounts.release()
            refcounts.write()
