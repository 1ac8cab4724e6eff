"""`vmrun disk convert`: a whole disk, backing files and all, as one new sparse image. User side of the VMM
process.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from devices.block.extents import extents
from devices.block.image import Image
from devices.block.open import open_image
from devices.block.qcow2 import Qcow2Image
from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_header import COMPRESSION_ZLIB, COMPRESSION_ZSTD
from vmrun.disk.create import DEFAULT_CLUSTER_SIZE
from vmrun.disk.files import image_errors, image_format, open_chain
from vmrun.errors import UserError
from vmrun.host.new_file import new_file
from vmrun.machine.config import DiskConfig

CHUNK = 2 << 20  # read at once; a multiple of every granularity
RAW_GRANULARITY = 4096  # zeroes of fewer bytes in a raw file save nothing
COMPRESSIONS = {"zlib": COMPRESSION_ZLIB, "zstd": COMPRESSION_ZSTD}
# The window of 4 KiB that QEMU deflates and inflates with: a reader may count on no larger one being needed.
QEMU_WINDOW_BITS = 12

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def convert(
    source: DiskConfig,
    path: Path,
    fmt: str | None = None,
    cluster_size: int | None = None,
    compression: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the disk of `source` to the new image `path`, and return its size in bytes.

    `compression` is None, "zlib" or "zstd"; what does not shrink is written as it is.
    """
    fmt = image_format(path, fmt, "--to")
    if fmt == "raw" and (cluster_size is not None or compression is not None):
        what = "compressed" if compression is not None else "made of clusters"
        raise UserError(f"{path}: a raw image cannot be {what}: make it qcow2 (--to qcow2)")
    if compression is not None and compression not in COMPRESSIONS:
        raise UserError(f"--compression {compression}: give one of {', '.join(COMPRESSIONS)}")
    granularity = RAW_GRANULARITY
    with open_chain(source) as (_, image), new_file(path) as fd, image_errors(path):
        if fmt == "raw":
            os.ftruncate(fd, image.size)
        else:
            granularity = cluster_size or DEFAULT_CLUSTER_SIZE
            create_qcow2(fd, image.size, granularity, compression_type=COMPRESSIONS[compression or "zlib"])
        target = _open_target(fmt, fd)
        try:
            _copy(image, target, granularity, compression, progress)
        finally:
            target.close()
        return image.size


def _open_target(fmt: str, fd: int) -> Image:
    duplicate = os.dup(fd)
    try:
        return open_image(fmt, duplicate, False)
    except BaseException:
        os.close(duplicate)
        raise


def _copy(
    image: Image, target: Image, granularity: int, compression: str | None, progress: Progress | None
) -> None:
    compress = _compressor(compression) if compression is not None else None
    buffer = bytearray(CHUNK)
    zeroes = bytes(CHUNK)
    for start, size in data_pieces(image, granularity):
        piece = memoryview(buffer)[:size]
        image.readv(start, [piece])
        # Comparing views is slow, comparing bytes is memcmp.
        runs = () if size == CHUNK and buffer == zeroes else nonzero_runs(piece, granularity)
        for first, end in runs:
            if compress is not None and isinstance(target, Qcow2Image):
                _write_compressed(target, start + first, piece[first:end], granularity, compress)
            else:
                target.writev(start + first, [piece[first:end]])
        if progress is not None:
            progress(start + size, image.size)
    if progress is not None:
        progress(image.size, image.size)


def data_pieces(image: Image, granularity: int) -> Iterator[tuple[int, int]]:
    """Offset and size, at most CHUNK, of what may hold data: whole blocks of `granularity`, but for the end
    of the disk, each once.
    """
    done = 0
    for extent in extents(image):
        if not extent.is_data:
            continue
        start = max(done, extent.start // granularity * granularity)
        done = min(image.size, -(-(extent.start + extent.length) // granularity) * granularity)
        for offset in range(start, done, CHUNK):
            yield offset, min(CHUNK, done - offset)


def nonzero_runs(piece: memoryview, granularity: int) -> Iterator[tuple[int, int]]:
    """Start and end of each run of blocks that are not all zeroes."""
    zeroes = bytes(granularity)
    size = len(piece)
    start = -1
    for offset in range(0, size, granularity):
        block = bytes(piece[offset : offset + granularity])
        zero = block == zeroes if len(block) == granularity else not any(block)
        if zero and start >= 0:
            yield start, offset
            start = -1
        elif not zero and start < 0:
            start = offset
    if start >= 0:
        yield start, size


def _write_compressed(
    target: Qcow2Image,
    offset: int,
    data: memoryview,
    cluster_size: int,
    compress: Callable[[bytes], bytes],
) -> None:
    for start in range(0, len(data), cluster_size):
        part = data[start : start + cluster_size]
        stream = compress(bytes(part).ljust(cluster_size, b"\0"))
        if len(stream) < cluster_size:
            target.write_compressed(offset + start, stream)
        else:
            target.writev(offset + start, [part])


def _compressor(compression: str) -> Callable[[bytes], bytes]:
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress
    import zlib

    def deflate(data: bytes) -> bytes:
        stream = zlib.compressobj(wbits=-QEMU_WINDOW_BITS)
        return stream.compress(data) + stream.flush()

    return deflate
