"""The exit codes vmrun promises, and the error that carries one. docs/guide.md lists them for users.

Host failures stay `OSError`; a guest's nonsense is `devices.errors.GuestError` and never ends the VMM.
"""

EXIT_USAGE = 64  # the command line, a config file, or the host's state asks for something that cannot be
EXIT_NO_KVM = 65  # /dev/kvm is missing, not ours to open, or too old
EXIT_IMAGE = 66  # a disk, kernel or initramfs is missing, damaged, locked, or not what it should be
EXIT_PANIC = 67  # the guest kernel panicked or its CPU triple-faulted
EXIT_TIMEOUT = 68  # --timeout ran out
EXIT_GUEST_MEMORY = 69  # `vmrun run`: the guest killed the command, or something of it, for want of memory
EXIT_VMM = 70  # vmrun itself, a worker or the host failed


class UserError(Exception):
    """Something the user can put right: one line that says what to do, and the documented exit code."""

    def __init__(self, message: str, code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.code = code
