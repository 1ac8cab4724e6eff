"""Reads tar archives: ustar, pax and GNU, with long names, sparse files and extended attributes.

Why not the standard library's `tarfile`: it reads a pax header of any size into memory, its patterns take
quadratic time on hostile ones, and negative sizes have made it loop (CVE-2024-6232, CVE-2025-8194); and
names here stay bytes. The tests read what `tarfile` and GNU tar write. Formats: POSIX.1-2017 pax(1), "ustar
Interchange Format" and "pax Interchange Format"; GNU tar manual, "Basic Tar Format" and "Storing Sparse
Files".
"""

from __future__ import annotations

import base64
import binascii
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from vmrun.image.limits import MAX_FILE, MAX_METADATA, refused, shown
from vmrun.image.stream import Reader

BLOCK = 512
_ID_MAX = (1 << 32) - 1
# What says nothing about a file, or about one that no other program would make.
_SKIPPED_TYPES = b"gVMND"
_TYPES = {
    b"0": stat.S_IFREG, b"\0": stat.S_IFREG, b"7": stat.S_IFREG, b"S": stat.S_IFREG, b"1": stat.S_IFREG,
    b"2": stat.S_IFLNK, b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"6": stat.S_IFIFO,
}  # fmt: skip


@dataclass(slots=True)
class Member:
    """An entry of an archive. Nothing in it was looked at but for its form."""

    name: bytes
    mode: int
    """Type and permissions, as st_mode; of a hard link the type means nothing."""
    uid: int
    gid: int
    mtime_ns: int
    size: int
    """Of the file when unpacked: the archive may hold less."""
    link: bytes | None
    """Of a hard link: its target in the archive."""
    target: bytes
    """Of a symbolic link."""
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """(offset, bytes) of what the archive holds of the file, in this order, without overlap."""


class Archive:
    """The members of an archive, once. Each member's content is read before the next member is asked for;
    what is not read is skipped.
    """

    def __init__(self, source: Reader, what: str) -> None:
        self._source = source
        self._skip: Callable[[int], int] | None = getattr(source, "skip", None)
        self._what = what
        self._left = 0  # bytes of the member's content
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def read(self, size: int) -> bytes:
        """Content of the member, of all its pieces in turn; b"" at its end."""
        data = self._source.read(min(size, self._left))
        if not data and self._left and size:
            raise self._short()
        self._left -= len(data)
        return data

    def finish(self) -> None:
        """Read to the end of the stream: what comes after the archive's end mark is hashed as well."""
        while self._source.read(1 << 18):
            pass

    def _next(self) -> Member | None:
        while self._left:
            # A file can skip; a compressed stream has to be read.
            self._left -= self._skip(self._left) if self._skip else len(self.read(1 << 18))
        self._exactly(self._padding)
        self._padding = 0
        attributes: dict[bytes, bytes] = {}
        sparse: list[bytes] = []
        long_name = long_link = None
        budget = MAX_METADATA
        while True:
            header = self._exactly(BLOCK, at_end=True)
            if not header or not any(header):
                return None
            self._check_sum(header)
            kind = header[156:157]
            size = self._number(header[124:136])
            if kind not in b"xLK" and kind not in _SKIPPED_TYPES:
                break
            budget -= BLOCK + size
            if budget < 0:
                raise refused(f"{self._what}: headers of more than {MAX_METADATA >> 10} KiB for one file")
            data = self._exactly(size)
            self._exactly(-size % BLOCK)
            if kind == b"x":
                for name, value in self._records(data):
                    if name in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                        sparse.append(value)
                    else:
                        attributes[name] = value
            elif kind == b"L":
                long_name = data.partition(b"\0")[0]
            elif kind == b"K":
                long_link = data.partition(b"\0")[0]
        return self._member(header, kind, size, attributes, sparse, long_name, long_link)

    def _member(
        self,
        header: bytes,
        kind: bytes,
        size: int,
        attributes: dict[bytes, bytes],
        sparse: list[bytes],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Member:
        name = header[:100].partition(b"\0")[0]
        # GNU's own format has other things where ustar has the prefix.
        if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        name = attributes.get(b"path", long_name if long_name is not None else name)
        link = header[157:257].partition(b"\0")[0]
        link = attributes.get(b"linkpath", long_link if long_link is not None else link)
        if b"size" in attributes:
            size = self._decimal(attributes[b"size"])
        if kind == b"\0" and name.endswith(b"/"):
            kind = b"5"  # before ustar, a directory was a file with such a name
        if kind not in _TYPES:
            raise refused(f"{self._what}: {shown(name)}: unknown type {kind!r}")
        # Links, directories and devices have no content, whatever their size says: as in Go and Python.
        has_content = kind in (b"0", b"\0", b"7", b"S")
        self._left = size if has_content else 0
        self._padding = -self._left % BLOCK
        if size > MAX_FILE:
            raise refused(f"{self._what}: {shown(name)}: a file of more than 16 TiB")
        pieces = [(0, size)] if size else []
        if kind == b"S":
            size, pieces = self._old_sparse(header)
        elif any(key.startswith(b"GNU.sparse.") for key in attributes):
            name = attributes.get(b"GNU.sparse.name", name)
            size, pieces = self._pax_sparse(attributes, sparse, size)
        if has_content:
            self._check_pieces(name, size, pieces)
        return Member(
            name=name,
            mode=_TYPES[kind] | self._number(header[100:108]) & 0o7777,
            uid=self._id(attributes.get(b"uid"), header[108:116]),
            gid=self._id(attributes.get(b"gid"), header[116:124]),
            mtime_ns=self._time(attributes.get(b"mtime"), header[136:148]),
            size=size if has_content else 0,
            link=link if kind == b"1" else None,
            target=link if kind == b"2" else b"",
            device=self._device(header) if kind in b"34" else (0, 0),
            xattrs=_xattrs(attributes),
            pieces=pieces if has_content else [],
        )

    def _records(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The records of a pax header: "%d %s=%s\\n", length, keyword and value."""
        position = 0
        while position < len(data):
            space = data.find(b" ", position, position + 10)
            length = self._decimal(data[position:space]) if space > 0 else 0
            end = position + length
            record = data[space + 1 : end]
            equals = record.find(b"=")
            if space < 0 or end > len(data) or not record.endswith(b"\n") or equals < 0:
                raise refused(f"{self._what}: a damaged pax header")
            yield record[:equals], record[equals + 1 : -1]
            position = end

    def _old_sparse(self, header: bytes) -> tuple[int, list[tuple[int, int]]]:
        """GNU's format of 1.13: four pieces in the header, 21 in each block after it."""
        pieces: list[tuple[int, int]] = []
        table, count, more = header[386:482], 4, header[482]
        budget = MAX_METADATA
        while True:
            for index in range(count):
                field = table[index * 24 : index * 24 + 24]
                if not field[0]:
                    break
                pieces.append((self._number(field[:12]), self._number(field[12:])))
            if not more:
                return self._number(header[483:495]), [piece for piece in pieces if piece[1]]
            budget -= BLOCK
            if budget < 0:
                raise refused(f"{self._what}: a map of more than {MAX_METADATA >> 10} KiB for one file")
            block = self._exactly(BLOCK)
            table, count, more = block[:504], 21, block[504]

    def _pax_sparse(
        self, attributes: dict[bytes, bytes], repeated: list[bytes], size: int
    ) -> tuple[int, list[tuple[int, int]]]:
        """GNU's formats 0.0, 0.1 and 1.0."""
        real = attributes.get(b"GNU.sparse.realsize", attributes.get(b"GNU.sparse.size"))
        if real is None:
            raise refused(f"{self._what}: a sparse file without its size")
        if attributes.get(b"GNU.sparse.major") == b"1":
            numbers = self._sparse_map()
        elif b"GNU.sparse.map" in attributes:
            numbers = [self._decimal(text) for text in attributes[b"GNU.sparse.map"].split(b",") if text]
        else:
            numbers = [self._decimal(text) for text in repeated]
        if len(numbers) % 2:
            raise refused(f"{self._what}: a damaged map of a sparse file")
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return self._decimal(real), [(offset, length) for offset, length in pairs if length]

    def _sparse_map(self) -> list[int]:
        """The map of format 1.0: decimal numbers, a line each, padded to a block, before the content."""
        text = b""
        numbers: list[int] = []
        wanted = 1
        taken = 0
        while len(numbers) < wanted:
            line, newline, rest = text.partition(b"\n")
            if newline:
                text = rest
                numbers.append(self._decimal(line))
                if len(numbers) == 1:
                    wanted = 1 + 2 * numbers[0]
                continue
            taken += BLOCK
            if taken > MAX_METADATA or self._left < BLOCK:
                raise refused(f"{self._what}: a damaged map of a sparse file")
            text += self._exactly(BLOCK)
            self._left -= BLOCK
        return numbers[1:]

    def _check_pieces(self, name: bytes, size: int, pieces: list[tuple[int, int]]) -> None:
        end = held = 0
        for offset, length in pieces:
            if offset < end:
                raise refused(f"{self._what}: {shown(name)}: the pieces of a sparse file overlap")
            end = offset + length
            held += length
        if end > size or size > MAX_FILE or held > self._left:
            raise refused(f"{self._what}: {shown(name)}: its size is not that of its pieces")

    def _exactly(self, size: int, *, at_end: bool = False) -> bytes:
        parts = []
        left = size
        while left:
            data = self._source.read(left)
            if not data:
                if at_end and left == size:
                    return b""  # no end mark: GNU tar says nothing about it either
                raise self._short()
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    def _short(self) -> Exception:
        return refused(f"{self._what}: the archive ends too early")

    def _check_sum(self, header: bytes) -> None:
        """The sum of all bytes, with the field itself as spaces; some old programs took them as signed."""
        stated = self._number(header[148:156])
        total = sum(header[:148]) + 8 * 32 + sum(header[156:])
        if stated != total:
            negative = sum(byte > 127 for byte in header[:148] + header[156:])
            if stated != total - 256 * negative:
                raise refused(f"{self._what}: not a tar archive, or a damaged one")

    def _number(self, field: bytes, *, negative: bool = False) -> int:
        """Octal digits, or base 256 when the first bit is set (GNU)."""
        if field[0] & 0x80:
            value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
            if field[0] == 0xFF:
                value = int.from_bytes(field, "big", signed=True)
                if not negative:
                    raise refused(f"{self._what}: a negative number in a header")
            return value
        text = field.partition(b"\0")[0].strip()
        if not text:
            return 0
        try:
            # int() alone would take a sign, and underlines.
            return int(text if text.isdigit() else b"", 8)
        except ValueError:
            raise refused(f"{self._what}: not a tar archive, or a damaged one") from None

    def _decimal(self, text: bytes) -> int:
        # 20 digits: int() of a megabyte of them takes quadratic time.
        if not text.isdigit() or len(text) > 20:
            raise refused(f"{self._what}: {shown(text)} in a header is not a number")
        return int(text)

    def _id(self, decimal: bytes | None, field: bytes) -> int:
        value = self._number(field) if decimal is None else self._decimal(decimal)
        if value > _ID_MAX:
            raise refused(f"{self._what}: a user or group of more than 32 bits")
        return value

    def _time(self, decimal: bytes | None, field: bytes) -> int:
        if decimal is None:
            return self._number(field, negative=True) * 1_000_000_000
        seconds, _, fraction = decimal.removeprefix(b"-").partition(b".")
        value = self._decimal(seconds) * 1_000_000_000 + self._decimal((fraction + b"0" * 9)[:9])
        return -value if decimal.startswith(b"-") else value

    def _device(self, header: bytes) -> tuple[int, int]:
        major, minor = self._number(header[329:337]), self._number(header[337:345])
        if major >= 1 << 12 or minor >= 1 << 20:
            raise refused(f"{self._what}: a device number that Linux does not have")
        return major, minor


def _xattrs(attributes: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Extended attributes as GNU tar, Go and bsdtar store them."""
    found: dict[bytes, bytes] = {}
    for key, value in attributes.items():
        if key.startswith(b"LIBARCHIVE.xattr."):
            name = unquote_to_bytes(key[len(b"LIBARCHIVE.xattr.") :])
            try:
                found.setdefault(name, base64.b64decode(value + b"=" * (-len(value) % 4)))
            except (ValueError, binascii.Error):
                continue
        elif key.startswith(b"SCHILY.xattr."):
            found[key[len(b"SCHILY.xattr.") :]] = value
    return found
