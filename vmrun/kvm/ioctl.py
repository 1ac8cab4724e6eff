"""ioctl(2) as KVM needs it: through ctypes, because `fcntl.ioctl` cannot carry every KVM call.

`fcntl.ioctl` takes its integer argument as a signed C int (KVM_SET_TSS_ADDR does not fit), and from Python
3.14 on retries EINTR by itself, which would swallow the very signal that is meant to stop KVM_RUN.
`ctypes.CDLL` lets go of the GIL during the call, so vCPU threads run guests in parallel.
"""

import ctypes
import os
import sys
from typing import Any

if sys.byteorder != "little" or os.uname().machine != "x86_64":
    raise ImportError("vmrun.kvm is for x86-64 only")

_libc = ctypes.CDLL(None, use_errno=True)

# The bare call, for KVM_RUN's hot path: no exception, errno by ctypes.get_errno().
raw_ioctl = _libc["ioctl"]
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
raw_ioctl.restype = ctypes.c_int


def ioctl(fd: int, request: int, argument: Any = None, name: str = "") -> int:
    """Return what the kernel returns; raise OSError with errno, its text and `name` when that is negative.

    `argument` is None, an integer, an array, or `ctypes.byref` of a struct.
    """
    result: int = raw_ioctl(fd, request, argument)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name or hex(request)}: {os.strerror(error)}")
    return result
