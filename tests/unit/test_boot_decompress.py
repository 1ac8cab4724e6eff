"""The six compressions: what they give back, where they stop, and what they refuse."""

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.boot_images import COMPRESSORS, lz4_legacy
from vmrun.boot.decompress import DataError, TooLargeError, compression, decompress
from vmrun.errors import EXIT_IMAGE, UserError


def zstd_streamed(data: bytes) -> bytes:
    """Without the content size in the frame header, with a checksum, as a pipe into zstd makes it."""
    compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compressobj()
    return compressor.compress(data) + compressor.flush()


SAMPLE = bytes(range(256)) * 300 + b"\0" * 200_000


@pytest.mark.parametrize("method", COMPRESSORS)
def test_round_trip_and_input_taken(method: str) -> None:
    packed = COMPRESSORS[method](SAMPLE)
    assert compression(packed) == method
    # Kernels append the output's length; cpio's magic is what follows in an initramfs.
    for tail in (b"", struct.pack("<I", len(SAMPLE)), b"070701 and so on", b"\0" * 40):
        assert decompress(packed + tail, method, len(SAMPLE)) == (SAMPLE, len(packed))


@pytest.mark.parametrize("method", COMPRESSORS)
def test_output_is_bounded(method: str) -> None:
    packed = COMPRESSORS[method](SAMPLE)
    with pytest.raises(TooLargeError):
        decompress(packed, method, len(SAMPLE) - 1)


@pytest.mark.parametrize("method", COMPRESSORS)
def test_bomb_stops_at_the_limit(method: str) -> None:
    packed = COMPRESSORS[method](bytes(16 << 20))
    with pytest.raises(TooLargeError):
        decompress(packed, method, 1 << 16)


@pytest.mark.parametrize("method", COMPRESSORS)
def test_truncated(method: str) -> None:
    packed = COMPRESSORS[method](SAMPLE)
    with pytest.raises(DataError):
        decompress(packed[: len(packed) // 2], method, len(SAMPLE))


@pytest.mark.parametrize("method", COMPRESSORS)
@given(data=st.data())
def test_damage_raises_only_our_errors(method: str, data: st.DataObject) -> None:
    packed = bytearray(COMPRESSORS[method](SAMPLE[:3000]))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(4, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        output, consumed = decompress(bytes(packed), method, 1 << 20)
    except (DataError, TooLargeError):
        return
    assert len(output) <= 1 << 20
    assert consumed <= len(packed)


@given(st.binary(max_size=200), st.sampled_from([False, True]))
def test_zstd_frames_of_any_form_end_where_they_end(data: bytes, streamed: bool) -> None:
    packed = zstd_streamed(data) if streamed else COMPRESSORS["zstd"](data)
    assert decompress(packed + b"tail", "zstd", 1000) == (data, len(packed))


def test_zstd_frame_of_many_blocks() -> None:
    data = bytes(range(251)) * 4001
    packed = zstd_streamed(data)
    assert decompress(packed + b"070701", "zstd", len(data)) == (data, len(packed))


def test_lz4_frames_in_a_row() -> None:
    assert decompress(lz4_legacy(b"one") + lz4_legacy(b"two"), "lz4", 100)[0] == b"onetwo"


def test_lzma_header_cannot_ask_for_a_huge_dictionary() -> None:
    packed = bytearray(COMPRESSORS["lzma"](SAMPLE))
    packed[1:5] = b"\0\0\0\xf0"
    with pytest.raises(DataError, match="emory"):
        decompress(bytes(packed), "lzma", len(SAMPLE))


def test_unsupported_method_is_named() -> None:
    assert compression(b"\x89LZO\0") == "lzo"
    with pytest.raises(UserError, match="lzo") as caught:
        decompress(b"\x89LZO\0", "lzo", 100)
    assert caught.value.code == EXIT_IMAGE
    assert compression(b"plain text") is None
