"""Finish what a KVM without VMX or SVM leaves undone, so that unmodified kernels and programs run on it.

Such a KVM (kvm_pvm, met in clouds without nested virtualization) runs the guest's user mode natively, but
interprets its kernel mode with KVM's instruction emulator, which knows only some instructions, and leaves
SYSCALL half-done. Both show as exits to user space; here is what to do about each. Nothing in this package is
used on a KVM with VMX/SVM.

    cpu        one object per vCPU: takes the exits, decides, resumes
    decode     enough of the instruction format to find an operand in memory
    paging     linear to guest-physical addresses, with the rights a processor would check
    xsave      XSAVE and XRSTOR over KVM_GET_XSAVE and KVM_SET_XSAVE
    features   the CPUID leaves to show such a guest, and why
"""

from vmrun.kvm.software.cpu import SoftwareCpu, prepare_vm
from vmrun.kvm.software.features import KERNEL_PARAMETERS, adjust_cpuid

__all__ = ["KERNEL_PARAMETERS", "SoftwareCpu", "adjust_cpuid", "prepare_vm"]
