"""Decompressing zstd with the host's libzstd (zstd.h, "Simple API", unchanged since 1.4). Worker process.

The library is loaded only for an image that says it is compressed so, and before the sandbox is entered,
where no file can be opened any more.
"""

from __future__ import annotations

import ctypes

from devices.errors import ImageError

LIBRARY = "libzstd.so.1"

_loaded: list[Library] = []


class Library:
    __slots__ = ("decompress_frame", "find_frame_size", "is_error")

    def __init__(self) -> None:
        library = ctypes.CDLL(LIBRARY)
        self.decompress_frame = library.ZSTD_decompress
        self.decompress_frame.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
        self.decompress_frame.restype = ctypes.c_size_t
        self.find_frame_size = library.ZSTD_findFrameCompressedSize
        self.find_frame_size.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self.find_frame_size.restype = ctypes.c_size_t
        self.is_error = library.ZSTD_isError
        self.is_error.argtypes = (ctypes.c_size_t,)
        self.is_error.restype = ctypes.c_uint


def load() -> None:
    """Load the library, once. ImageError when the host has none."""
    if not _loaded:
        try:
            _loaded.append(Library())
        except (OSError, AttributeError):
            raise ImageError(
                f"the qcow2 image is compressed with zstd, and {LIBRARY} is not to be had: "
                "install libzstd (Debian: libzstd1)"
            ) from None


def decompress(stream: bytes, size: int) -> bytes:
    """The first `size` bytes that the frames at the start of `stream` hold, or fewer if they hold fewer; what
    follows them is ignored. ValueError when they are damaged or hold more.

    One frame is decompressed in one go, straight into the result: no window of whatever size the frame asks
    for is allocated.
    """
    load()
    library = _loaded[0]
    source = ctypes.create_string_buffer(stream, len(stream)) if stream else None
    result = ctypes.create_string_buffer(size)
    start = done = 0
    while done < size and source is not None and start < len(stream):
        frame = ctypes.addressof(source) + start
        frame_size = library.find_frame_size(frame, len(stream) - start)
        if library.is_error(frame_size) or not 0 < frame_size <= len(stream) - start:
            raise ValueError("no zstd frame")
        count = library.decompress_frame(ctypes.addressof(result) + done, size - done, frame, frame_size)
        if library.is_error(count) or count > size - done:
            raise ValueError("a damaged zstd frame")
        start += frame_size
        done += count
    return result.raw[:done]
