"""The kernel's structs in JSON-able state: as hex digits of their bytes, and checked before they are used
again. VMM process.

A saved state lies in a file that anybody may have cut off or edited: every name, type and size is looked at,
and what is wrong is a ValueError that names it.
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import TypeVar

from vmrun.kvm import abi

_Struct = TypeVar("_Struct", bound=ctypes.Structure)


def pack_cpuid(entries: Iterable[abi.kvm_cpuid_entry2]) -> list[str]:
    return [bytes(entry).hex() for entry in entries]


def unpack_cpuid(saved: object) -> list[abi.kvm_cpuid_entry2]:
    """Raises ValueError when `saved` is not what `pack_cpuid` gave."""
    if not isinstance(saved, list) or not saved:
        raise ValueError("the saved state has no CPUID leaves")
    return [unpack(abi.kvm_cpuid_entry2, digits) for digits in saved]


def unpack(struct: type[_Struct], digits: object) -> _Struct:
    """The `struct` whose bytes are `digits`. Raises ValueError when they are no digits, or not as many."""
    return struct.from_buffer_copy(unpack_bytes(struct.__name__, digits, ctypes.sizeof(struct)))


def unpack_bytes(name: str, digits: object, size: int) -> bytes:
    """The `size` bytes that `digits` are. Raises ValueError, with `name`, when they are not."""
    if not isinstance(digits, str):
        raise ValueError(f"{name} in the saved state is not a string of hex digits")
    try:
        data = bytes.fromhex(digits)
    except ValueError:
        raise ValueError(f"{name} in the saved state is not a string of hex digits") from None
    if len(data) != size:
        raise ValueError(f"{name} in the saved state has {len(data)} bytes; here it has {size}")
    return data


def check_keys(state: object, names: Sequence[str]) -> None:
    """Raises ValueError unless `state` is a dict with exactly these keys."""
    if not isinstance(state, dict):
        raise ValueError(f"the saved state is not an object with {', '.join(names)}")
    for name in names:
        if name not in state:
            raise ValueError(f"the saved state has no {name}")
    for name in state:
        if name not in names:
            raise ValueError(f"the saved state has a {name}, which this version does not know")


def check_number(value: object, name: str, bits: int) -> int:
    """`value`, when it is an unsigned number of `bits` bits; otherwise ValueError."""
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise ValueError(f"{name} in the saved state is not a number of {bits} bits")
    return value
