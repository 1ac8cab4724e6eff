"""Copying trees of files: the stream of entries that the host sends, and making files from the guest's.

The guest is hostile and the host's files are precious. An entry has a name and no path, checked here, and is
made relative to its directory's descriptor without following links, so no stream can name a place outside of
the target. No device nodes, no set-user-id bits unless asked for, and a symbolic link that would lead out of
the copied tree is left out. docs/agent.md has the format; vmrun/guestkit/agent/files.c is the other end.
"""

from __future__ import annotations

import os
import stat
import struct

from vmrun.agent.protocol import PAYLOAD_MAX, AgentError, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEPTH_MAX = 200
_NAME_MAX = 255
_TARGET_MAX = 4095
_LEFT_OUT_MAX = 100
_NUMBER = struct.Struct("<I")
_ABOUT = struct.Struct("<IQ")  # mode, mtime in ns
_CHUNK_FAILED = 0xFFFFFFFF
_END = b"e"
_DIRECTORY = b"d"
_DIRECTORY_END = b"D"
_FILE = b"f"
_LINK = b"l"
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class StreamError(AgentError):
    """The guest's stream of files is wrong, or wants more than the limits allow."""


class StreamEnd(StreamError):
    """It ended before its end."""


class Limits:
    """How much a copy out of a guest may put on the host; None is no limit."""

    __slots__ = ("bytes", "entries")

    def __init__(self, bytes: int | None = None, entries: int | None = 1_000_000) -> None:
        self.bytes = bytes
        self.entries = entries


class Totals:
    """What a copy did."""

    __slots__ = ("_left_out", "_more", "bytes", "entries")

    def __init__(self) -> None:
        self.bytes = 0
        self.entries = 0
        self._left_out: list[str] = []
        self._more = 0

    @property
    def left_out(self) -> list[str]:
        """In words what was not copied: a line for each, but in the end one for all beyond the first 100."""
        return [*self._left_out, f"... and {self._more} more"] if self._more else list(self._left_out)

    def leave_out(self, what: str) -> None:
        """A guest may have any number of what cannot be copied; only the first are remembered."""
        if len(self._left_out) < _LEFT_OUT_MAX:
            self._left_out.append(what)
        else:
            self._more += 1

    def __repr__(self) -> str:
        left_out = len(self._left_out) + self._more
        return f"<Totals {self.entries} entries, {self.bytes} bytes, {left_out} left out>"


def base_name(path: str) -> str:
    return os.path.basename(os.path.normpath(path)) or "root"


def open_source(path: str) -> int:
    """The descriptor of a file or directory to copy. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def entries(fd: int, totals: Totals) -> Iterator[bytes]:
    """The stream for the file or directory `fd`, in pieces of 64 KiB or so. Once begun, it closes `fd` at its
    end. Raises OSError."""
    try:
        yield from _batched(_tree(fd, b"", 0, totals))
        yield _END
    finally:
        os.close(fd)


def _batched(parts: Iterator[bytes]) -> Iterator[bytes]:
    """A frame for each of many small files would cost more than the files."""
    batch: list[bytes] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part)
        if size >= PAYLOAD_MAX:
            yield b"".join(batch)
            batch, size = [], 0
    yield b"".join(batch)


def _entry(kind: bytes, about: os.stat_result, name: bytes) -> bytes:
    numbers = _ABOUT.pack(stat.S_IMODE(about.st_mode), max(0, about.st_mtime_ns))
    return kind + numbers + _NUMBER.pack(len(name)) + name


def _tree(fd: int, name: bytes, depth: int, totals: Totals) -> Iterator[bytes]:
    about = os.fstat(fd)
    totals.entries += 1
    if stat.S_ISREG(about.st_mode):
        yield _entry(_FILE, about, name)
        while data := os.read(fd, PAYLOAD_MAX):
            totals.bytes += len(data)
            yield _NUMBER.pack(len(data)) + data
        yield _NUMBER.pack(0)
        return
    if not stat.S_ISDIR(about.st_mode):
        raise AgentError("only files and directories can be copied")
    if depth == DEPTH_MAX:
        raise AgentError(f"directories are nested more than {DEPTH_MAX} deep")
    yield _entry(_DIRECTORY, about, name)
    for inner in sorted(os.listdir(fd)):
        yield from _inner(fd, os.fsencode(inner), depth, totals)
    yield _DIRECTORY_END


def _inner(parent: int, name: bytes, depth: int, totals: Totals) -> Iterator[bytes]:
    about = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISLNK(about.st_mode):
        target = os.readlink(name, dir_fd=parent)
        totals.entries += 1
        yield _entry(_LINK, about, name) + _NUMBER.pack(len(target)) + target
    elif stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode):
        fd = os.open(name, _READ_FLAGS, dir_fd=parent)
        try:
            yield from _tree(fd, name, depth + 1, totals)
        finally:
            os.close(fd)
    else:
        totals.leave_out(f"{one_line(name)}: neither file, directory nor link")


def extract(
    read: Callable[[int], bytes],
    path: str,
    name: str,
    totals: Totals,
    limits: Limits,
    special_bits: bool = False,
) -> None:
    """Make files from a stream at `path`: a directory becomes `path` (or is merged into it), a file becomes
    `path`, or `path`/`name` when that is a directory. What the umask forbids of the guest's permissions they
    do not get. Raises StreamError or OSError."""
    mask = (0o7777 if special_bits else 0o777) & ~_umask()
    _Extractor(read, totals, limits, mask).run(path, os.fsencode(name))


def _umask() -> int:
    """Ours. To ask umask(2) would be to change it for a moment, in which other threads make files."""
    with open("/proc/self/status", "rb") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith(b"Umask:")), 0o077)


class _Extractor:
    def __init__(self, read: Callable[[int], bytes], totals: Totals, limits: Limits, mode_mask: int) -> None:
        self._read = read
        self._totals = totals
        self._limits = limits
        self._mode_mask = mode_mask
        self._open: list[tuple[int, int, int]] = []  # descriptor, mode, mtime of each directory on the way

    def run(self, path: str, name: bytes) -> None:
        try:
            self._root(path, name)
            while (kind := self._exactly(1)) != _END:
                if not self._open:
                    raise StreamError("the guest sent two trees for one")
                self._next(kind)
            if self._open:
                raise StreamError("the guest sent a directory without its end")
        finally:
            for fd, _, _ in self._open:
                os.close(fd)

    def _root(self, path: str, name: bytes) -> None:
        kind = self._exactly(1)
        if kind == _DIRECTORY:
            mode, mtime, _ = self._about(root=True)
            os.makedirs(path, exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._open.append((fd, mode, mtime))
            return
        if kind != _FILE:
            raise StreamError("the guest sent neither a file nor a directory")
        mode, mtime, _ = self._about(root=True)
        if path.endswith("/") or os.path.isdir(path):
            directory, base = path, name
        else:
            directory, base = os.path.dirname(path) or ".", os.fsencode(os.path.basename(path))
        os.makedirs(directory, exist_ok=True)
        at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._file(at, base, mode, mtime)
        finally:
            os.close(at)

    def _next(self, kind: bytes) -> None:
        parent = self._open[-1][0]
        if kind == _DIRECTORY_END:
            fd, mode, mtime = self._open.pop()
            try:
                os.fchmod(fd, mode & self._mode_mask)
                os.utime(fd, ns=(mtime, mtime))
            finally:
                os.close(fd)
            return
        if kind not in (_DIRECTORY, _FILE, _LINK):
            raise StreamError("the guest sent an entry of no kind")
        mode, mtime, name = self._about(root=False)
        if kind == _FILE:
            self._file(parent, name, mode, mtime)
        elif kind == _LINK:
            self._link(parent, name, mtime)
        else:
            if len(self._open) == DEPTH_MAX:
                raise StreamError(f"the guest sent directories nested more than {DEPTH_MAX} deep")
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                pass
            # O_NOFOLLOW: what is there already may be a link, and the files belong below the target.
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._open.append((os.open(name, flags, dir_fd=parent), mode, mtime))

    def _file(self, parent: int, name: bytes, mode: int, mtime: int) -> None:
        _remove(parent, name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            while size := self._number():
                if size == _CHUNK_FAILED:
                    raise StreamEnd("the guest could not read a file")
                self._count(0, size)
                while size:
                    data = self._read(min(size, PAYLOAD_MAX))
                    if not data:
                        raise StreamEnd("the guest's files ended early")
                    size -= len(data)
                    rest = memoryview(data)
                    while rest:
                        rest = rest[os.write(fd, rest) :]
            os.fchmod(fd, mode & self._mode_mask)
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)

    def _link(self, parent: int, name: bytes, mtime: int) -> None:
        target = self._text(_TARGET_MAX)
        if not _stays_inside(target, len(self._open) - 1):
            self._totals.leave_out(f"{one_line(name)}: a link that leads out of the copied tree")
            return
        _remove(parent, name)
        os.symlink(target, name, dir_fd=parent)
        os.utime(name, ns=(mtime, mtime), dir_fd=parent, follow_symlinks=False)

    def _about(self, root: bool) -> tuple[int, int, bytes]:
        mode, mtime = _ABOUT.unpack(self._exactly(_ABOUT.size))
        name = self._text(_NAME_MAX)
        if root:
            if name:
                raise StreamError("the guest's first file has a name")
        elif name in (b"", b".", b"..") or b"/" in name:
            raise StreamError("the guest sent a file name that is none")
        if mtime >= 1 << 62:
            raise StreamError("the guest sent a time that cannot be")
        self._count(1, 0)
        return mode, mtime, name

    def _count(self, files: int, size: int) -> None:
        self._totals.entries += files
        self._totals.bytes += size
        if self._limits.bytes is not None and self._totals.bytes > self._limits.bytes:
            raise StreamError(f"the guest's files have more than {self._limits.bytes} bytes")
        if self._limits.entries is not None and self._totals.entries > self._limits.entries:
            raise StreamError(f"the guest has more than {self._limits.entries} files there")

    def _text(self, most: int) -> bytes:
        size = self._number()
        if size > most:
            raise StreamError("the guest sent a name that is too long")
        value = self._exactly(size)
        if b"\0" in value:
            raise StreamError("the guest sent a name with a NUL")
        return value

    def _number(self) -> int:
        return int.from_bytes(self._exactly(4), "little")

    def _exactly(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) != size:
            raise StreamEnd("the guest's files ended early")
        return data


def _remove(parent: int, name: bytes) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass


def _stays_inside(target: bytes, level: int) -> bool:
    """Whether a link in a directory `level` below the root of the copy leads nowhere above that root.

    Dots that go up may only come first: later ones would start from wherever another link leads.
    """
    if not target or target.startswith(b"/"):
        return False
    leading = True
    for part in target.split(b"/"):
        if part == b"..":
            level -= 1
            if not leading or level < 0:
                return False
        elif part not in (b"", b"."):
            leading = False
    return True
