"""Guest RAM: a sealed memfd, mapped here and handed to workers. VMM process; memfd_create(2), fcntl(2)
F_ADD_SEALS.
"""

import ctypes
import fcntl
import os
from types import TracebackType

from devices.memory import GuestMemory, MemoryRegion
from vmrun.errors import EXIT_VMM, UserError
from vmrun.kvm import Vm
from vmrun.machine.layout import FOUR_GIB, PCI_HOLE_START


class Ram:
    """`size` bytes of RAM with the PCI hole in them. Owns the memfd and the mappings; outlives the `Vm` that
    uses it.
    """

    def __init__(self, size: int) -> None:
        """Raises UserError when the host cannot give that much address space."""
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            # Sealed before anybody else gets it: a compromised worker that could truncate the file would have
            # the
            # VMM killed by SIGBUS at its next access.
            fcntl.fcntl(
                self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            low = min(size, PCI_HOLE_START)
            regions = [MemoryRegion(0, low, self.fd, 0)]
            if size > low:
                regions.append(MemoryRegion(FOUR_GIB, size - low, self.fd, low))
        except (OSError, ValueError) as error:
            os.close(self.fd)
            raise UserError(
                f"--mem: {size} bytes of guest memory cannot be had here: {error}", EXIT_VMM
            ) from None
        self.memory = GuestMemory(regions)
        # KVM wants addresses. These exports pin the mappings, so they are dropped before `memory` closes.
        self._pins = [ctypes.c_char.from_buffer(region.mapping) for region in self.memory.regions]

    def plug_into(self, vm: Vm) -> None:
        for slot, (region, pin) in enumerate(zip(self.memory.regions, self._pins, strict=True)):
            vm.set_memory(slot, region.gpa, region.size, ctypes.addressof(pin))

    @property
    def mappings(self) -> list[tuple[int, int, int]]:
        """Where each region is: (address in this process, size, offset in the memfd)."""
        return [
            (ctypes.addressof(pin), region.size, region.offset)
            for region, pin in zip(self.memory.regions, self._pins, strict=True)
        ]

    def close(self) -> None:
        self._pins.clear()
        try:
            self.memory.close()
        except BufferError:
            # The exception that ends the machine holds views in its traceback: the mappings go with those.
            pass
        os.close(self.fd)

    def __enter__(self) -> "Ram":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
