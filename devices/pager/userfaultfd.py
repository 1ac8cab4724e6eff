"""The kernel's userfaultfd: faults on missing pages of shared memory become messages. VMM, worker and pager.

Documentation/admin-guide/mm/userfaultfd.rst, ioctl_userfaultfd(2) and linux/userfaultfd.h. A userfaultfd
belongs to the address space of the process that made it, and every ioctl acts on that one, whoever calls it.
Ours come from /dev/userfaultfd, because KVM and preadv(2) fault in kernel mode.
"""

from __future__ import annotations

import fcntl
import os
import struct

from devices.memory import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "/dev/userfaultfd"

USERFAULTFD_IOC_NEW = 0xAA00
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04

UFFD_API = 0xAA
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFD_EVENT_PAGEFAULT = 0x12

uffdio_api = struct.Struct("=QQQ")  # api, features, ioctls
uffdio_range = struct.Struct("=QQ")  # start, len
uffdio_register = struct.Struct("=QQQQ")  # range, mode, ioctls
uffdio_copy = struct.Struct("=QQQQq")  # dst, src, len, mode, copy
uffdio_zeropage = struct.Struct("=QQQq")  # range, mode, zeropage
uffd_msg = struct.Struct("=B7xQQ8x")  # event, flags, address

_MESSAGES = 16  # as many as one read takes


def create(device_fd: int) -> int:
    """A userfaultfd of this process's address space, from an open /dev/userfaultfd. The caller's to close.
    Raises OSError.
    """
    fd = fcntl.ioctl(device_fd, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        api = bytearray(uffdio_api.pack(UFFD_API, UFFD_FEATURE_MISSING_SHMEM, 0))
        fcntl.ioctl(fd, UFFDIO_API, api)
    except BaseException:
        os.close(fd)
        raise
    return fd


def register(fd: int, address: int, size: int) -> None:
    """From now on, who touches a missing page of the range waits until somebody brings it in."""
    fcntl.ioctl(
        fd, UFFDIO_REGISTER, bytearray(uffdio_register.pack(address, size, UFFDIO_REGISTER_MODE_MISSING, 0))
    )


def unregister(fd: int, address: int, size: int) -> None:
    """The reverse. Who waits goes on, and gets zeros for what is missing."""
    fcntl.ioctl(fd, UFFDIO_UNREGISTER, uffdio_range.pack(address, size))


def wake(fd: int, address: int, size: int) -> None:
    """Whoever waits in the range tries again: it goes on, or is heard by `faults` once more."""
    fcntl.ioctl(fd, UFFDIO_WAKE, uffdio_range.pack(address, size))


def faults(fd: int) -> list[int]:
    """The addresses of faults not read yet, some of them; whoever reads one has to answer it."""
    try:
        data = os.read(fd, _MESSAGES * uffd_msg.size)
    except BlockingIOError:
        return []  # the faulting thread was killed in the meantime
    return [address for event, _, address in uffd_msg.iter_unpack(data) if event == UFFD_EVENT_PAGEFAULT]


def copy(fd: int, address: int, source: int, size: int) -> None:
    """Make every missing page of the range have the bytes at `source`, an address in the calling process.
    Pages that are there stay as they are. Whoever waits in the range goes on.
    """

    def step(done: int) -> int:
        request = bytearray(uffdio_copy.pack(address + done, source + done, size - done, 0, 0))
        try:
            fcntl.ioctl(fd, UFFDIO_COPY, request)
        except BlockingIOError:
            copied: int = uffdio_copy.unpack(request)[4]
            return max(0, copied)
        return size - done

    _fill(fd, address, size, step)


def zero(fd: int, address: int, size: int) -> None:
    """As `copy`, with zeros."""

    def step(done: int) -> int:
        request = bytearray(uffdio_zeropage.pack(address + done, size - done, 0, 0))
        try:
            fcntl.ioctl(fd, UFFDIO_ZEROPAGE, request)
        except BlockingIOError:
            zeroed: int = uffdio_zeropage.unpack(request)[3]
            return max(0, zeroed)
        return size - done

    _fill(fd, address, size, step)


def _fill(fd: int, address: int, size: int, step: Callable[[int], int]) -> None:
    """EAGAIN tells how far the kernel came before a page that was there, or that its address space was
    changing; EEXIST that the first page of what is left is there.
    """
    done = 0
    some_were_there = False
    while done < size:
        try:
            done += step(done)
        except FileExistsError:
            some_were_there = True
            done += PAGE_SIZE
    if some_were_there:
        # The kernel wakes for pages it filled. Others were brought in through another address space after
        # somebody began to wait for them in this one.
        wake(fd, address, size)
