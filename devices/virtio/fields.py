"""Named fields behind accesses of any width and offset, for the register layouts of virtio over PCI. VMM
process.

A driver must use each field's own width. Other widths do what the bytes say: a read puts together the fields
it covers, a write changes them, those it covers in part by read-modify-write, in order of their addresses.
"""

from collections.abc import Callable

Fields = tuple[tuple[int, int, str], ...]  # offset and width in bytes, name


def read_fields(fields: Fields, get: Callable[[str], int], offset: int, size: int) -> int:
    """The `size` bytes at `offset`; zeroes where no field is."""
    value = 0
    for start, width, name in fields:
        if start < offset + size and offset < start + width:
            field = get(name)
            value |= field << 8 * (start - offset) if start >= offset else field >> 8 * (offset - start)
    return value & (1 << (8 * size)) - 1


def write_fields(
    fields: Fields,
    get: Callable[[str], int],
    put: Callable[[str, int], None],
    offset: int,
    size: int,
    value: int,
) -> None:
    for start, width, name in fields:
        first, end = max(start, offset), min(start + width, offset + size)
        if first < end:
            mask = (1 << (8 * (end - first))) - 1
            shift = 8 * (first - start)
            written = value >> 8 * (first - offset) & mask
            kept = 0 if end - first == width else get(name) & ~(mask << shift)
            put(name, kept | written << shift)
