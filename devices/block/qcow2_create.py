"""Making an empty qcow2 image. VMM process or command line; QEMU docs/interop/qcow2.txt, "Header"."""

from __future__ import annotations

import os
import struct

from devices.block.qcow2_header import (
    COMPRESSION_ZLIB,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_END,
    INCOMPATIBLE_COMPRESSION,
    MAGIC,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_SIZE,
    MIN_CLUSTER_BITS,
    V2,
    V2_LENGTH,
    V3,
    V3_LENGTH,
    l1_entries,
)
from devices.block.transfer import write_from
from devices.errors import ImageError


def create_qcow2(
    fd: int,
    size: int,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    backing_file: str | None = None,
    backing_format: str | None = None,
    compression_type: int = COMPRESSION_ZLIB,
) -> None:
    """Make the empty regular file `fd` a qcow2 image of `size` bytes, durably.

    ImageError for values that cannot be.

    The header is written last: a file this was interrupted in is not a qcow2 image.
    """
    cluster_bits = cluster_size.bit_length() - 1
    refcount_order = refcount_bits.bit_length() - 1
    if cluster_size != 1 << cluster_bits or not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise ImageError(f"cluster size {cluster_size}: give a power of two from 512 to 2097152")
    if version not in (2, 3):
        raise ImageError(f"qcow2 version {version}: give 2 or 3")
    if refcount_bits != 1 << refcount_order or refcount_order > 6 or (version == 2 and refcount_order != 4):
        raise ImageError(f"refcount bits {refcount_bits}: give 1, 2, 4 ... 64, and 16 for version 2")
    if compression_type != COMPRESSION_ZLIB and version == 2:
        raise ImageError("qcow2 version 2 knows only zlib")
    l1_size = max(1, l1_entries(size, cluster_bits))
    if size < 0 or l1_size * 8 > MAX_L1_SIZE:
        raise ImageError(f"a disk of {size} bytes cannot be with clusters of {cluster_size} bytes")
    l1_clusters = -(-l1_size * 8 >> cluster_bits)

    # The header, the refcount table, its blocks, the L1 table. The blocks count all of it, themselves
    # included.
    counts_per_block = cluster_size * 8 >> refcount_order
    table_clusters = blocks = 1
    while True:
        used = 1 + table_clusters + blocks + l1_clusters
        if blocks * counts_per_block < used:
            blocks += 1
        elif table_clusters * cluster_size < blocks * 8:
            table_clusters += 1
        else:
            break
    first_block = 1 + table_clusters
    l1_offset = (first_block + blocks) << cluster_bits
    header = _header(
        cluster_bits,
        size,
        l1_size,
        l1_offset,
        table_clusters,
        version,
        refcount_order,
        backing_file,
        backing_format,
        compression_type,
    )
    table = b"".join(((first_block + number) << cluster_bits).to_bytes(8, "big") for number in range(blocks))
    os.ftruncate(fd, 0)
    os.ftruncate(fd, used << cluster_bits)
    for data, offset in (
        (table, cluster_size),
        (_ones(used, refcount_order), first_block << cluster_bits),
    ):
        write_from(fd, [memoryview(data)], offset, len(data))
    os.fsync(fd)
    write_from(fd, [memoryview(header)], 0, len(header))
    os.fsync(fd)


def _ones(count: int, refcount_order: int) -> bytes:
    """`count` refcounts of 1 in a row."""
    if refcount_order >= 3:
        return (1).to_bytes(1 << (refcount_order - 3), "big") * count
    per_byte = 8 >> refcount_order
    full = sum(1 << (position << refcount_order) for position in range(per_byte))
    rest = sum(1 << (position << refcount_order) for position in range(count % per_byte))
    return bytes([full]) * (count // per_byte) + bytes([rest])


def _header(
    cluster_bits: int,
    size: int,
    l1_size: int,
    l1_offset: int,
    table_clusters: int,
    version: int,
    refcount_order: int,
    backing_file: str | None,
    backing_format: str | None,
    compression_type: int,
) -> bytes:
    extensions = b""
    if backing_format is not None:
        name = backing_format.encode()
        padded = name.ljust(-(-len(name) // 8) * 8, b"\0")
        extensions += struct.pack(">II", EXTENSION_BACKING_FORMAT, len(name)) + padded
    extensions += struct.pack(">II", EXTENSION_END, 0)
    backing = os.fsencode(backing_file) if backing_file is not None else b""
    # The compression type is a field of its own behind those of version 3, padded to 8 bytes.
    compression = bytes([compression_type]).ljust(8, b"\0") if compression_type != COMPRESSION_ZLIB else b""
    length = (V2_LENGTH if version == 2 else V3_LENGTH) + len(compression)
    backing_offset = length + len(extensions) if backing else 0
    if len(backing) > MAX_BACKING_NAME or backing_offset + len(backing) > 1 << cluster_bits:
        raise ImageError(f"the name of the backing file is too long: {len(backing)} bytes")
    header = V2.pack(
        MAGIC,
        version,
        backing_offset,
        len(backing),
        cluster_bits,
        size,
        0,
        l1_size,
        l1_offset,
        1 << cluster_bits,
        table_clusters,
        0,
        0,
    )
    if version == 3:
        header += V3.pack(INCOMPATIBLE_COMPRESSION if compression else 0, 0, 0, refcount_order, length)
        header += compression
    return header + extensions + backing
