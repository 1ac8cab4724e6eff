"""The front end's memory as a back end sees it: shared regions, and the names they go by. Worker process.

vhost-user.rst, "Memory access": descriptors hold guest-physical addresses, but SET_VRING_ADDR speaks in user
addresses, the front end's own. They are only names here: found in the table, never dereferenced.
"""

from __future__ import annotations

import ctypes
import os

from devices.errors import GuestError
from devices.memory import GuestMemory, MemoryRegion
from devices.vhost.messages import ProtocolError

MAX_REGIONS = 32  # what GET_MAX_MEM_SLOTS answers


class MemoryTable:
    """An owner of mappings. Changed only while no ring runs, since a queue keeps views of what it walks."""

    __slots__ = ("_regions", "guest")

    def __init__(self) -> None:
        self._regions: list[tuple[int, MemoryRegion]] = []
        self.guest = GuestMemory([])

    def __bool__(self) -> bool:
        return bool(self._regions)

    def add(self, gpa: int, size: int, user_address: int, offset: int, fd: int) -> None:
        """Map one region. Takes `fd` over in any case. Raises ProtocolError for a region that cannot be."""
        try:
            if len(self._regions) == MAX_REGIONS:
                raise ProtocolError(f"more than {MAX_REGIONS} memory regions")
            if user_address + size > 1 << 64:
                raise ProtocolError(f"memory region at user address {user_address:#x} wraps around")
            for base, other in self._regions:
                if user_address < base + other.size and base < user_address + size:
                    raise ProtocolError(f"memory regions overlap at user address {user_address:#x}")
            try:
                region = MemoryRegion(gpa, size, fd, offset)
            except (ValueError, OverflowError, OSError) as error:
                raise ProtocolError(f"memory region cannot be mapped: {error}") from None
        finally:
            os.close(fd)
        region.fd = -1  # the mapping keeps a duplicate of its own
        try:
            self.guest = GuestMemory([*self.guest.regions, region])
        except ValueError as error:
            region.close()
            raise ProtocolError(str(error)) from None
        self._regions.append((user_address, region))

    def remove(self, gpa: int, size: int, user_address: int) -> None:
        """Unmap one region. Raises ProtocolError when there is none like that."""
        for index, (base, region) in enumerate(self._regions):
            if base == user_address and region.gpa == gpa and region.size == size:
                del self._regions[index]
                self.guest = GuestMemory([region for _, region in self._regions])
                region.close()
                return
        raise ProtocolError(
            f"no memory region {gpa:#x}+{size:#x} at user address {user_address:#x} to remove"
        )

    def addresses(self) -> list[tuple[int, int]]:
        """Where each region is mapped in this process, and its size, in the order they were added."""
        return [
            (ctypes.addressof(ctypes.c_char.from_buffer(region.mapping)), region.size)
            for _, region in self._regions
        ]

    def guest_address(self, user_address: int) -> int:
        """The guest-physical address of a user address.

        Raises GuestError when it is in no region: the driver chose where its rings are, the front end only
        passed it on.
        """
        for base, region in self._regions:
            if base <= user_address < base + region.size:
                return region.gpa + user_address - base
        raise GuestError(f"user address {user_address:#x} is in no memory region")

    def close(self) -> None:
        """Unmap everything; the table can be filled again."""
        self.guest = GuestMemory([])
        while self._regions:
            self._regions.pop()[1].close()
