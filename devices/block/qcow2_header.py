"""The qcow2 header: read, checked, and never believed (QEMU docs/interop/qcow2.txt, "Header").

VMM and worker.

Every number in it comes from whoever made the image. `Header` is what is left after all checks that need
nothing but the header itself and the size of the file.
"""

from __future__ import annotations

import os
import struct

from devices.errors import ImageError

MAGIC = 0x514649FB  # "QFI\xfb"

# Byte offsets of the fields that are rewritten in place.
SIZE_FIELD = 24  # u64
L1_SIZE_FIELD = 36  # u32, followed at 40 by the u64 l1_table_offset
REFCOUNT_TABLE_FIELD = 48  # u64 offset, followed at 56 by the u32 number of clusters
INCOMPATIBLE_FIELD = 72
AUTOCLEAR_FIELD = 88

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0

EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_BITMAPS = 0x23852875

COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
# The same limits as QEMU's (block/qcow2.h): a table larger than this is an attack on our memory.
MAX_L1_SIZE = 32 << 20
MAX_REFCOUNT_TABLE_SIZE = 8 << 20
MAX_BACKING_NAME = 1023
# Our own: bounds the map of metadata clusters to 32 MiB. 16 TiB of file with clusters of 64 KiB.
MAX_HOST_CLUSTERS = 1 << 28

V2 = struct.Struct(">IIQIIQIIQQIIQ")
V3 = struct.Struct(">QQQII")
V2_LENGTH = 72
V3_LENGTH = 104


def l1_entries(size: int, cluster_bits: int) -> int:
    """How many L1 entries a disk of `size` bytes needs. One covers cluster_size / 8 clusters."""
    return -(-size >> (2 * cluster_bits - 3))


class Header:
    """The checked header. Offsets and sizes in bytes unless the name says otherwise."""

    __slots__ = (
        "autoclear_features",
        "backing_file",
        "backing_format",
        "cluster_bits",
        "compatible_features",
        "compression_type",
        "has_bitmaps",
        "incompatible_features",
        "l1_size",
        "l1_table_offset",
        "nb_snapshots",
        "refcount_order",
        "refcount_table_clusters",
        "refcount_table_offset",
        "size",
        "version",
    )

    backing_file: str | None
    backing_format: str | None

    def __init__(self, fd: int) -> None:
        """Read and check the header of the image in `fd`. ImageError names the first thing that is wrong."""
        start = os.pread(fd, 1 << MAX_CLUSTER_BITS, 0)
        if len(start) < V2_LENGTH or int.from_bytes(start[:4], "big") != MAGIC:
            raise ImageError("not a qcow2 image")
        (
            _,
            self.version,
            backing_offset,
            backing_size,
            self.cluster_bits,
            self.size,
            crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            _,
        ) = V2.unpack_from(start)
        if self.version not in (2, 3):
            raise ImageError(f"qcow2 version {self.version} is unknown")
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            raise ImageError(f"qcow2 cluster_bits {self.cluster_bits} is not 9 to 21")
        if crypt_method:
            raise ImageError("encrypted qcow2 images are not supported")
        start = start[: 1 << self.cluster_bits]
        self._read_features(start)
        self._read_extensions(start, backing_offset)
        self._read_backing_name(start, backing_offset, backing_size)
        self._check_tables(os.lseek(fd, 0, os.SEEK_END))

    @property
    def length(self) -> int:
        return V2_LENGTH if self.version == 2 else V3_LENGTH

    def _read_features(self, start: bytes) -> None:
        self.incompatible_features = self.compatible_features = self.autoclear_features = 0
        self.refcount_order = 4
        self.compression_type = COMPRESSION_ZLIB
        if self.version == 2:
            return
        if len(start) < V3_LENGTH:
            raise ImageError("the qcow2 header is cut off")
        (
            self.incompatible_features,
            self.compatible_features,
            self.autoclear_features,
            self.refcount_order,
            length,
        ) = V3.unpack_from(start, V2_LENGTH)
        if not V3_LENGTH <= length <= len(start) or length % 8:
            raise ImageError(f"qcow2 header_length {length} makes no sense")
        if self.refcount_order > 6:
            raise ImageError(f"qcow2 refcount_order {self.refcount_order} is more than 6")
        features = self.incompatible_features
        if features & INCOMPATIBLE_DATA_FILE:
            raise ImageError("qcow2 images with an external data file are not supported")
        if features & INCOMPATIBLE_EXTENDED_L2:
            raise ImageError("qcow2 images with extended L2 entries are not supported")
        if features >> 5:
            raise ImageError(f"qcow2 incompatible features {features & ~0x1F:#x} are unknown")
        if length > V3_LENGTH:
            self.compression_type = start[V3_LENGTH]
        if bool(features & INCOMPATIBLE_COMPRESSION) != (self.compression_type != COMPRESSION_ZLIB):
            raise ImageError("the qcow2 compression type and its feature bit contradict each other")
        if self.compression_type not in (COMPRESSION_ZLIB, COMPRESSION_ZSTD):
            raise ImageError(f"qcow2 compression type {self.compression_type} is unknown")

    def _read_extensions(self, start: bytes, backing_offset: int) -> None:
        self.backing_format = None
        self.has_bitmaps = False
        offset = V2_LENGTH if self.version == 2 else int.from_bytes(start[100:104], "big")
        end = backing_offset or len(start)
        if end > len(start):
            raise ImageError("the qcow2 backing file name is outside the first cluster")
        while offset + 8 <= end:
            kind, length = struct.unpack_from(">II", start, offset)
            if kind == EXTENSION_END:
                return
            offset += 8
            if length > end - offset:
                raise ImageError(f"the qcow2 header extension {kind:#x} is too long")
            if kind == EXTENSION_BACKING_FORMAT:
                self.backing_format = start[offset : offset + length].decode("ascii", "backslashreplace")
            elif kind == EXTENSION_BITMAPS:
                self.has_bitmaps = True
            offset += -(-length // 8) * 8

    def _read_backing_name(self, start: bytes, offset: int, size: int) -> None:
        self.backing_file = None
        if not offset:
            return
        if offset < self.length or not 1 <= size <= MAX_BACKING_NAME or offset + size > len(start):
            raise ImageError("the qcow2 backing file name is outside the first cluster")
        self.backing_file = os.fsdecode(start[offset : offset + size])
        if "\0" in self.backing_file:
            raise ImageError("the qcow2 backing file name has a zero byte in it")

    def _check_tables(self, file_size: int) -> None:
        cluster_size = 1 << self.cluster_bits
        if file_size >> self.cluster_bits > MAX_HOST_CLUSTERS:
            raise ImageError(f"the qcow2 file has more than {MAX_HOST_CLUSTERS} clusters")
        if self.size >= 1 << 63 or l1_entries(self.size, self.cluster_bits) * 8 > MAX_L1_SIZE:
            raise ImageError(f"the qcow2 disk of {self.size} bytes is too large for its clusters")
        if self.l1_size * 8 > MAX_L1_SIZE:
            raise ImageError(f"the qcow2 L1 table of {self.l1_size} entries is too large")
        if self.refcount_table_clusters << self.cluster_bits > MAX_REFCOUNT_TABLE_SIZE:
            raise ImageError(
                f"the qcow2 refcount table of {self.refcount_table_clusters} clusters is too large"
            )
        if not self.refcount_table_clusters:
            raise ImageError("the qcow2 image has no refcount table")
        for name, offset, size in (
            ("L1 table", self.l1_table_offset, self.l1_size * 8),
            (
                "refcount table",
                self.refcount_table_offset,
                self.refcount_table_clusters << self.cluster_bits,
            ),
        ):
            # An L1 table of no entries has no place.
            if size and (offset % cluster_size or offset < cluster_size or offset + size > file_size):
                raise ImageError(f"the qcow2 {name} at {offset:#x} is misaligned or outside the file")
