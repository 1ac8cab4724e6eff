"""The six compressions of Linux kernels and initramfs archives, undone on the host with bounded output. VMM
process.

A guest would inflate these itself, at the speed of emulated kernel code on a KVM without VMX/SVM: tens of
seconds. Magic numbers are those of lib/decompress.c; lz4 is the legacy frame, the only one the kernel
knows. The lz4 and zstandard packages are imported only when such data is met.
"""

from vmrun.errors import EXIT_IMAGE, UserError

# A dictionary or window larger than this is refused: the header chooses how much memory the decoder
# allocates.
_DECODER_MEMORY = 256 << 20
_ZSTD_WINDOW = 128 << 20  # what `zstd --ultra -22`, the kernel's own setting, uses

_LZ4_MAGIC = 0x184C2102
_LZ4_BLOCK = 8 << 20  # a legacy frame's blocks hold this much, the last one less
_LZ4_BLOCK_BOUND = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16

_ZSTD_BLOCK_HEADER = 3
_ZSTD_RLE_BLOCK = 1
_ZSTD_RESERVED_BLOCK = 3
_CHUNK = 1 << 20


class DataError(Exception):
    """The compressed data is damaged or ends too early."""


class TooLargeError(Exception):
    """The output would exceed the limit."""


MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x89LZO", "lzo"),
)


def compression(data: bytes) -> str | None:
    """The compression whose magic number `data` starts with; None when there is none."""
    for magic, name in MAGICS:
        if data.startswith(magic):
            return name
    return None


def decompress(data: bytes, method: str, limit: int) -> tuple[bytes, int]:
    """The first compressed member at the start of `data`: at most `limit` bytes of output, and the input it
    took.

    Bytes after the member are left alone: kernels append the output's length, archives another archive.
    Raises DataError for damaged data, TooLargeError for output beyond `limit`, UserError for a method we
    lack.
    """
    if method == "gzip":
        return _gzip(data, limit)
    if method in ("xz", "lzma"):
        return _lzma(data, method, limit)
    if method == "bzip2":
        return _bzip2(data, limit)
    if method == "lz4":
        return _lz4(data, limit)
    if method == "zstd":
        return _zstd(data, limit)
    raise UserError(
        f"{method} compression is not supported; recompress with gzip, xz, lzma, bzip2, lz4 or zstd",
        EXIT_IMAGE,
    )


def _checked(output: bytes, ended: bool, limit: int) -> bytes:
    if len(output) > limit:
        raise TooLargeError
    if not ended:
        raise DataError("the data ends too early")
    return output


# One byte more than the limit is asked for each time: output of exactly `limit` bytes and its end are then
# seen.


def _gzip(data: bytes, limit: int) -> tuple[bytes, int]:
    import zlib

    decoder = zlib.decompressobj(wbits=31)
    try:
        output = decoder.decompress(data, limit + 1)
    except zlib.error as error:
        raise DataError(str(error)) from None
    return _checked(output, decoder.eof, limit), len(data) - len(decoder.unused_data)


def _lzma(data: bytes, method: str, limit: int) -> tuple[bytes, int]:
    import lzma

    container = lzma.FORMAT_XZ if method == "xz" else lzma.FORMAT_ALONE
    decoder = lzma.LZMADecompressor(container, memlimit=_DECODER_MEMORY)
    try:
        output = decoder.decompress(data, limit + 1)
    except lzma.LZMAError as error:
        raise DataError(str(error)) from None
    return _checked(output, decoder.eof, limit), len(data) - len(decoder.unused_data)


def _bzip2(data: bytes, limit: int) -> tuple[bytes, int]:
    import bz2

    decoder = bz2.BZ2Decompressor()
    try:
        output = decoder.decompress(data, limit + 1)
    except OSError as error:
        raise DataError(str(error)) from None
    return _checked(output, decoder.eof, limit), len(data) - len(decoder.unused_data)


def _lz4(data: bytes, limit: int) -> tuple[bytes, int]:
    """Legacy frame: a magic number, then blocks of a 32-bit size and data, to the end or to what cannot be
    a size.
    """
    import lz4.block

    output = bytearray()
    position = 4
    while position + 4 < len(data):  # four last bytes and nothing behind them: the length that kernels append
        size = int.from_bytes(data[position : position + 4], "little")
        if size == _LZ4_MAGIC:  # another frame, as `cat a.lz4 b.lz4` makes
            position += 4
            continue
        if size == 0 or size > _LZ4_BLOCK_BOUND:
            break
        block = data[position + 4 : position + 4 + size]
        if len(block) < size:
            raise DataError("the data ends too early")
        try:
            output += lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise DataError(str(error)) from None
        if len(output) > limit:
            raise TooLargeError
        position += 4 + size
    return bytes(output), min(position, len(data))


def _zstd(data: bytes, limit: int) -> tuple[bytes, int]:
    import zstandard

    size = _zstd_frame_size(data)
    output = bytearray()
    try:
        decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        with decoder.stream_reader(data[:size]) as reader:
            while chunk := reader.read(_CHUNK):
                output += chunk
                if len(output) > limit:
                    raise TooLargeError
    except zstandard.ZstdError as error:
        raise DataError(str(error)) from None
    return bytes(output), size


def _zstd_frame_size(data: bytes) -> int:
    """The length of the frame at the start of `data` (RFC 8878, section 3.1.1).

    The zstandard package tells only how much it was given, not where in it the frame ended.
    """
    if len(data) < 5:
        raise DataError("the data ends too early")
    descriptor = data[4]
    single_segment = descriptor >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    position = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size
    last = False
    while not last:
        header = int.from_bytes(data[position : position + _ZSTD_BLOCK_HEADER], "little")
        position += _ZSTD_BLOCK_HEADER
        last, block_type, size = bool(header & 1), header >> 1 & 3, header >> 3
        if block_type == _ZSTD_RESERVED_BLOCK:
            raise DataError("reserved block type")
        position += 1 if block_type == _ZSTD_RLE_BLOCK else size
        if position > len(data):
            raise DataError("the data ends too early")
    position += 4 if descriptor & 4 else 0  # content checksum
    if position > len(data):
        raise DataError("the data ends too early")
    return position
