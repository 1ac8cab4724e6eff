"""Linear to guest-physical addresses in 64-bit mode, with the access rights a processor checks (SDM volume 3,
4.5).

KVM_TRANSLATE does not say whether a page may be written or reached from user mode, and an instruction that we
carry out for the guest must fault exactly where it would have: a kernel saves vector registers straight into
user memory and counts on the fault. The guest's tables are read as the guest left them; it may change them
while we walk, as it may on a real processor, and gets what it deserves.
"""

from collections.abc import Callable
from struct import Struct

PRESENT = 1 << 0
WRITABLE = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000

FAULT_PRESENT = 1 << 0  # page-fault error code: a protection violation rather than a missing page
FAULT_WRITE = 1 << 1
FAULT_USER = 1 << 2
FAULT_FETCH = 1 << 4

CR0_WP = 1 << 16
CR4_LA57 = 1 << 12

PhysicalView = Callable[[int, int], "memoryview | None"]  # (gpa, size) -> RAM, or None where there is none

_ENTRY = Struct("<Q")


class PageFault(Exception):
    """The access faults: `address` goes to CR2, `error_code` on the stack of the guest's handler."""

    def __init__(self, address: int, error_code: int) -> None:
        super().__init__(f"page fault at {address:#x}, error code {error_code:#x}")
        self.address = address
        self.error_code = error_code


class NotCanonical(Exception):
    """The address is none that page tables can translate: #GP."""


def translate(view: PhysicalView, cr0: int, cr3: int, cr4: int, address: int, *, write: bool) -> int:
    """The guest-physical address of `address` for a supervisor access. Sets accessed and dirty bits as a
    processor does.

    Raises PageFault. Protection keys and SMAP are not looked at: the guest is not told of either.
    """
    fault = FAULT_WRITE if write else 0
    shift = 48 if cr4 & CR4_LA57 else 39
    table = cr3 & ADDRESS
    writable = True
    while True:
        entry_view = view(table + (address >> shift & 0x1FF) * 8, 8)
        if entry_view is None:
            raise PageFault(address, fault)
        entry: int = _ENTRY.unpack_from(entry_view)[0]
        if not entry & PRESENT:
            raise PageFault(address, fault)
        writable = writable and bool(entry & WRITABLE)
        leaf = shift == 12 or (shift in (21, 30) and entry & LARGE)
        if leaf and write and not writable and cr0 & CR0_WP:
            raise PageFault(address, fault | FAULT_PRESENT)
        marked = entry | ACCESSED | (DIRTY if leaf and write else 0)
        if marked != entry:
            _ENTRY.pack_into(entry_view, 0, marked)
        if leaf:
            offset = (1 << shift) - 1
            return (entry & ADDRESS & ~offset) | (address & offset)
        table = entry & ADDRESS
        shift -= 9


class LinearMemory:
    """Reads and writes at linear addresses under one set of control registers, page by page."""

    def __init__(self, view: PhysicalView, cr0: int, cr3: int, cr4: int) -> None:
        self._view = view
        self._control = (cr0, cr3, cr4)

    def _pieces(self, address: int, size: int, *, write: bool) -> list[memoryview]:
        pieces = []
        width = 57 if self._control[2] & CR4_LA57 else 48
        while size > 0:
            if (address >> width - 1) not in (0, (1 << 65 - width) - 1):
                raise NotCanonical
            length = min(size, 4096 - address % 4096)
            piece = self._view(translate(self._view, *self._control, address, write=write), length)
            if piece is None:  # the guest points at a hole or at a device: no instruction here works on those
                raise PageFault(address, FAULT_PRESENT | (FAULT_WRITE if write else 0))
            pieces.append(piece)
            address += length
            size -= length
        return pieces

    def read(self, address: int, size: int) -> bytes:
        return b"".join(self._pieces(address, size, write=False))

    def write(self, address: int, data: bytes) -> None:
        """All or nothing: every page is checked before the first byte is written."""
        position = 0
        for piece in self._pieces(address, len(data), write=True):
            piece[:] = data[position : position + len(piece)]
            position += len(piece)
