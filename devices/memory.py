"""Guest memory: guest-physical address -> bounds-checked memoryview. Used by the VMM and by every worker.

RAM is one or more regions of memfds, each mapped MAP_SHARED. A device only ever touches it through `view`,
the one place where an address the guest chose is checked. Python's slices clamp at the end instead of
failing, so nobody else may slice a region.
"""

import mmap
import os

from devices.errors import GuestError

PAGE_SIZE = 4096


class MemoryRegion:
    """A run of guest-physical addresses backed by `size` bytes of `fd` from `offset`. Owns its mapping, not
    the fd.
    """

    __slots__ = ("fd", "gpa", "mapping", "offset", "size", "view")

    def __init__(self, gpa: int, size: int, fd: int, offset: int) -> None:
        if size <= 0 or gpa < 0 or offset < 0 or gpa + size > 1 << 52:
            raise ValueError(f"memory region {gpa:#x}+{size:#x} at file offset {offset:#x} makes no sense")
        if os.fstat(fd).st_size < offset + size:
            # Touching a page past the end of the file would be SIGBUS, at a moment the guest chooses.
            raise ValueError(f"memory region {gpa:#x}+{size:#x} is longer than its file")
        self.gpa = gpa
        self.size = size
        self.fd = fd
        self.offset = offset
        self.mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, offset=offset)
        self.view = memoryview(self.mapping)

    def close(self) -> None:
        """Unmap. Raises BufferError while a view handed out earlier is still alive: queues are dropped
        first.
        """
        self.view.release()
        self.mapping.close()


class GuestMemory:
    """All RAM of one guest. Regions do not overlap; a view never spans two of them."""

    __slots__ = ("regions",)

    def __init__(self, regions: list[MemoryRegion]) -> None:
        self.regions = tuple(sorted(regions, key=lambda region: region.gpa))
        for lower, upper in zip(self.regions, self.regions[1:], strict=False):
            if lower.gpa + lower.size > upper.gpa:
                raise ValueError(f"memory regions overlap at {upper.gpa:#x}")

    def view(self, gpa: int, size: int) -> memoryview:
        """The `size` bytes at guest-physical `gpa`, writable and live: the guest may change them at any
        moment.

        Raises GuestError when any of it is not RAM (the PCI hole, past the end, across two regions).
        """
        found = self.find(gpa, size)
        if found is None:
            raise GuestError(f"guest address {gpa:#x}+{size:#x} is not RAM")
        return found

    def find(self, gpa: int, size: int) -> memoryview | None:
        """As `view`, but None where any of it is not RAM."""
        for region in self.regions:
            start = gpa - region.gpa
            if 0 <= start < region.size:
                end = start + size
                return region.view[start:end] if size >= 0 and end <= region.size else None
        return None

    def read(self, gpa: int, size: int) -> bytes:
        """A private copy: what a check must be made on."""
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.view(gpa, len(data))[:] = data

    def close(self) -> None:
        for region in self.regions:
            region.close()
