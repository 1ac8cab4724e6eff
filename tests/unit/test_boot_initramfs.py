"""Initramfs archives: plain, compressed, several behind each other, damaged."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.boot_images import cpio
from vmrun.boot.image import FileImage, MemoryImage
from vmrun.boot.initramfs import unpack
from vmrun.errors import EXIT_IMAGE, UserError

LIMIT = 1 << 20


def stream(data: bytes, limit: int = LIMIT) -> bytes:
    initramfs = unpack(MemoryImage("initramfs test", data), limit)
    output = bytearray(initramfs.size)
    initramfs.write_into(memoryview(output))
    return bytes(output)


MICROCODE = cpio({"kernel/x86/microcode/x.bin": b"\x01" * 1001})
ROOT = cpio({"init": b"#!/bin/sh\n", "bin/busybox": b"\x7fELF" * 333})


def test_plain_archive_stays_as_it_is() -> None:
    assert stream(ROOT) == ROOT
    assert stream(ROOT + b"\0" * 512) == ROOT


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archive(compress: Callable[[bytes], bytes]) -> None:
    assert stream(compress(ROOT)) == ROOT


def test_microcode_before_a_compressed_archive_before_another() -> None:
    packed = gzip.compress(ROOT)
    third = cpio({"etc/third": b"3"})
    padding = b"\0" * (-len(packed) % 4)
    assert stream(MICROCODE + b"\0" * 300 + packed + padding + third) == MICROCODE + ROOT + third


def test_archives_start_on_four_bytes_whatever_was_before() -> None:
    odd = ROOT + b"\0"  # 4n + 1 bytes
    assert stream(gzip.compress(odd) + gzip.compress(MICROCODE)) == odd + b"\0\0\0" + MICROCODE


def test_last_entry_without_padding() -> None:
    unpadded = ROOT.rstrip(b"\0") + b"\0"
    assert stream(unpadded) == unpadded


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(MICROCODE + lzma.compress(ROOT))
    with FileImage(path, "initramfs") as image:
        initramfs = unpack(image, LIMIT)
        output = bytearray(initramfs.size)
        initramfs.write_into(memoryview(output))
    assert output == MICROCODE + ROOT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\0" * 100, "empty"),
        (b"hsqs" + b"\0" * 100, "not an initramfs"),
        (gzip.compress(b"a text"), "holds no cpio"),
        (gzip.compress(ROOT)[:-20], "damaged gzip"),
        (ROOT + b"junk", "neither cpio nor compressed"),
        (ROOT[:300], "truncated"),
        (ROOT[:54] + b"-0000001" + ROOT[62:], "damaged cpio header"),
        (ROOT[:54] + b"FFFFFFFF" + ROOT[62:], "truncated"),
        (ROOT[:54] + b"  00000A" + ROOT[62:], "damaged cpio header"),
        (b"\x89LZO" + b"\0" * 100, "lzo compression is not supported"),
    ],
)
def test_refusals(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        stream(data)
    assert caught.value.code == EXIT_IMAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [ROOT, gzip.compress(ROOT), MICROCODE + gzip.compress(ROOT)])
def test_limit(data: bytes) -> None:
    full = len(stream(data))
    assert len(stream(data, full)) == full
    for limit in (full - 1, 1, 0, -4096):
        with pytest.raises(UserError, match="does not fit"):
            stream(data, limit)


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"070701", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", ROOT[:150]]),
)
def test_random_data_is_refused_or_bounded(data: bytes, start: bytes) -> None:
    try:
        assert len(stream(start + data)) <= LIMIT
    except UserError as error:
        assert error.code == EXIT_IMAGE
