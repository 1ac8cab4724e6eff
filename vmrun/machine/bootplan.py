"""Which kernel, initramfs and command line a machine starts with: the user's, or the guest kit's. VMM
process.
"""

from dataclasses import dataclass
from pathlib import Path

from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.kvm.software import KERNEL_PARAMETERS
from vmrun.machine.config import MachineConfig


@dataclass(frozen=True, slots=True)
class BootPlan:
    """What is put into memory: two files and a text."""

    kernel: Path
    initrd: Path | None
    cmdline: str


def plan(config: MachineConfig, *, software_kvm: bool) -> BootPlan:
    """The user's kernel gets the user's command line; without one, the kit's kernel boots the first disk if
    there is one.

    Raises UserError when the kit is needed and not built.
    """
    if config.kernel is not None:
        kernel, initrd = config.kernel, config.initrd
        words = [config.cmdline if config.cmdline is not None else "console=ttyS0"]
    else:
        from vmrun.guestkit import kit  # a boot with --kernel does not need it

        found = kit.find()
        if found is None:
            raise UserError("no guest kit yet: run `vmrun guest build`, or give --kernel", EXIT_IMAGE)
        kernel = found.kernel
        initrd = config.initrd
        if initrd is None and not config.disks:
            initrd = found.initramfs
        words = [found.disk_cmdline if config.disks and initrd is None else found.default_cmdline]
        words.append(f"vmrun.host={config.name}")  # the kit's init and our agent take it; others never see it
        if config.cmdline:
            words.append(config.cmdline)
    if software_kvm:
        words.append(KERNEL_PARAMETERS)
    return BootPlan(kernel, initrd, " ".join(words))
