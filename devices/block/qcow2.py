"""qcow2 images, version 2 and 3, as a disk. Worker process. QEMU docs/interop/qcow2.txt.

What is promised. Killed at any moment, the file is what `qemu-img check` calls clean or at most leaked; so it
is after a power cut, as far as the host keeps its word on fdatasync. Everything completed before a `flush`
that returned is in the file. Writes completed after it reach the file's data at once, but the tables that
find them stay in memory until the next flush, or until the caches are full: they are lost with the process,
as a disk loses its cache, unless it was given a journal for the next one to replay (docs/qcow2.md).

Guest data never pass through Python: they go from guest memory to clusters that are no metadata, and no
decision is made on them.
"""

from __future__ import annotations

import errno
import os

from devices.block.image import ABSENT, ZEROES, Image
from devices.block.image import DATA as PRESENT
from devices.block.qcow2_compressed import CompressedReader
from devices.block.qcow2_file import CorruptImage, Qcow2File
from devices.block.qcow2_header import (
    AUTOCLEAR_FIELD,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_FIELD,
    SIZE_FIELD,
    Header,
)
from devices.block.qcow2_journal import Journal
from devices.block.qcow2_mapping import (
    COMPRESSED,
    COPIED,
    DATA,
    OFFSET_MASK,
    SHARED,
    UNALLOCATED,
    ZERO,
    ZERO_ALLOCATED,
    ZERO_FLAG,
    ClusterMap,
)
from devices.block.qcow2_refcounts import Refcounts
from devices.block.qcow2_repair import rebuild_refcounts
from devices.block.qcow2_replay import replay_journal
from devices.block.transfer import (
    ZERO_CHUNK,
    fill_zeroes,
    read_into,
    slice_buffers,
    total_size,
    write_from,
    zero_views,
)
from devices.errors import ImageError


class Qcow2Image(Image):
    """One qcow2 file over an optional `backing` image, which it owns and only reads."""

    __slots__ = ("_compressed", "_file", "_map", "_refcounts", "backing", "header")

    backing: Image | None

    def __init__(
        self, fd: int, read_only: bool, backing: Image | None = None, journal: int | None = None
    ) -> None:
        """ImageError when the image is damaged or needs something that is not supported; then `fd` and the
        others stay the caller's.

        Opened for writing, an image with the dirty bit has its refcounts rebuilt, and autoclear features are
        cleared.
        """
        header = Header(fd)
        if header.backing_file is not None and backing is None:
            raise ImageError(f"the qcow2 image needs its backing file {header.backing_file!r}")
        if header.backing_file is None and backing is not None:
            raise ImageError("the qcow2 image has no backing file, but was given one")
        self._compressed = CompressedReader(fd, header)
        if not read_only:
            if header.nb_snapshots:
                raise ImageError(
                    f"the qcow2 image has {header.nb_snapshots} internal snapshots: open it read-only, "
                    "or delete them with qemu-img snapshot -d"
                )
            if header.incompatible_features & INCOMPATIBLE_CORRUPT:
                raise ImageError("the qcow2 image is marked corrupt: run qemu-img check -r all")
        self.header = header
        self._file = Qcow2File(fd, header.cluster_bits)
        self._file.claim(0, 1, "header")
        self._refcounts = Refcounts(self._file, header)
        self._map = ClusterMap(self._file, header, self._refcounts)
        self.size = header.size
        self.read_only = read_only
        self.block_size = min(self._file.cluster_size, 4096)
        self.discard_granularity = self._file.cluster_size
        self.backing = backing
        if not read_only:
            self._prepare_for_writing()
        if journal is not None:
            if read_only:
                raise ImageError("an image that is open read-only has no restart journal")
            self._file.journal = Journal(journal)
            replay_journal(self._file.journal, self._file, self._refcounts, self._map)

    def _prepare_for_writing(self) -> None:
        header = self.header
        if header.incompatible_features & INCOMPATIBLE_DIRTY:
            if header.has_bitmaps:
                raise ImageError("the qcow2 image was not closed and has bitmaps: run qemu-img check -r all")
            rebuild_refcounts(self._file, self._refcounts, self._map)
            self._set_incompatible(header.incompatible_features & ~INCOMPATIBLE_DIRTY)
        if header.autoclear_features:
            # We keep none of what these promise, bitmaps for one: whoever does must find out before our first
            # write.
            self._file.write(AUTOCLEAR_FIELD, bytes(8))
            self._file.sync()
            header.autoclear_features = 0

    def _set_incompatible(self, features: int) -> None:
        self._file.write(INCOMPATIBLE_FIELD, features.to_bytes(8, "big"))
        self._file.sync()
        self.header.incompatible_features = features

    def _corrupt(self) -> None:
        """The tables contradict themselves: write nothing more, and tell the next one who opens the image."""
        if self.read_only:
            return
        self.read_only = True
        if self.header.version >= 3:
            try:
                self._set_incompatible(self.header.incompatible_features | INCOMPATIBLE_CORRUPT)
            except OSError:
                pass  # The request fails with the CorruptImage at hand, which says more.

    def readv(self, offset: int, buffers: list[memoryview]) -> None:
        size = total_size(buffers)
        self.check_range(offset, size)
        try:
            self._read(offset, buffers, size)
        except CorruptImage:
            self._corrupt()
            raise

    def _read(self, offset: int, buffers: list[memoryview], size: int) -> None:
        fd = self._file.fd
        done = 0
        while done < size:
            kind, host, run = self._map.lookup(offset + done, size - done)
            part = buffers if run == size else slice_buffers(buffers, done, run)
            if kind in (DATA, SHARED):
                read_into(fd, part, host, run)
            elif kind == COMPRESSED:
                self._read_compressed(offset + done, host, part)
            elif kind == UNALLOCATED and self.backing is not None:
                self._read_backing(offset + done, part, run)
            else:
                fill_zeroes(part)
            done += run

    def _read_compressed(self, offset: int, entry: int, buffers: list[memoryview]) -> None:
        data = memoryview(self._compressed.read(*self._map.compressed_extent(entry)))
        start = offset & (self._file.cluster_size - 1)
        for buffer in buffers:
            buffer[:] = data[start : start + buffer.nbytes]
            start += buffer.nbytes

    def _read_backing(self, offset: int, buffers: list[memoryview], size: int) -> None:
        backing = self.backing
        # A backing image may be shorter than the disk on top of it.
        inside = min(size, max(0, backing.size - offset)) if backing else 0
        if backing and inside:
            try:
                backing.readv(offset, buffers if inside == size else slice_buffers(buffers, 0, inside))
            except CorruptImage as error:
                # It is the backing image that is corrupt: this one must not be marked.
                raise ImageError(f"in a backing file: {error}") from None
        if inside < size:
            fill_zeroes(slice_buffers(buffers, inside, size - inside))

    def writev(self, offset: int, buffers: list[memoryview]) -> None:
        self.check_writable()
        size = total_size(buffers)
        self.check_range(offset, size)
        try:
            self._write(offset, buffers, size)
        except CorruptImage:
            self._corrupt()
            raise

    def _write(self, offset: int, buffers: list[memoryview], size: int) -> None:
        fd = self._file.fd
        done = 0
        while done < size:
            kind, host, run = self._map.lookup(offset + done, size - done)
            if kind == DATA:
                part = buffers if run == size else slice_buffers(buffers, done, run)
                write_from(fd, part, host, run)
            elif kind == ZERO_ALLOCATED:
                self._write_allocated(offset + done, slice_buffers(buffers, done, run), run, host)
            else:
                run = self._write_new(offset + done, slice_buffers(buffers, done, run), run, kind)
            done += run
        self._map.commit_if_large()

    def _write_allocated(self, offset: int, buffers: list[memoryview], size: int, host: int) -> None:
        """Write into a zero cluster that has a host cluster already: the rest of it becomes real zeroes."""
        cluster_size = self._file.cluster_size
        head = offset & (cluster_size - 1)
        padded = [*zero_views(head), *buffers, *zero_views(cluster_size - head - size)]
        write_from(self._file.fd, padded, host - head, cluster_size)
        self._map.replace(offset, 1, host - head | COPIED)

    def _write_new(self, offset: int, buffers: list[memoryview], size: int, kind: int) -> int:
        """Write to clusters that must be allocated first, as many as there are in a row.

        Returns the bytes written.
        """
        file = self._file
        cluster_size = file.cluster_size
        head = offset & (cluster_size - 1)
        count = min(-(-(head + size) >> file.cluster_bits), self._map.clusters_to_table_end(offset))
        # What the clusters held is read first: that may fail, and may evict tables.
        tail_start = offset + size
        tail = -tail_start & (cluster_size - 1)
        zero = kind == ZERO or (kind == UNALLOCATED and self.backing is None)
        head_data = [] if zero else self._old_data(offset - head, head)
        tail_data = [] if zero else self._old_data(tail_start, tail)
        first, taken, fresh = self._refcounts.allocate(count)
        if taken < count:
            # The last cluster we got is written whole, so there is no tail.
            size = (taken << file.cluster_bits) - head
            buffers = slice_buffers(buffers, 0, size)
            tail, tail_data = 0, []
        host = first << file.cluster_bits
        try:
            if zero and fresh:
                write_from(file.fd, buffers, host + head, size)
            else:
                if zero:
                    head_data, tail_data = zero_views(head), zero_views(tail)
                padded = [*head_data, *buffers, *tail_data]
                write_from(file.fd, padded, host, head + size + tail)
            self._map.replace(offset, taken, host | COPIED, cluster_size)
        except OSError:
            self._refcounts.give_back(first, taken)
            raise
        if kind == COMPRESSED:
            self._compressed.forget()
        return size

    def _old_data(self, offset: int, size: int) -> list[memoryview]:
        """`size` bytes as they are now, zeroes past the end of the disk."""
        if not size:
            return []
        data = memoryview(bytearray(size))
        inside = min(size, max(0, self.size - offset))
        if inside:
            self._read(offset, [data[:inside]], inside)
        return [data]

    def discard(self, offset: int, size: int) -> None:
        self.check_writable()
        self.check_range(offset, size)
        start, end = self._whole_clusters(offset, size)
        if self.backing is not None and self.header.version < 3:
            # Without a zero flag, letting go of a cluster would bring back what the backing file has there.
            return
        try:
            self._zero_clusters(start, end, unmap=True)
        except CorruptImage:
            self._corrupt()
            raise

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        self.check_writable()
        self.check_range(offset, size)
        start, end = self._whole_clusters(offset, size)
        try:
            if start >= end:
                self._write_zero_data(offset, offset + size)
                return
            self._write_zero_data(offset, start)
            if self.header.version >= 3 or (unmap and self.backing is None):
                self._zero_clusters(start, end, unmap)
            else:
                self._write_zero_data(start, end)
            self._write_zero_data(end, offset + size)
        except CorruptImage:
            self._corrupt()
            raise

    def _whole_clusters(self, offset: int, size: int) -> tuple[int, int]:
        """The part of the range that is whole clusters; the last one of the disk counts as whole without its
        end.
        """
        mask = self._file.cluster_size - 1
        start = (offset + mask) & ~mask
        end = offset + size
        if end < self.size:
            end &= ~mask
        return start, end

    def _write_zero_data(self, offset: int, end: int) -> None:
        """Write zeroes where something else would be read."""
        while offset < end:
            kind, _, run = self._map.lookup(offset, min(end - offset, ZERO_CHUNK))
            if kind not in (ZERO, ZERO_ALLOCATED) and not (kind == UNALLOCATED and self.backing is None):
                self._write(offset, zero_views(run), run)
            offset += run

    def _zero_clusters(self, start: int, end: int, unmap: bool) -> None:
        """Let whole clusters read as zeroes. Without `unmap` they keep the host clusters they have."""
        cluster_size = self._file.cluster_size
        # Where nothing lies below, having no cluster is as good as the zero flag, and version 2 has only
        # that.
        empty = 0 if self.backing is None else ZERO_FLAG
        offset = start
        while offset < end:
            kind, host, run = self._map.lookup(offset, end - offset)
            if kind == DATA and not unmap:
                run = min(run, cluster_size)
                self._map.replace(offset, 1, (host & OFFSET_MASK) | COPIED | ZERO_FLAG)
            elif (
                (kind == UNALLOCATED and empty)
                or kind in (DATA, SHARED, COMPRESSED)
                or (unmap and kind in (ZERO, ZERO_ALLOCATED))
            ):
                count = min(-(-run >> self._file.cluster_bits), self._map.clusters_to_table_end(offset))
                run = min(run, count << self._file.cluster_bits)
                self._map.replace(offset, count, empty)
                if kind == COMPRESSED:
                    self._compressed.forget()
            offset += run
            self._map.commit_if_large()

    def extent(self, offset: int, size: int) -> tuple[int, int, int]:
        try:
            kind, host, run = self._map.lookup(offset, size)
        except CorruptImage:
            self._corrupt()
            raise
        if kind in (DATA, SHARED):
            return PRESENT, host, run
        if kind == COMPRESSED:
            return PRESENT, -1, run
        if kind == ZERO_ALLOCATED:
            return ZEROES, host, run
        return (ZEROES if kind == ZERO else ABSENT), -1, run

    def write_compressed(self, offset: int, stream: bytes) -> None:
        """Make the cluster at `offset`, in which there is nothing yet, what `stream` decompresses to.

        The stream is of the image's compression type, holds a whole cluster, and is shorter than one.
        """
        self.check_writable()
        kind, _, _ = self._map.lookup(offset, 1)
        if kind != UNALLOCATED or offset % self._file.cluster_size or len(stream) >= self._file.cluster_size:
            raise ImageError(f"no compressed cluster can be written at {offset}")
        host = self._refcounts.allocate_bytes(len(stream))
        write_from(self._file.fd, [memoryview(stream)], host, len(stream))
        self._map.replace(offset, 1, self._map.compressed_entry(host, len(stream)))

    def empty(self) -> None:
        """Let go of all clusters: from now on everything is read from the backing image. Durable when this
        returns; interrupted, it has let go of some.
        """
        self.check_writable()
        if self.backing is None:
            raise ImageError("the qcow2 image has no backing file: emptied, it would lose its data")
        try:
            offset = 0
            while offset < self.size:
                kind, _, run = self._map.lookup(offset, self.size - offset)
                if kind != UNALLOCATED:
                    count = min(-(-run >> self._file.cluster_bits), self._map.clusters_to_table_end(offset))
                    self._map.replace(offset, count, 0)
                    self._map.commit_if_large()
                offset += run
            self._compressed.forget()
            self.flush()
        except CorruptImage:
            self._corrupt()
            raise

    def grow(self, size: int) -> None:
        self.check_growth(size)
        if size == self.size:
            return
        try:
            self._map.grow(size)
            before, self.size = self.size, size
            try:
                self._hide_old_data(before)
                self.flush()
                # Last of all: a disk that has its new size has its new tables.
                self._file.write(SIZE_FIELD, size.to_bytes(8, "big"))
                self._file.sync()
            except BaseException:
                self.size = before
                raise
            self.header.size = size
        except CorruptImage:
            self._corrupt()
            raise

    def _hide_old_data(self, before: int) -> None:
        """Zeroes where the last cluster or a longer backing image would show something past the old end."""
        cluster_end = -(-before // self._file.cluster_size) * self._file.cluster_size
        self._write_zero_data(before, min(cluster_end, self.size))
        end = min(self.size, self.backing.size) if self.backing is not None else 0
        if end > cluster_end:
            self.write_zeroes(cluster_end, end - cluster_end, unmap=False)

    def flush(self) -> None:
        if self.read_only:
            if self._map.dirty:
                # Corruption was found with changes still in memory: they will never be in the file.
                raise ImageError("the qcow2 image is damaged: the last writes are lost")
            return
        try:
            if self._map.dirty:
                self._map.commit()
            else:
                self._refcounts.write()
                self._file.sync()
        except CorruptImage:
            self._corrupt()
            raise

    def close(self) -> None:
        fd = self._file.fd
        if fd < 0:
            return
        try:
            self.flush()
        finally:
            self._file.fd = -1
            os.close(fd)
            if self._file.journal is not None:
                self._file.journal.close()
            if self.backing is not None:
                self.backing.close()

    def check_writable(self) -> None:
        if self.read_only:
            if self.header.incompatible_features & INCOMPATIBLE_CORRUPT:
                raise ImageError("the qcow2 image is damaged: run qemu-img check -r all")
            raise OSError(errno.EROFS, "the image is open read-only")
