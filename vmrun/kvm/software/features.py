"""The CPUID leaves for a guest on a KVM without VMX or SVM, and why each differs from what KVM offers.

CPUID is not trapped in user mode: programs see the host's leaves and the host's XCR0 whatever is set here.
Only the guest's kernel sees these. So the kernel must be told of every vector state that programs can use, or
it would lose their registers at a context switch; and it must not be told of instructions the emulator does
not know.
"""

from vmrun.kvm import abi

# KVM here adds some of the host's features to whatever leaves it is given, also for the kernel. Linux leaves
# them alone
# when told by number (X86_FEATURE_... in arch/x86/include/asm/cpufeatures.h): SMAP, whose STAC and CLAC would
# be an exit
# each; ERMS and FSRM, where REP STOSB is one emulated step a byte and REP STOSQ moves eight; XSAVEOPT,
# XSAVEC, XGETBV1
# and XSAVES, as only the standard format of XSAVE is carried out.
KERNEL_PARAMETERS = "clearcpuid=308,297,580,320,321,322,323"

KVM_CPUID_FEATURES = 0x40000001
# KVM patches a hypercall instruction to the form that its hardware traps; here neither form is trapped, and a
# guest
# that uses one executes it for ever. So no feature that is a hypercall: PV_UNHALT, PV_SEND_IPI,
# PV_SCHED_YIELD,
# HC_MAP_GPA_RANGE (Documentation/virt/kvm/x86/cpuid.rst).
_HYPERCALL_FEATURES = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16

_FEATURE_XSAVE = 1 << 26  # leaf 1 ECX
_FEATURE_CX16 = 1 << 13
_FEATURE_AVX = 1 << 28
_FEATURE_AVX512F = 1 << 16  # leaf 7 EBX
_FEATURE_ERMS = 1 << 9
_FEATURE_SMAP = 1 << 20


def xsave_layout(entries: list[abi.kvm_cpuid_entry2]) -> tuple[int, dict[int, tuple[int, int]]]:
    """The vector states there are (a mask for XCR0), and offset and size of each from component 2 on (leaf
    0xD).
    """
    states = 0
    layout = {}
    for entry in entries:
        if entry.function == 0xD and entry.index == 0:
            states = entry.eax
        elif entry.function == 0xD and entry.index >= 2 and entry.eax:
            layout[entry.index] = (entry.ebx, entry.eax)
    return states, layout


def adjust_cpuid(entries: list[abi.kvm_cpuid_entry2]) -> None:
    """Change `entries`, KVM's supported leaves, in place."""
    states, _ = xsave_layout(entries)
    for entry in entries:
        if entry.function == 1:
            entry.ecx &= ~_FEATURE_CX16  # CMPXCHG16B is not emulated, and kernels use it in their allocators
            entry.ecx |= _FEATURE_XSAVE
            if states & 0x4:
                entry.ecx |= _FEATURE_AVX  # without it Linux leaves the YMM halves out of a context switch
        elif entry.function == 7 and entry.index == 0:
            # "Fast" REP MOVSB/STOSB is one emulated step a byte; REP MOVSQ moves eight.
            entry.ebx &= ~(_FEATURE_ERMS | _FEATURE_SMAP)
            if states & 0xE0:
                entry.ebx |= _FEATURE_AVX512F
        elif entry.function == KVM_CPUID_FEATURES:
            entry.eax &= ~_HYPERCALL_FEATURES
        elif entry.function == 0xD and entry.index == 1:
            entry.eax = 0  # no XSAVEOPT, XSAVEC, XGETBV(1), XSAVES: the standard format is all we carry out
