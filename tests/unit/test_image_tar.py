"""The tar reader against tarfile and GNU tar, and against archives that nobody should read."""

import base64
import bz2
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.image_archives import tar
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.image.limits import Limits
from vmrun.image.stream import Decompressed
from vmrun.image.tar import Archive, Member


def read(data: bytes) -> list[tuple[Member, bytes]]:
    found = []
    archive = Archive(io.BytesIO(data), "test")
    for member in archive:
        content = bytearray(member.size)
        for offset, length in member.pieces:
            piece = b""
            while len(piece) < length:
                piece += archive.read(length - len(piece))
            content[offset : offset + length] = piece
        found.append((member, bytes(content)))
    return found


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=2000), st.integers(0, 2**32 - 1)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_reads_what_tarfile_writes(files: list[tuple[str, bytes, int]], format: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8") as archive:
        for name, data, uid in files:
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.mode = len(data), uid, 0o4751
            archive.addfile(info, io.BytesIO(data))
    found = read(out.getvalue())
    # tarfile itself cuts trailing slashes off.
    assert [(member.name.rstrip(b"/"), data, member.uid) for member, data in found] == [
        (name.encode().rstrip(b"/"), data, uid) for name, data, uid in files
    ]
    assert all(member.mode == 0o104751 for member, _ in found)


def test_types_and_prefix() -> None:
    long = "d" * 90 + "/" + "f" * 90
    data = tar(
        ("dir", "d", b""), ("symlink", "s", "/target"), ("link", "l", "d/x"), ("block", "b", (8, 1)),
        ("char", "c", (1, 3)), ("fifo", "p", b""), ("file", long, b"x"), format=tarfile.USTAR_FORMAT,
    )  # fmt: skip
    members = [member for member, _ in read(data)]
    assert [oct(member.mode)[:-4] for member in members[:2]] == ["0o4", "0o12"]
    assert members[1].target == b"/target"
    assert members[2].link == b"d/x"
    assert (members[3].device, members[4].device) == ((8, 1), (1, 3))
    assert members[6].name == long.encode()


def test_pax_attributes() -> None:
    capability = bytes(range(20))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("f")
        info.pax_headers = {
            "mtime": "1600000000.123456789",
            "LIBARCHIVE.xattr.user.a%20b": base64.b64encode(capability).decode().rstrip("="),
            "SCHILY.xattr.security.capability": "as\nit is",
        }
        archive.addfile(info)
        info = tarfile.TarInfo("old")
        info.mtime = -1.5
        archive.addfile(info)
    (first, _), (second, _) = read(out.getvalue())
    assert first.mtime_ns == 1_600_000_000_123_456_789
    assert first.xattrs == {b"user.a b": capability, b"security.capability": b"as\nit is"}
    assert second.mtime_ns == -1_500_000_000


@pytest.mark.parametrize("form", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0"])
def test_sparse_files_of_gnu_tar(form: str, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar on this host")
    with (tmp_path / "sparse").open("wb") as file:
        for block in range(60):
            file.seek(block * 40960)
            file.write(os.urandom(100 + block))
        file.truncate(3_000_000)
    name, _, version = form.partition(" ")
    options = [f"--sparse-version={version}"] if version else []
    command = ["tar", f"--format={name}", "-S", *options, "-C", tmp_path, "-cf", "-", "sparse"]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    ((member, content),) = read(data)
    assert member.name == b"sparse"
    assert content == (tmp_path / "sparse").read_bytes()
    if form != "gnu" or len(member.pieces) > 1:
        assert sum(length for _, length in member.pieces) < 1_000_000


def patched(data: bytes, offset: int, field: bytes) -> bytes:
    """With a header's field replaced and its checksum right."""
    header = bytearray(data[:512])
    header[offset : offset + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


ONE = tar(("file", "f", b"x" * 600), format=tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(ONE[:700], id="cut in the content"),
        pytest.param(ONE[:300], id="cut in the header"),
        pytest.param(b"\xff" + ONE[1:], id="checksum"),
        pytest.param(patched(ONE, 124, b"\xff" * 12), id="negative size"),
        pytest.param(patched(ONE, 124, b"\x80" + b"\x7f" * 11), id="enormous size"),
        pytest.param(patched(ONE, 108, b"\x80\0\0\1\0\0\0\0"), id="uid of 33 bits"),
        pytest.param(patched(ONE, 156, b"Z"), id="unknown type"),
        pytest.param(patched(ONE, 156, b"x"), id="pax header without records"),
        pytest.param(patched(patched(ONE, 124, b"77777777777\0"), 156, b"L"), id="name of 8 GiB"),
        pytest.param(patched(patched(ONE, 156, b"3"), 329, b"7777777\0"), id="device number"),
        pytest.param(patched(patched(ONE, 156, b"S"), 482, b"\1"), id="sparse map cut"),
    ],
)
def test_damage_is_refused(data: bytes) -> None:
    with pytest.raises(UserError) as caught:
        read(data)
    assert caught.value.code == EXIT_IMAGE


def pax(records: bytes) -> bytes:
    header = patched(patched(ONE, 124, b"%011o\0" % len(records)), 156, b"x")[:512]
    return header + records.ljust(-(-len(records) // 512) * 512, b"\0") + ONE


@pytest.mark.parametrize(
    "records",
    [
        b"9 a=b\n", b"0 a=b\n", b"6 a=b", b"99999999999999999999 a=b\n", b"1" * 5000, b"-6 a=b\n", b"5 ab\n",
        b"12 size=-1\n\n", b"27 GNU.sparse.size=99999999\n", b"30 GNU.sparse.map=5,5,4,5,1,1\n\n",
    ],
)  # fmt: skip
def test_damaged_pax_headers_are_refused(records: bytes) -> None:
    with pytest.raises(UserError):
        read(pax(records))


@given(st.data())
def test_no_bytes_do_more_than_a_refusal(data: st.DataObject) -> None:
    sound = bytearray(pax(b"11 path=abc\n"[:12].replace(b"11", b"12")))
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, 1535))
        sound[position] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            # A right checksum, so that the damage is seen by what comes after it.
            start = position // 512 * 512
            sound[start : start + 512] = patched(bytes(sound[start : start + 512]), 0, b"")
    try:
        read(bytes(sound))
    except UserError:
        pass


PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    None: bytes,
}


@pytest.mark.parametrize("method", PACKERS)
@pytest.mark.parametrize("step", [1, 700, 1 << 20])
def test_compressed_streams(method: str | None, step: int) -> None:
    pack = PACKERS[method]
    sound = os.urandom(3000) + bytes(100_000)
    data = sound if method is None else pack(sound[:5000]) + pack(sound[5000:])
    stream = Decompressed(Trickle(data, step), "test", Limits())
    assert stream.method == method
    assert b"".join(iter(lambda: stream.read(1777), b"")) == sound


class Trickle(io.BytesIO):
    """Gives a few bytes at a time, as a pipe may."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__(data)
        self._step = step

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._step if size is None or size < 0 else min(size, self._step))


@pytest.mark.parametrize("method", ["gzip", "bzip2", "xz", "zstd"])
def test_damaged_compression_is_refused(method: str) -> None:
    packed = PACKERS[method](os.urandom(5000))
    for data in (packed[:-20], packed[:2500] + bytes(20) + packed[2520:]):
        stream = Decompressed(io.BytesIO(data), "layer 1", Limits())
        with pytest.raises(UserError, match="layer 1"):
            while stream.read(4096):
                pass


@pytest.mark.parametrize("method", ["gzip", "bzip2", "xz", "zstd"])
def test_bombs_stop_at_the_ratio(method: str) -> None:
    stream = Decompressed(io.BytesIO(PACKERS[method](bytes(80 << 20))), "layer 1", Limits())
    count = 0
    with pytest.raises(UserError, match="--max-ratio"):
        while data := stream.read(1 << 20):
            count += len(data)
    assert count <= 64 << 20


def test_bombs_stop_at_the_size() -> None:
    bomb = gzip.compress(bytes(80 << 20))
    stream = Decompressed(io.BytesIO(bomb), "layer 1", Limits(size=1 << 20, ratio=2000))
    with pytest.raises(UserError, match="--max-size"):
        while stream.read(1 << 20):
            pass
