"""The CPUID leaves of each vCPU: what KVM supports, made to agree about how many CPUs there are and which one
this is.

VMM process. Leaves: AMD64 APM volume 3 appendix E, Intel SDM volume 2 CPUID.
"""

from vmrun.kvm import abi

_LEAF_FEATURES = 0x1
_LEAF_CACHE = 0x4
_LEAF_TOPOLOGY = 0xB
_LEAF_AMD_SIZES = 0x80000008
_LEAF_AMD_CACHE = 0x8000001D
_LEAF_AMD_TOPOLOGY = 0x8000001E
_LEAF_KVM = 0x40000001
# ASYNC_PF, ASYNC_PF_VMEXIT and ASYNC_PF_INT (Documentation/virt/kvm/x86/cpuid.rst): a task of the guest's
# sleeps until KVM tells that its page is there. What it still has to tell is no part of what we save, so it
# is not relied on. And to switch tasks for a page costs an interpreted guest more than to wait for it.
_ASYNC_PAGE_FAULTS = 1 << 4 | 1 << 10 | 1 << 14
_HTT = 1 << 28  # leaf 1 EDX: more than one logical CPU in the package


def vcpu_leaves(supported: list[abi.kvm_cpuid_entry2], apic_id: int, cpus: int) -> list[abi.kvm_cpuid_entry2]:
    """Leaves for the vCPU `apic_id` of `cpus`: one package, one thread a core."""
    width = (cpus - 1).bit_length()
    leaves = []
    for entry in supported:
        if entry.function in (_LEAF_TOPOLOGY, _LEAF_CACHE, _LEAF_AMD_CACHE):
            continue  # the host's sharing of caches and cores means nothing to the guest
        leaf = abi.kvm_cpuid_entry2.from_buffer_copy(entry)
        if leaf.function == _LEAF_FEATURES:
            leaf.ebx = leaf.ebx & 0x0000FFFF | min(cpus, 255) << 16 | (apic_id & 0xFF) << 24
            leaf.edx = leaf.edx | _HTT if cpus > 1 else leaf.edx & ~_HTT
        elif leaf.function == _LEAF_AMD_SIZES:
            leaf.ecx = width << 12 | cpus - 1
        elif leaf.function == _LEAF_AMD_TOPOLOGY:
            leaf.eax, leaf.ebx, leaf.ecx = apic_id, apic_id, 0
        elif leaf.function == _LEAF_KVM:
            leaf.eax &= ~_ASYNC_PAGE_FAULTS
        leaves.append(leaf)
    for level, (shift, count, kind) in enumerate(((0, 1, 1), (width, cpus, 2), (0, 0, 0))):
        leaves.append(
            abi.kvm_cpuid_entry2(
                function=_LEAF_TOPOLOGY,
                index=level,
                flags=abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax=shift,
                ebx=count,
                ecx=kind << 8 | level,
                edx=apic_id,
            )
        )
    return leaves
