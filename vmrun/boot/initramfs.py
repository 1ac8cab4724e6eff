"""Initramfs files: cpio archives, plain or compressed, one behind the other, made into one plain cpio
stream. VMM process.

The format is Documentation/driver-api/early-userspace/buffer-format.rst: a sequence of "newc" cpio
archives, each of them plain and 4-byte aligned or compressed, with zeroes between. Distributions put
microcode into a plain archive and the rest into a compressed one behind it.
"""

from dataclasses import dataclass

from vmrun.boot.decompress import DataError, TooLargeError, compression, decompress
from vmrun.boot.image import Image, MemoryImage
from vmrun.errors import EXIT_IMAGE, UserError

_CPIO_MAGICS = (b"070701", b"070702")
_CPIO_HEADER = 110
_FILE_SIZE_FIELD = slice(54, 62)  # eight hexadecimal digits
_NAME_SIZE_FIELD = slice(94, 102)
_CHUNK = 1 << 16
# Compressed archives behind each other: distributions have two or three. Each is unpacked from a copy of all
# that follows it, so a file of a million tiny ones would take hours.
_MOST_ARCHIVES = 64
_SLACK = 1 << 20  # what compression may add to data that cannot be compressed


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes at `offset` of `image` go to `position` of the stream; zeroes fill the gaps."""

    image: Image
    offset: int
    size: int
    position: int


@dataclass(frozen=True, slots=True)
class Initramfs:
    size: int
    pieces: tuple[Piece, ...]

    def write_into(self, view: memoryview) -> None:
        """Put the stream into `view`: `size` bytes of fresh (zero) guest memory."""
        for piece in self.pieces:
            piece.image.read_into(piece.offset, view[piece.position : piece.position + piece.size])


def unpack(image: Image, limit: int) -> Initramfs:
    """Find and decompress all archives in `image`. UserError (EXIT_IMAGE) when they are damaged or exceed
    `limit` bytes.

    Plain archives stay in `image`, which must stay open until the stream was written.
    """
    pieces: list[Piece] = []
    size = archives = 0
    if limit <= 0:  # the kernel fills the memory
        raise _does_not_fit(image, limit)
    offset = _skip_zeroes(image, 0)
    while offset < image.size:
        head = image.read(offset, 8)
        method = compression(head)
        if head.startswith(_CPIO_MAGICS):
            end = _end_of_cpio(image, offset)
            source, start, length = image, offset, end - offset
        elif method is not None:
            archives += 1
            if archives > _MOST_ARCHIVES:
                raise UserError(f"{image.name}: more than {_MOST_ARCHIVES} compressed archives", EXIT_IMAGE)
            source, end = _decompress(image, offset, method, limit - size)
            start, length = 0, source.size
        elif pieces:
            raise UserError(
                f"{image.name}: neither cpio nor compressed data at offset {offset:#x}", EXIT_IMAGE
            )
        else:
            raise UserError(
                f"{image.name}: not an initramfs (a cpio archive, plain or compressed)", EXIT_IMAGE
            )
        position = size + 3 & ~3
        size = position + length
        if size > limit:
            raise _does_not_fit(image, limit)
        pieces.append(Piece(source, start, length, position))
        offset = _skip_zeroes(image, end)
    if not pieces:
        raise UserError(f"{image.name}: empty", EXIT_IMAGE)
    return Initramfs(size, tuple(pieces))


def _decompress(image: Image, offset: int, method: str, limit: int) -> tuple[Image, int]:
    """The archive compressed at `offset`, and where it ends in `image`."""
    # The file may be a hole of many TiB: no more is read than could be of use.
    readable = min(image.size - offset, 2 * max(limit, 0) + _SLACK)
    try:
        data, consumed = decompress(image.read(offset, readable), method, limit)
    except DataError as error:
        raise UserError(f"{image.name}: damaged {method} data: {error}", EXIT_IMAGE) from None
    except TooLargeError:
        raise _does_not_fit(image, limit) from None
    if not data.startswith(_CPIO_MAGICS):
        raise UserError(f"{image.name}: its {method} data holds no cpio archive", EXIT_IMAGE)
    return MemoryImage(image.name, data), offset + consumed


def _does_not_fit(image: Image, limit: int) -> UserError:
    return UserError(
        f"{image.name}: decompressed, it does not fit into the {max(limit, 0) >> 20} MiB of memory "
        "that the kernel leaves; give --mem more",
        EXIT_IMAGE,
    )


def _end_of_cpio(image: Image, offset: int) -> int:
    """Where the run of cpio entries that starts at `offset` ends."""
    while (header := image.read(offset, _CPIO_HEADER)).startswith(_CPIO_MAGICS):
        try:
            file_size = bytes.fromhex(header[_FILE_SIZE_FIELD].decode("ascii"))
            name_size = bytes.fromhex(header[_NAME_SIZE_FIELD].decode("ascii"))
        except ValueError:
            file_size = name_size = b""
        if len(file_size) != 4 or len(name_size) != 4:
            raise UserError(f"{image.name}: damaged cpio header at offset {offset:#x}", EXIT_IMAGE)
        data = offset + (_CPIO_HEADER + int.from_bytes(name_size, "big") + 3 & ~3)
        end = data + int.from_bytes(file_size, "big")
        if end > image.size + 3:  # the last entry's padding may be missing
            raise UserError(f"{image.name}: truncated (a cpio entry ends at {end:#x})", EXIT_IMAGE)
        offset = min(end + 3 & ~3, image.size)
    return offset


def _skip_zeroes(image: Image, offset: int) -> int:
    while chunk := image.read(offset, _CHUNK):
        rest = chunk.lstrip(b"\0")
        offset += len(chunk) - len(rest)
        if rest:
            break
    return offset
