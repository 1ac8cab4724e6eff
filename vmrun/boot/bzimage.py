"""bzImage: the setup header and the kernel ELF compressed behind it. VMM process.

Follows Documentation/x86/boot.rst. The image's own decompressor never runs: its payload is decompressed
here and entered as an ELF, which needs boot protocol 2.08 (payload_offset and payload_length; Linux
2.6.26).
"""

import struct
from dataclasses import dataclass

from vmrun.boot.decompress import DataError, TooLargeError, compression, decompress
from vmrun.boot.image import Image, MemoryImage
from vmrun.errors import EXIT_IMAGE, UserError

SETUP_HEADER_OFFSET = 0x1F1
SETUP_HEADER_LIMIT = 0x290  # struct boot_params has room for the header up to here

_HEADER_END_2_08 = 0x250
_LOADED_HIGH = 1
_SECTOR = 512
_KERNEL_LIMIT = 512 << 20  # decompressed; a distribution's kernel has some 50 MiB


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """`raw` is the header as it goes into boot_params from offset 0x1F1; the rest are fields of it,
    checked.
    """

    raw: bytes
    version: int  # (major << 8) + minor
    initrd_addr_max: int  # address of the highest byte an initramfs may occupy
    cmdline_size: int  # longest command line, without its terminating zero
    payload_offset: int  # from the start of the file
    payload_length: int


def is_bzimage(head: bytes) -> bool:
    """Whether a file that starts with `head` (0x206 bytes or more) claims the Linux boot protocol."""
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"


def read_setup_header(image: Image) -> SetupHeader:
    """Raises UserError (EXIT_IMAGE) when the header makes no sense or the protocol is too old."""
    head = image.read(0, SETUP_HEADER_LIMIT)
    if not is_bzimage(head) or len(head) < _HEADER_END_2_08:
        raise UserError(f"{image.name}: not a bzImage", EXIT_IMAGE)
    version = int.from_bytes(head[0x206:0x208], "little")
    if version < 0x208:
        raise UserError(
            f"{image.name}: boot protocol {version >> 8}.{version & 0xFF:02} is too old (2.08 is needed); "
            "give its ELF vmlinux instead",
            EXIT_IMAGE,
        )
    if not head[0x211] & _LOADED_HIGH:
        raise UserError(f"{image.name}: a zImage is not supported; build a bzImage", EXIT_IMAGE)
    header_end = 0x202 + head[0x201]
    if not _HEADER_END_2_08 <= header_end <= SETUP_HEADER_LIMIT:
        raise UserError(
            f"{image.name}: damaged setup header (it claims to end at {header_end:#x})", EXIT_IMAGE
        )
    initrd_addr_max, cmdline_size = struct.unpack_from("<I8xI", head, 0x22C)
    payload_offset, payload_length = struct.unpack_from("<II", head, 0x248)
    protected_mode_start = ((head[0x1F1] or 4) + 1) * _SECTOR  # setup_sects 0 means 4, for ancient loaders
    start = protected_mode_start + payload_offset
    if not payload_offset or not payload_length or start + payload_length > image.size:
        raise UserError(
            f"{image.name}: damaged or truncated bzImage (payload {start:#x}+{payload_length:#x}, "
            f"file of {image.size:#x} bytes)",
            EXIT_IMAGE,
        )
    return SetupHeader(
        raw=head[SETUP_HEADER_OFFSET:header_end],
        version=version,
        initrd_addr_max=initrd_addr_max,
        cmdline_size=cmdline_size,
        payload_offset=start,
        payload_length=payload_length,
    )


def extract_kernel(image: Image, header: SetupHeader) -> MemoryImage:
    """The ELF inside, decompressed. Its relocations, appended for KASLR, come along and are never looked
    at.
    """
    if header.payload_length > _KERNEL_LIMIT:  # 4 GiB of a sparse file would be read before it is found bad
        raise UserError(f"{image.name}: its payload has more than {_KERNEL_LIMIT >> 20} MiB", EXIT_IMAGE)
    payload = image.read(header.payload_offset, header.payload_length)
    method = compression(payload)
    if method is None:
        if not payload.startswith(b"\x7fELF"):
            raise UserError(f"{image.name}: its kernel is compressed in no way known", EXIT_IMAGE)
        return MemoryImage(image.name, payload)
    try:
        kernel, _ = decompress(payload, method, _KERNEL_LIMIT)
    except DataError as error:
        raise UserError(f"{image.name}: damaged {method} payload: {error}", EXIT_IMAGE) from None
    except TooLargeError:
        raise UserError(
            f"{image.name}: its {method} payload inflates to more than {_KERNEL_LIMIT >> 20} MiB", EXIT_IMAGE
        ) from None
    return MemoryImage(image.name, kernel)
