"""Moving bytes between buffers and a descriptor: short transfers, IOV_MAX, the end of the file.

Worker process.

System calls used: preadv2, pwritev2 (what glibc makes of os.preadv and os.pwritev), fallocate.
"""

from __future__ import annotations

import ctypes
import errno
import os

IOV_MAX = 1024  # linux/uio.h UIO_MAXIOV
ZERO_CHUNK = 1 << 20

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

_ZEROES = memoryview(bytes(ZERO_CHUNK))

_fallocate = ctypes.CDLL(None, use_errno=True)["fallocate"]
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def total_size(buffers: list[memoryview]) -> int:
    """Bytes in all `buffers`, which are byte views."""
    if len(buffers) == 1:
        return buffers[0].nbytes
    size = 0
    for buffer in buffers:
        size += buffer.nbytes
    return size


def slice_buffers(buffers: list[memoryview], start: int, size: int) -> list[memoryview]:
    """Views of `size` bytes from byte `start` of the concatenated buffers."""
    views = []
    for buffer in buffers:
        length = buffer.nbytes
        if start >= length:
            start -= length
            continue
        if size <= 0:
            break
        view = buffer[start : start + size]
        views.append(view)
        size -= view.nbytes
        start = 0
    return views


def zero_views(size: int) -> list[memoryview]:
    """Read-only views of `size` zero bytes in all, for writing."""
    views = [_ZEROES] * (size // ZERO_CHUNK)
    if size % ZERO_CHUNK:
        views.append(_ZEROES[: size % ZERO_CHUNK])
    return views


def fill_zeroes(buffers: list[memoryview]) -> None:
    for buffer in buffers:
        for start in range(0, buffer.nbytes, ZERO_CHUNK):
            part = buffer[start : start + ZERO_CHUNK]
            part[:] = _ZEROES[: part.nbytes]


def read_into(fd: int, buffers: list[memoryview], offset: int, size: int) -> int:
    """Fill `buffers`, `size` bytes in all, from `offset`. Past the end of the file they get zeroes.

    Returns the number of bytes that came from the file.
    """
    if len(buffers) <= IOV_MAX:
        done = os.preadv(fd, buffers, offset)
        if done == size:
            return done
    else:
        done = 0
    while done < size:
        rest = slice_buffers(buffers, done, size - done)
        count = os.preadv(fd, rest[:IOV_MAX], offset + done)
        if count == 0:
            fill_zeroes(rest)
            break
        done += count
    return done


def write_from(fd: int, buffers: list[memoryview], offset: int, size: int) -> None:
    """Write all `buffers`, `size` bytes in all, at `offset`."""
    if len(buffers) <= IOV_MAX:
        done = os.pwritev(fd, buffers, offset)
        if done == size:
            return
    else:
        done = 0
    while done < size:
        rest = slice_buffers(buffers, done, size - done)
        count = os.pwritev(fd, rest[:IOV_MAX], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the host wrote nothing")
        done += count


def write_zero_bytes(fd: int, offset: int, size: int) -> None:
    """Write zeroes as data, the way that works everywhere."""
    while size > 0:
        count = min(size, ZERO_CHUNK)
        write_from(fd, [_ZEROES[:count]], offset, count)
        offset += count
        size -= count


def _try_fallocate(fd: int, mode: int, offset: int, size: int) -> bool:
    while _fallocate(fd, mode, offset, size) < 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        # ENOSYS and EPERM come from a sandbox, ENODEV and EINVAL from descriptors that have no holes.
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.EPERM):
            return False
        raise OSError(number, os.strerror(number))
    return True


def punch_hole(fd: int, offset: int, size: int) -> bool:
    """Give the space back: reads as zeroes. False when the host cannot; then nothing changed."""
    return _try_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)


def zero_range(fd: int, offset: int, size: int) -> bool:
    """Make it read as zeroes and keep the space. False when the host cannot; then nothing changed."""
    return _try_fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size)
