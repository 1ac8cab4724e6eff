"""The state of a machine without its memory and disks, as JSON: taken and put back. VMM process.

The machine holds still: it is paused, or has not run yet. The order of loading matters: devices first, whose
interrupt lines move on the way; then processors and interrupt controllers, which know better; then the lines
that are high once more, since KVM does not tell who holds one; then what this KVM leaves to us.
"""

from typing import TYPE_CHECKING, Any

from devices.state import SavedState
from devices.vhost.messages import ProtocolError
from vmrun.kvm import abi
from vmrun.kvm.clocks import clock_difference, since_saved
from vmrun.kvm.state import load_machine, save_machine, saved_cpuid

if TYPE_CHECKING:
    from vmrun.machine.machine import Machine


def save_state(machine: "Machine") -> dict[str, Any]:
    """Raises OSError when a worker died meanwhile and is not back yet."""
    try:
        pci = machine.pci.save()
    except ProtocolError as error:
        raise OSError(str(error)) from None
    return {
        "kvm": save_machine(
            machine.board.vm, [thread.vcpu for thread in machine.vcpus], machine.msr_indices()
        ),
        "software": [thread.helper.save() for thread in machine.vcpus if thread.helper is not None],
        "platform": {name: device.save() for name, device in machine.platform.items()},
        "pci": pci,
    }


def saved_leaves(state: dict[str, Any], count: int) -> list[list[abi.kvm_cpuid_entry2]]:
    """The CPUID leaves that each of `count` vCPUs was saved with. ValueError when the state has others."""
    kvm = SavedState("processors", SavedState("machine", state).mapping("kvm"))
    vcpus = kvm.items("vcpus", count, count)
    if not all(isinstance(vcpu, dict) for vcpu in vcpus):
        raise ValueError("the saved processors are not described as such")
    return [saved_cpuid(vcpu) for vcpu in vcpus]


def check_clocks(machine: "Machine", state: dict[str, Any]) -> str | None:
    """Why the guest's clocks cannot go on here, in one sentence, or None. ValueError as above."""
    kvm = SavedState("processors", SavedState("machine", state).mapping("kvm"))
    return clock_difference(
        kvm.mapping("clocks"),
        machine.vcpus[0].vcpu,
        software=machine.vcpus[0].helper is not None,
        scaling=bool(machine.board.vm.check_extension(abi.KVM_CAP_TSC_CONTROL)),
    )


def load_state(machine: "Machine", state: dict[str, Any]) -> None:
    """Raises ValueError for a state that is none of this machine's. The guest's clocks go on as if it had run
    all the time.
    """
    saved = SavedState("machine", state)
    platform = saved.mapping("platform")
    if platform.keys() != machine.platform.keys():
        raise ValueError("the saved state has other devices on the board")
    for name, device in machine.platform.items():
        device.load(platform[name])
    machine.pci.load(saved.mapping("pci"))
    kvm = saved.mapping("kvm")
    clocks = SavedState("processors", kvm).mapping("clocks")
    load_machine(
        machine.board.vm, [thread.vcpu for thread in machine.vcpus], kvm, elapsed=since_saved(clocks)
    )
    machine.board.interrupts.assert_again()
    helpers = [thread.helper for thread in machine.vcpus if thread.helper is not None]
    for helper, helped in zip(helpers, saved.items("software", len(helpers), len(helpers)), strict=True):
        helper.load(helped)
