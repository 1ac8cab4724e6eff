"""The chip that firmware is in: an image that ends at 4 GiB, read-only for the guest. VMM process.

`Documentation/virt/kvm/api.rst`, KVM_MEM_READONLY: what the guest writes there exits as MMIO, and vanishes.
It is not in `GuestMemory`: no device reads or writes it.
"""

import ctypes
import mmap
from types import TracebackType

from vmrun.kvm import Vm, abi
from vmrun.machine.layout import FOUR_GIB


class Flash:
    """`image` is whole pages. Owns its mapping; outlives the `Vm` that uses it."""

    def __init__(self, image: bytes) -> None:
        self._mapping = mmap.mmap(-1, len(image))
        self._mapping[:] = image
        self._pin: ctypes.c_char | None = ctypes.c_char.from_buffer(self._mapping)

    def plug_into(self, vm: Vm, slot: int) -> None:
        if self._pin is None:
            raise ValueError("the flash is closed")
        size = len(self._mapping)
        vm.set_memory(slot, FOUR_GIB - size, size, ctypes.addressof(self._pin), abi.KVM_MEM_READONLY)

    def close(self) -> None:
        self._pin = None
        self._mapping.close()

    def __enter__(self) -> "Flash":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
