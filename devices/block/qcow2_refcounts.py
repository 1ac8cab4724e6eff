"""Reference counts of a qcow2 image's clusters, and with them allocation. Worker process.

QEMU docs/interop/qcow2.txt, "Host cluster management". The refcount table points to refcount blocks; a block
is an array of counts of 1 to 64 bits. A cluster that no block covers has count 0.

What may be on disk when: a count that is too high loses space, one that is too low loses data. So a count
goes up in the file before anything points to the cluster, and down only after nothing on stable storage does
(`release`, called by `ClusterMap.commit`). A changed block may therefore be written at any time, in any
order.
"""

from __future__ import annotations

import errno

from devices.block.qcow2_file import CorruptImage, EntryTable, Qcow2File
from devices.block.qcow2_header import MAX_REFCOUNT_TABLE_SIZE, REFCOUNT_TABLE_FIELD, Header
from devices.block.transfer import punch_hole

CACHE_BYTES = 8 << 20
TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00


class RefcountBlock:
    """One block in memory: `data` as on disk, and which of its bytes [first, last) the file does not have
    yet.
    """

    __slots__ = ("data", "first", "last", "offset")

    def __init__(self, offset: int, data: bytearray) -> None:
        self.offset = offset
        self.data = data
        self.first = len(data)
        self.last = 0


class Refcounts:
    """All counts of one image. Offsets in bytes, clusters as host cluster numbers."""

    __slots__ = (
        "_block_limit",
        "_blocks",
        "_bytes_end",
        "_dirty_table",
        "_file",
        "_hint",
        "_order",
        "_pending",
        "_table",
        "_table_offset",
        "block_bits",
    )

    def __init__(self, file: Qcow2File, header: Header) -> None:
        self._file = file
        self._order = header.refcount_order
        self.block_bits = file.cluster_bits + 3 - header.refcount_order
        self._table_offset = header.refcount_table_offset
        size = header.refcount_table_clusters << file.cluster_bits
        file.claim(self._table_offset, size, "refcount table")
        self._table = EntryTable(file.read(self._table_offset, size, "refcount table"))
        for entry in self._table.entries:
            if not entry:
                continue
            if entry & ~TABLE_OFFSET_MASK or entry & (file.cluster_size - 1):
                raise CorruptImage(f"the qcow2 refcount table entry {entry:#x} makes no sense")
            file.claim(entry, file.cluster_size, "refcount block")
        self._blocks: dict[int, RefcountBlock] = {}
        self._block_limit = max(4, CACHE_BYTES >> file.cluster_bits)
        self._dirty_table: set[int] = set()
        self._hint = 0
        self._bytes_end = 0
        self._pending: list[tuple[int, int]] = []

    def _block(self, index: int) -> RefcountBlock:
        block = self._blocks.get(index)
        if block is None:
            offset = self._table.entries[index]
            block = RefcountBlock(offset, self._file.read(offset, self._file.cluster_size, "refcount block"))
            self._remember(index, block)
        return block

    def _remember(self, index: int, block: RefcountBlock) -> None:
        if len(self._blocks) >= self._block_limit:
            oldest = next(iter(self._blocks))
            self._write_block(self._blocks[oldest])
            del self._blocks[oldest]
        self._blocks[index] = block

    def _write_block(self, block: RefcountBlock) -> None:
        if block.first < block.last:
            self._file.write(block.offset + block.first, memoryview(block.data)[block.first : block.last])
            block.first = len(block.data)
            block.last = 0

    def get(self, cluster: int) -> int:
        """How many references `cluster` has."""
        index = cluster >> self.block_bits
        if index >= len(self._table.entries) or not self._table.entries[index]:
            return 0
        return self._get(self._block(index), cluster & ((1 << self.block_bits) - 1))

    def _get(self, block: RefcountBlock, index: int) -> int:
        order = self._order
        if order < 3:
            bits = 1 << order
            position = index << order
            return block.data[position >> 3] >> (position & 7) & ((1 << bits) - 1)
        width = 1 << (order - 3)
        return int.from_bytes(block.data[index * width : (index + 1) * width], "big")

    def _set(self, block: RefcountBlock, index: int, count: int) -> None:
        order = self._order
        if order < 3:
            mask = (1 << (1 << order)) - 1
            position = index << order
            first = position >> 3
            last = first + 1
            shift = position & 7
            block.data[first] = block.data[first] & ~(mask << shift) | count << shift
        else:
            width = 1 << (order - 3)
            first = index * width
            last = first + width
            block.data[first:last] = count.to_bytes(width, "big")
        if first < block.first:
            block.first = first
        if last > block.last:
            block.last = last

    def _change(self, cluster: int, count: int) -> None:
        self._set(self._block(cluster >> self.block_bits), cluster & ((1 << self.block_bits) - 1), count)

    def set(self, cluster: int, count: int) -> None:
        """Overwrite a count, for repair. A block must cover `cluster`."""
        if count >> (1 << self._order):
            raise CorruptImage(f"qcow2 cluster {cluster} has {count} references, more than can be counted")
        self._change(cluster, count)

    def missing_blocks(self, clusters: int) -> list[int]:
        """The blocks that clusters 0 to `clusters` - 1 need and that are not there, for repair."""
        needed = -(-clusters >> self.block_bits)
        if needed > len(self._table.entries):
            raise CorruptImage(
                "the qcow2 refcount table is too small for the file: run qemu-img check -r all"
            )
        return [index for index in range(needed) if not self._table.entries[index]]

    def _find_free(self, block: RefcountBlock, start: int) -> int:
        """The first index from `start` with count 0, or -1."""
        count = 1 << self.block_bits
        if self._order < 3:
            for index in range(start, count):
                if not self._get(block, index):
                    return index
            return -1
        width = 1 << (self._order - 3)
        zero = bytes(width)
        position = block.data.find(zero, start * width)
        while position >= 0:
            # Zero bytes may straddle two counts.
            if position % width == 0:
                return position // width
            position = block.data.find(zero, position + 1)
        return -1

    def allocate(self, count: int) -> tuple[int, int, bool]:
        """Take up to `count` adjacent clusters: the first, how many (at least 1), and whether they read as
        zeroes.

        Nothing may point to them on disk before `ClusterMap.commit` has put their counts there.
        """
        mask = (1 << self.block_bits) - 1
        while True:
            index = self._hint >> self.block_bits
            if index >= len(self._table.entries):
                self._grow_table()
                continue
            if not self._table.entries[index]:
                self._new_block(index)
            block = self._block(index)
            start = self._find_free(block, self._hint & mask)
            if start >= 0:
                break
            self._hint = (index + 1) << self.block_bits
        first = index << self.block_bits | start
        taken = 1
        while taken < count and start + taken <= mask and not self._get(block, start + taken):
            taken += 1
        for cluster in range(first, first + taken):
            if self._file.is_metadata(cluster):
                # Handing it out would let the guest write over a table.
                raise CorruptImage(f"qcow2 cluster {cluster} holds metadata, but its refcount is 0")
        fresh = self._file.is_fresh(first)
        self._file.took(first, taken)
        for position in range(start, start + taken):
            self._set(block, position, 1)
        self._hint = first + taken
        return first, taken, fresh

    def allocate_bytes(self, size: int) -> int:
        """Room for a compressed cluster of `size` bytes, less than a cluster: its offset in the file.

        The next one goes right behind it, into the same host cluster, which then has a count for each.
        """
        bits = self._file.cluster_bits
        start = self._bytes_end
        room = -start & (self._file.cluster_size - 1)
        shared = start >> bits
        count = self.get(shared) if room else 0
        if not count or count + 1 >> (1 << self._order):
            room = 0
        if size > room:
            first, _, _ = self.allocate(1)
            if not room or first != shared + 1:
                start = first << bits
                room = 0
        if room:
            self._change(shared, count + 1)
        self._bytes_end = start + size
        return start

    def allocate_adjacent(self, count: int) -> int:
        """Exactly `count` adjacent clusters at the end of the file, for a table that may span refcount
        blocks.
        """
        file = self._file
        first = file.end
        while True:
            # Blocks that are missing for these clusters go right behind them, and may need blocks in their
            # turn.
            end = first + count
            missing = []
            index = first >> self.block_bits
            while index << self.block_bits < end:
                if index >= len(self._table.entries):
                    self._grow_table()
                    first = max(first, file.end)
                    break
                if not self._table.entries[index]:
                    missing.append(index)
                    end += 1
                index += 1
            else:
                busy = [cluster for cluster in range(first, end) if self.get(cluster)]
                if not busy:
                    break
                first = busy[-1] + 1
        file.took(first, end - first)
        for number, index in enumerate(missing):
            self.add_block(index, first + count + number)
        for cluster in range(first, end):
            self._change(cluster, 1)
        return first

    def restore(self, clusters: list[int]) -> None:
        """These data clusters were allocated by a worker that died before their counts reached the file."""
        for index in {cluster >> self.block_bits for cluster in clusters}:
            if index >= len(self._table.entries):
                raise CorruptImage("the qcow2 restart journal is not of this image")
            if not self._table.entries[index]:
                self._new_block(index)
        for cluster in clusters:
            if cluster >= self._file.end or self._file.is_metadata(cluster):
                raise CorruptImage("the qcow2 restart journal is not of this image")
            self._change(cluster, 1)

    def give_back(self, first: int, count: int) -> None:
        """Undo `allocate`: nothing ever pointed to these clusters."""
        for cluster in range(first, first + count):
            self._decrement(cluster)

    def _decrement(self, cluster: int) -> int:
        count = self.get(cluster)
        if count == 0 or self._file.is_metadata(cluster):
            raise CorruptImage(f"freeing qcow2 cluster {cluster}: it is not in use as data")
        count -= 1
        self._change(cluster, count)
        if not count:
            self._hint = min(self._hint, cluster)
            if cluster == self._bytes_end >> self._file.cluster_bits:
                self._bytes_end = 0
        return count

    def free_later(self, first: int, count: int) -> None:
        """Drop one reference to each of `count` clusters, once no table on disk points to them any more."""
        pending = self._pending
        if pending and pending[-1][0] + pending[-1][1] == first:
            pending[-1] = (pending[-1][0], pending[-1][1] + count)
        else:
            pending.append((first, count))

    @property
    def pending(self) -> int:
        """How many runs wait to be freed."""
        return len(self._pending)

    def release(self) -> None:
        """Free what `free_later` collected.

        Only right after the tables that no longer point there are durable.
        """
        while self._pending:
            first, count = self._pending.pop()
            hole = first
            for cluster in range(first, first + count):
                if self._decrement(cluster):
                    self._punch(hole, cluster)
                    hole = cluster + 1
            self._punch(hole, first + count)

    def _punch(self, first: int, end: int) -> None:
        bits = self._file.cluster_bits
        if first < end:
            punch_hole(self._file.fd, first << bits, (end - first) << bits)

    def write(self) -> None:
        """Bring all changed counts to the file. New blocks are durable before the table points to them."""
        for block in self._blocks.values():
            self._write_block(block)
        if self._dirty_table:
            self._file.extend()
            self._file.sync()
            for index in sorted(self._dirty_table):
                self._file.write(
                    self._table_offset + index * 8, self._table.entries[index].to_bytes(8, "big")
                )
            self._dirty_table.clear()

    def _new_block(self, index: int) -> None:
        """Make block `index`, in the first cluster it covers: all of them have count 0."""
        first = index << self.block_bits
        if self._file.is_metadata(first):
            raise CorruptImage(f"qcow2 cluster {first} holds metadata, but no refcount block covers it")
        self._file.took(first, 1)
        self.add_block(index, first)
        self._change(first, 1)

    def add_block(self, index: int, cluster: int) -> None:
        """Let new block `index` live in `cluster`, which is free; the caller counts the cluster itself."""
        offset = cluster << self._file.cluster_bits
        block = RefcountBlock(offset, bytearray(self._file.cluster_size))
        self._file.claim(offset, self._file.cluster_size, "refcount block")
        # Whatever the cluster held before, all of the block must reach the file.
        block.first = 0
        block.last = len(block.data)
        self._table.entries[index] = offset
        self._dirty_table.add(index)
        self._remember(index, block)

    def _grow_table(self) -> None:
        """Move the refcount table to a larger place: behind everything the old one can describe.

        New blocks and the new table are durable before the header, written as one sector, points to them.
        """
        file = self._file
        bits = file.cluster_bits
        old_entries = len(self._table.entries)
        first = old_entries << self.block_bits
        clusters = 2 * (old_entries * 8 >> bits)
        if clusters << bits > MAX_REFCOUNT_TABLE_SIZE:
            raise OSError(errno.EFBIG, "the qcow2 refcount table cannot grow any more")
        blocks = 1
        while blocks << self.block_bits < blocks + clusters:
            blocks += 1
        for cluster in range(first, first + blocks + clusters):
            if file.is_metadata(cluster):
                raise CorruptImage(f"qcow2 cluster {cluster} holds metadata, but no refcount block covers it")
        file.took(first, blocks + clusters)
        table = self._table.extended((clusters << bits) // 8 - old_entries)
        for number in range(blocks):
            offset = (first + number) << bits
            block = RefcountBlock(offset, bytearray(file.cluster_size))
            start = number << self.block_bits
            for index in range(min(1 << self.block_bits, blocks + clusters - start)):
                self._set(block, index, 1)
            file.write(offset, block.data)
            table.entries[old_entries + number] = offset
        for dirty in self._blocks.values():
            self._write_block(dirty)
        table_offset = (first + blocks) << bits
        file.write(table_offset, table.data)
        file.extend()
        file.sync()
        file.write(REFCOUNT_TABLE_FIELD, table_offset.to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        file.sync()
        file.claim(first << bits, (blocks + clusters) << bits, "refcount table")
        old_offset = self._table_offset
        self._table = table
        self._table_offset = table_offset
        self._dirty_table.clear()
        file.release(old_offset, old_entries * 8)
        self.give_back(old_offset >> bits, old_entries * 8 >> bits)
