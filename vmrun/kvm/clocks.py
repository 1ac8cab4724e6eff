"""A machine's time: kvm-clock, and each vCPU's time-stamp counter (TSC) and its TSC deadline. VMM process.

Both clocks of a restored guest go on from where they stood, plus `elapsed` nanoseconds: 0, and the guest's
monotonic time shows no gap; the time since it was saved (`since_saved`), and a guest that derives the time of
day from them has it right. They move together, so a guest may compare them. What KVM_SET_CLOCK's
KVM_CLOCK_REALTIME does for kvm-clock alone is the latter.

The TSC is set through the offset that KVM adds to the host's (KVM_VCPU_TSC_OFFSET, Documentation/virt/kvm/
devices/vcpu.rst, Linux 5.16), for all vCPUs from one reading: their counters keep their distance to the
cycle, where writes of MSR_IA32_TSC, a moment apart, would only be guessed to mean the same. Offsets that are
equal also let KVM keep kvm-clock's stable mode, which programs read without a system call.

A KVM without VMX or SVM has no offset: user mode reads the host's counter natively, and KVM gives kernel mode
the same. There the TSC jumps ahead, as kvm-clock does not, or back after the host's reboot (`vmrun.kvm.
identity` refuses that). TSC deadlines are moved along.
"""

import time
from collections.abc import Sequence
from typing import Any

from vmrun.kvm import abi
from vmrun.kvm.packing import check_keys, check_number
from vmrun.kvm.vcpu import Vcpu
from vmrun.kvm.vm import Vm

MSR_IA32_TSC = 0x10
MSR_IA32_TSC_DEADLINE = 0x6E0
CLOCK_MSRS = (MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE)

_MASK64 = (1 << 64) - 1
_TOLERANCE_PPM = 250  # KVM's default: a frequency that near is taken for the host's own


def save_clocks(vm: Vm, vcpus: Sequence[Vcpu]) -> dict[str, Any]:
    """`realtime` and `kvm_clock` are nanoseconds; the rest is in cycles, all as of one moment."""
    return {
        "realtime": time.time_ns(),
        "kvm_clock": vm.get_clock().clock,
        "vcpus": _save_tscs(vcpus),
    }


def _save_tscs(vcpus: Sequence[Vcpu]) -> list[dict[str, int]]:
    first = vcpus[0]
    tsc, offset = first.get_msrs((MSR_IA32_TSC,))[MSR_IA32_TSC], first.get_tsc_offset()
    return [
        {
            "tsc": tsc + vcpu.get_tsc_offset() - offset & _MASK64,
            "tsc_khz": vcpu.get_tsc_khz(),
            "tsc_deadline": vcpu.read_msrs((MSR_IA32_TSC_DEADLINE,)).get(MSR_IA32_TSC_DEADLINE, 0),
        }
        for vcpu in vcpus
    ]


def load_clocks(vm: Vm, vcpus: Sequence[Vcpu], state: dict[str, Any], *, elapsed: int = 0) -> None:
    """Set the clocks of a machine whose vCPUs are loaded: a TSC deadline belongs to the local APIC's timer.

    Raises ValueError when the state is malformed, or asks for a frequency that cannot be had here.
    """
    check_keys(state, ("realtime", "kvm_clock", "vcpus"))
    check_number(state["realtime"], "realtime", 64)
    kvm_clock = check_number(state["kvm_clock"], "kvm_clock", 64)
    saved = _check_tscs(state["vcpus"])
    if len(saved) != len(vcpus):
        raise ValueError(f"the saved state has clocks of {len(saved)} vCPUs, not of {len(vcpus)}")
    for vcpu, tsc in zip(vcpus, saved, strict=True):
        khz = tsc["tsc_khz"]
        try:
            if vcpu.get_tsc_khz() != khz:
                vcpu.set_tsc_khz(khz)
        except OSError as error:
            raise ValueError(f"no time-stamp counter of {khz} kHz here: {error.strerror}") from None
    vm.set_clock(abi.kvm_clock_data(clock=kvm_clock + elapsed & _MASK64))
    wanted = [tsc["tsc"] + elapsed * tsc["tsc_khz"] // 1_000_000 for tsc in saved]
    first = vcpus[0]
    now, offset = first.get_msrs((MSR_IA32_TSC,))[MSR_IA32_TSC], first.get_tsc_offset()
    for vcpu, tsc_value in zip(vcpus, wanted, strict=True):
        vcpu.set_tsc_offset(offset + tsc_value - now & _MASK64)
    taken = first.get_tsc_offset() == offset + wanted[0] - now & _MASK64
    shift = 0 if taken else now - wanted[0]
    for vcpu, tsc in zip(vcpus, saved, strict=True):
        if tsc["tsc_deadline"]:
            # 0 would disarm it. One that is over fires at once.
            deadline = max(tsc["tsc_deadline"] + shift, 1) & _MASK64
            vcpu.set_msrs({MSR_IA32_TSC_DEADLINE: deadline})


def since_saved(state: dict[str, Any]) -> int:
    """Nanoseconds since `save_clocks` gave `state`; 0 when the host's clock says that was in the future."""
    return max(time.time_ns() - check_number(state.get("realtime"), "realtime", 64), 0)


def clock_difference(state: dict[str, Any], vcpu: Vcpu, *, software: bool, scaling: bool) -> str | None:
    """Why a machine with these saved clocks is not safe here, or None. `vcpu` is any of this host's;
    `software`: its KVM has no VMX or SVM; `scaling`: it has KVM_CAP_TSC_CONTROL.
    """
    saved = _check_tscs(state.get("vcpus"))
    here = vcpu.get_tsc_khz()
    for tsc in saved:
        if abs(tsc["tsc_khz"] - here) * 1_000_000 > here * _TOLERANCE_PPM and not scaling:
            return (
                f"its time-stamp counter runs at {tsc['tsc_khz']} kHz, this host's at {here} kHz "
                "and cannot be scaled"
            )
    if software and saved[0]["tsc"] > vcpu.get_msrs((MSR_IA32_TSC,))[MSR_IA32_TSC]:
        return (
            "this host's time-stamp counter is behind the one it was saved with (the host was started since, "
            "or it is another one), and this KVM cannot set the guest's"
        )
    return None


def _check_tscs(saved: object) -> list[dict[str, int]]:
    if not isinstance(saved, list) or not saved:
        raise ValueError("the saved state has no clocks of vCPUs")
    for tsc in saved:
        check_keys(tsc, ("tsc", "tsc_khz", "tsc_deadline"))
        check_number(tsc["tsc"], "tsc", 64)
        check_number(tsc["tsc_deadline"], "tsc_deadline", 64)
        check_number(tsc["tsc_khz"], "tsc_khz", 32)
    return saved
