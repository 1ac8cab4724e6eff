"""/dev/kvm: what this kernel's KVM can do, and how machines are made. Documentation/virt/kvm/api.rst, "System
ioctls".
"""

import ctypes
import errno
import os
from types import TracebackType

from vmrun.kvm import abi
from vmrun.kvm.ioctl import ioctl
from vmrun.kvm.vcpu import read_cpuid
from vmrun.kvm.vm import Vm


class System:
    """Owns the descriptor of /dev/kvm. Raises OSError when it cannot be opened or speaks another API
    version.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        version = ioctl(self.fd, abi.KVM_GET_API_VERSION)
        if version != abi.KVM_API_VERSION:
            os.close(self.fd)
            raise OSError(errno.ENOTSUP, f"KVM speaks API version {version}, not {abi.KVM_API_VERSION}", path)

    def check_extension(self, capability: int) -> int:
        """0 when the capability is missing, else a positive number whose meaning is the capability's."""
        return ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability)

    def supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """The CPUID leaves that KVM can give a guest here."""
        return read_cpuid(self.fd, abi.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")

    def msr_indices(self) -> list[int]:
        """The model-specific registers that make up a vCPU's saved state."""
        limit = 1024
        buffer = (ctypes.c_uint32 * (1 + limit))(limit)
        ioctl(self.fd, abi.KVM_GET_MSR_INDEX_LIST, buffer, "KVM_GET_MSR_INDEX_LIST")
        return list(buffer[1 : 1 + buffer[0]])

    def create_vm(self) -> Vm:
        fd = ioctl(self.fd, abi.KVM_CREATE_VM, None, "KVM_CREATE_VM")
        return Vm(fd, ioctl(self.fd, abi.KVM_GET_VCPU_MMAP_SIZE))

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> "System":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
