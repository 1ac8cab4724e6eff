"""What KVM knows of a machine, as JSON-able dicts: saved from one `Vm`, loaded into a freshly built one. VMM
process.

Structs are kept under their kernel names as hex digits of their bytes; the kernel's ABI fixes both, so a
saved state outlives kernel versions. No vCPU runs meanwhile, and each was last left with KVM_EXIT_INTR: KVM
has completed the access that the guest was in the middle of, and taken the registers that we changed.

What must come before what is written down nowhere but in KVM's code (arch/x86/kvm/x86.c, lapic.c):

* KVM_GET_MP_STATE first: it takes pending INITs and SIPIs, which changes registers and the local APIC.
* SREGS before LAPIC, which wants APIC_BASE. Before MP_STATE too: registers that look like a reset's make the
  boot processor runnable.
* XCRS before XSAVE, whose components they allow.
* VCPU_EVENTS after REGS, which drop a pending exception.
* The LAPICs before the IOAPIC, whose pending interrupts are sent again as it is loaded.
* Time last; see `vmrun.kvm.clocks`.

Not here: memory, routes of interrupts, eventfds. Inputs of the interrupt controllers that a device holds high
are to be raised once more after loading (Vm.irq_line): who raised what, KVM does not tell. Nor machine-check
banks, as nothing here raises a machine check. Needs Linux 5.17, for KVM_GET_XSAVE2.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

from vmrun.kvm import abi
from vmrun.kvm.clocks import CLOCK_MSRS, load_clocks, save_clocks
from vmrun.kvm.ioctl import ioctl
from vmrun.kvm.packing import (
    check_keys,
    check_number,
    pack_cpuid,
    unpack,
    unpack_bytes,
    unpack_cpuid,
)
from vmrun.kvm.vcpu import Vcpu
from vmrun.kvm.vm import Vm

State = dict[str, Any]

_Part = tuple[type[ctypes.Structure], int, int]  # and the calls that get it and set it
# In the order in which they are loaded, after KVM_SET_CPUID2. The XSAVE area has a size of its own.
_PARTS: tuple[_Part, ...] = (
    (abi.kvm_regs, abi.KVM_GET_REGS, abi.KVM_SET_REGS),
    (abi.kvm_sregs2, abi.KVM_GET_SREGS2, abi.KVM_SET_SREGS2),
    (abi.kvm_xcrs, abi.KVM_GET_XCRS, abi.KVM_SET_XCRS),
    (abi.kvm_xsave, abi.KVM_GET_XSAVE2, abi.KVM_SET_XSAVE),
    (abi.kvm_debugregs, abi.KVM_GET_DEBUGREGS, abi.KVM_SET_DEBUGREGS),
    (abi.kvm_lapic_state, abi.KVM_GET_LAPIC, abi.KVM_SET_LAPIC),
)
_EVENTS: _Part = (abi.kvm_vcpu_events, abi.KVM_GET_VCPU_EVENTS, abi.KVM_SET_VCPU_EVENTS)
_CHIPS = (abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC)

# Memory types, which KVM_GET_MSR_INDEX_LIST leaves out: eight ranges, the fixed ones, and the default.
_MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
# Writing one of these has KVM write the time of day into guest memory, once; nothing reads them back. The
# guest has had its answer, and may use that memory for something else now.
_WALL_CLOCK_MSRS = (0x11, 0x4B564D00)
_SKIPPED_MSRS = frozenset((*CLOCK_MSRS, *_WALL_CLOCK_MSRS))


def save_machine(vm: Vm, vcpus: Sequence[Vcpu], msrs: Sequence[int]) -> State:
    """Everything below. `msrs` is System.msr_indices()."""
    return {
        "clocks": save_clocks(vm, vcpus),  # first: until the vCPUs are saved no time passes for the guest
        "vcpus": [save_vcpu(vcpu, msrs) for vcpu in vcpus],
        "vm": save_vm(vm),
    }


def load_machine(vm: Vm, vcpus: Sequence[Vcpu], state: State, *, elapsed: int = 0) -> None:
    """Load what `save_machine` gave into a machine of as many vCPUs, which have their CPUID leaves
    (`saved_cpuid`) and have never run. `elapsed` nanoseconds have passed for the guest meanwhile; see
    `vmrun.kvm.clocks`.

    Raises ValueError when the state is malformed, or holds what this KVM refuses.
    """
    check_keys(state, ("clocks", "vcpus", "vm"))
    if not isinstance(state["vcpus"], list) or len(state["vcpus"]) != len(vcpus):
        raise ValueError(f"the saved state is not that of a machine with {len(vcpus)} vCPUs")
    for vcpu, saved in zip(vcpus, state["vcpus"], strict=True):
        load_vcpu(vcpu, saved)
    load_vm(vm, state["vm"])
    load_clocks(vm, vcpus, state["clocks"], elapsed=elapsed)


def save_vcpu(vcpu: Vcpu, msrs: Sequence[int]) -> State:
    """One vCPU without its time. Raises RuntimeError when KVM has not taken its registers yet."""
    if vcpu.dirty_regs.value:
        raise RuntimeError("a vCPU is saved before KVM took the registers that were changed for it")
    state: State = {"mp_state": vcpu.get_mp_state(), "cpuid": pack_cpuid(vcpu.get_cpuid())}
    for struct, get, _ in (*_PARTS, _EVENTS):
        name = struct.__name__
        buffer = ctypes.create_string_buffer(_size(vcpu, struct))
        ioctl(vcpu.fd, get, buffer, f"KVM_GET {name}")
        state[name] = buffer.raw.hex()
    wanted = [index for index in (*msrs, *_MTRRS) if index not in _SKIPPED_MSRS]
    state["msrs"] = {f"{index:#x}": value for index, value in vcpu.read_msrs(wanted).items()}
    return state


def load_vcpu(vcpu: Vcpu, state: State) -> None:
    """Put what `save_vcpu` gave into a vCPU that has its CPUID leaves and never ran."""
    parts = (*_PARTS, _EVENTS)
    check_keys(state, ("mp_state", "cpuid", "msrs", *(struct.__name__ for struct, _, _ in parts)))
    images = {struct: _image(vcpu, state, struct) for struct, _, _ in parts}
    mp_state = check_number(state["mp_state"], "mp_state", 32)
    msrs = _check_msrs(state["msrs"])
    for struct, _, set_ in _PARTS:
        _set(vcpu, struct, set_, images[struct])
    _load_msrs(vcpu, msrs)
    _set(vcpu, abi.kvm_mp_state, abi.KVM_SET_MP_STATE, bytes(abi.kvm_mp_state(mp_state=mp_state)))
    struct, _, set_ = _EVENTS
    _set(vcpu, struct, set_, images[struct])


def saved_cpuid(state: State) -> list[abi.kvm_cpuid_entry2]:
    """The CPUID leaves of the vCPU that `state` was saved from: what the guest knows of its processor."""
    return unpack_cpuid(state.get("cpuid"))


def save_vm(vm: Vm) -> State:
    """The interrupt controllers and the PIT."""
    return {
        "irqchips": [bytes(vm.get_irqchip(chip)).hex() for chip in _CHIPS],
        abi.kvm_pit_state2.__name__: bytes(vm.get_pit()).hex(),
    }


def load_vm(vm: Vm, state: State) -> None:
    """Put what `save_vm` gave into a machine whose vCPUs are loaded."""
    check_keys(state, ("irqchips", abi.kvm_pit_state2.__name__))
    if not isinstance(state["irqchips"], list) or len(state["irqchips"]) != len(_CHIPS):
        raise ValueError(f"the saved state does not have {len(_CHIPS)} interrupt controllers")
    chips = [unpack(abi.kvm_irqchip, digits) for digits in state["irqchips"]]
    pit = unpack(abi.kvm_pit_state2, state[abi.kvm_pit_state2.__name__])
    if tuple(chip.chip_id for chip in chips) != _CHIPS:
        raise ValueError("the saved interrupt controllers are not those of a PC")
    for chip in chips:
        vm.set_irqchip(chip)
    vm.set_pit(pit)


def _size(vcpu: Vcpu, struct: type[ctypes.Structure]) -> int:
    return vcpu.xsave_size if struct is abi.kvm_xsave else ctypes.sizeof(struct)


def _image(vcpu: Vcpu, state: State, struct: type[ctypes.Structure]) -> bytes:
    return unpack_bytes(struct.__name__, state[struct.__name__], _size(vcpu, struct))


def _set(vcpu: Vcpu, struct: type[ctypes.Structure], request: int, image: bytes) -> None:
    try:
        ioctl(vcpu.fd, request, image, f"KVM_SET {struct.__name__}")
    except OSError as error:
        # The state may have been tampered with; what KVM thinks of it is the judgement.
        raise ValueError(f"KVM refuses the saved {struct.__name__}: {error.strerror}") from None


def _check_msrs(saved: object) -> dict[int, int]:
    if not isinstance(saved, dict):
        raise ValueError("msrs in the saved state is not an object")
    values = {}
    for name, value in saved.items():
        try:
            index = int(name, 16)
        except ValueError:
            raise ValueError(f"{name} in the saved state is not the number of an MSR") from None
        values[check_number(index, f"MSR {name}", 32)] = check_number(value, f"MSR {name}", 64)
    return values


def _load_msrs(vcpu: Vcpu, values: dict[int, int]) -> None:
    refused = vcpu.write_msrs(values)
    here = vcpu.read_msrs(refused)
    # Some can be read and not be set: what the processor is, rather than its state.
    wrong = [index for index in refused if here.get(index) != values[index]]
    if wrong:
        words = ", ".join(f"{index:#x} = {values[index]:#x}" for index in wrong)
        raise ValueError(f"KVM refuses saved model-specific registers: {words}")
