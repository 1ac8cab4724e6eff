"""python-kvm: Linux's KVM through ctypes, one class per kind of file descriptor. Usable alone; knows nothing
of vmrun.

    from vmrun.kvm import System

    with System() as kvm, kvm.create_vm() as vm:
        vm.set_memory(slot=0, gpa=0, size=len(ram), address=address_of(ram))
        with vm.create_vcpu(0) as vcpu:
            exit_reason = vcpu.run()

`abi` holds the kernel's structs and ioctl numbers under the kernel's own names (include/uapi/linux/kvm.h and
arch/x86/include/uapi/asm/kvm.h); `System` is /dev/kvm, `Vm` a machine, `Vcpu` a processor. `software`
finishes the instructions that a KVM without VMX or SVM leaves undone. The reference for every call is the
kernel's Documentation/virt/kvm/api.rst. x86-64 only.
"""

from vmrun.kvm.system import System
from vmrun.kvm.vcpu import Vcpu
from vmrun.kvm.vm import Vm

__all__ = ["System", "Vcpu", "Vm"]
