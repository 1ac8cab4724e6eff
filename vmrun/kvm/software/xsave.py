"""XSAVE and XRSTOR in the standard format, over KVM_GET_XSAVE and KVM_SET_XSAVE (SDM volume 1, chapter 13).

KVM's image is the standard format itself, in the host's layout, so a component moves by copying its bytes.
The guest is not told of the compacted format, XSAVEOPT or supervisor states. On this KVM the image read from
a stopped vCPU is the live state of its vector registers, also of those that the guest's user mode filled
natively.
"""

from struct import Struct

LEGACY_SIZE = 512
HEADER = LEGACY_SIZE  # XSTATE_BV, XCOMP_BV, and 48 reserved bytes
HEADER_SIZE = 64
X87, SSE, AVX = 1 << 0, 1 << 1, 1 << 2
_X87_RANGES = ((0, 24), (32, 160))  # control words and ST registers; MXCSR lies between them
_MXCSR = (24, 32)  # the register, and the mask of the bits it has
_MXCSR_DEFAULT_MASK = 0xFFBF  # the mask when the processor stores zero for it
_MXCSR_RESET = 0x1F80
_XMM = (160, 416)
_DWORD = Struct("<I")
_QWORD = Struct("<Q")

Layout = dict[int, tuple[int, int]]  # component number (2 and up) -> offset and size in the standard format


class MalformedArea(Exception):
    """The guest's XSAVE area is one that XRSTOR answers with #GP."""


def area_size(layout: Layout, components: int) -> int:
    """Bytes that an area with `components` (a bit mask) takes, header included."""
    ends = [offset + size for number, (offset, size) in layout.items() if components >> number & 1]
    return max(ends, default=LEGACY_SIZE + HEADER_SIZE)


def _ranges(layout: Layout, components: int) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    if components & X87:
        ranges += _X87_RANGES
    if components & SSE:
        ranges.append(_XMM)
    ranges += [
        (offset, offset + size) for number, (offset, size) in layout.items() if components >> number & 1
    ]
    return ranges


def save(image: bytes, area: bytearray, layout: Layout, components: int) -> None:
    """XSAVE: copy `components` of KVM's `image` into the guest's `area`, leaving all else of it as it was."""
    for start, end in _ranges(layout, components):
        area[start:end] = image[start:end]
    if components & (SSE | AVX):
        area[_MXCSR[0] : _MXCSR[1]] = image[_MXCSR[0] : _MXCSR[1]]
    (used,) = _QWORD.unpack_from(image, HEADER)
    (before,) = _QWORD.unpack_from(area, HEADER)
    _QWORD.pack_into(area, HEADER, (before & ~components) | (used & components))


def restore(image: bytearray, area: bytes, layout: Layout, components: int, xcr0: int) -> None:
    """XRSTOR: change `components` of KVM's `image` to what the guest's `area` holds. Raises MalformedArea for
    #GP.
    """
    (present,) = _QWORD.unpack_from(area, HEADER)
    if present & ~xcr0 or any(area[HEADER + 8 : HEADER + 24]):
        raise MalformedArea
    for start, end in _ranges(layout, components & present):
        image[start:end] = area[start:end]
    # A component whose bit is clear goes to its initial state: KVM does that for each bit clear in what it is
    # given.
    (used,) = _QWORD.unpack_from(image, HEADER)
    used = (used & ~components) | (present & components)
    if components & (SSE | AVX):
        (mxcsr,) = _DWORD.unpack_from(area, _MXCSR[0])
        (mask,) = _DWORD.unpack_from(image, _MXCSR[0] + 4)
        if mxcsr & ~(mask or _MXCSR_DEFAULT_MASK):
            raise MalformedArea
        _DWORD.pack_into(image, _MXCSR[0], mxcsr)
        if mxcsr != _MXCSR_RESET and not used & (SSE | AVX):
            # XRSTOR loads MXCSR whatever XSTATE_BV says; KVM skips it with components that are not in use.
            image[_XMM[0] : _XMM[1]] = bytes(_XMM[1] - _XMM[0])
            used |= SSE
    _QWORD.pack_into(image, HEADER, used)
