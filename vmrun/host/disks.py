"""Disk files: found, opened, and locked against another vmrun, before a worker gets them. VMM process.

Workers open nothing: they get these fds. The lock is an OFD lock (fcntl(2), "Open file description locks"),
which belongs to the open file description: it travels with the fd to the worker and lasts until the last copy
is closed, whoever dies first. QEMU locks with OFD locks too, so a disk in use by QEMU is refused as well, and
the other way round.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.config import DiskConfig

FORMATS = ("raw", "qcow2")
SUFFIXES = {".qcow2": "qcow2", ".qcow": "qcow2", ".raw": "raw", ".img": "raw"}

FLOCK = struct.Struct("hh4xqqi4x")  # struct flock; l_pid must be 0 for OFD locks


def disk_format(path: Path, stated: str | None = None) -> str:
    """The format of a disk: as stated, or by suffix. Never by content: a guest could write a qcow2 header
    into a raw disk, and have us follow its backing file the next time.
    """
    if stated is not None:
        if stated not in FORMATS:
            raise UserError(f"--disk {path}: format={stated}: give one of {', '.join(FORMATS)}")
        return stated
    found = SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise UserError(
            f"--disk {path}: the suffix does not tell the format: add ,format=raw or ,format=qcow2"
        )
    return found


class OpenDisk:
    """One open, locked disk file. Owns `fd`; closing it leaves the lock to the worker's copy."""

    __slots__ = ("config", "fd", "identity")

    def __init__(self, config: DiskConfig) -> None:
        self.config = config
        self.fd = _open(config)
        try:
            status = os.fstat(self.fd)
            self.identity = (status.st_dev, status.st_ino)
            _lock(self.fd, config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Disks:
    """The open disks of one machine, in order: a context manager that owns them all."""

    def __init__(self, configs: Iterable[DiskConfig]) -> None:
        self._disks: list[OpenDisk] = []
        try:
            for config in configs:
                self._disks.append(self._open_another(config))
        except BaseException:
            self.close()
            raise

    def _open_another(self, config: DiskConfig) -> OpenDisk:
        try:
            return OpenDisk(config)
        except DiskBusyError:
            # Our own earlier lock says no just like a stranger's.
            status = os.stat(config.path)
            if (status.st_dev, status.st_ino) in (disk.identity for disk in self._disks):
                raise UserError(
                    f"--disk {config.path}: the same file is given twice: only ,ro disks may be", EXIT_IMAGE
                ) from None
            raise

    def __iter__(self) -> Iterator[OpenDisk]:
        return iter(self._disks)

    def __len__(self) -> int:
        return len(self._disks)

    def close(self) -> None:
        while self._disks:
            self._disks.pop().close()

    def __enter__(self) -> "Disks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DiskBusyError(UserError):
    """Another process holds a lock on the disk."""


def _open(config: DiskConfig) -> int:
    path = config.path
    # O_NONBLOCK: the name may turn out to be a FIFO, which must not hang us.
    flags = (os.O_RDONLY if config.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    fd = -1
    try:
        fd = _open_exclusive_if_block_device(path, flags)
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UserError(f"disk {path}: not a file and not a block device", EXIT_IMAGE)
        if stat.S_ISREG(mode) and not config.read_only and not mode & 0o222:
            # Root could write to it all the same; whoever took the write bits away did not want that.
            raise UserError(f"disk {path}: the file is read-only: add ,ro, or chmod u+w it", EXIT_IMAGE)
        os.set_blocking(fd, True)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, OSError):
            raise _open_error(config, error) from None
        raise
    return fd


def _open_exclusive_if_block_device(path: Path, flags: int) -> int:
    if not flags & os.O_RDWR:
        return os.open(path, flags)
    # On a block device O_EXCL (without O_CREAT) fails with EBUSY while it is mounted or part of a volume; a
    # lock alone would not know. On other files it means nothing, so asking first what it is opens no race
    # that matters.
    if stat.S_ISBLK(os.stat(path).st_mode):
        flags |= os.O_EXCL
    return os.open(path, flags)


def _open_error(config: DiskConfig, error: OSError) -> Exception:
    path = config.path
    text = None
    if error.errno == errno.ENOENT:
        text = "no such file"
    elif error.errno == errno.EISDIR:
        text = "is a directory, not a disk"
    elif error.errno == errno.EBUSY:
        text = "the block device is in use (mounted?)"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        readable = not config.read_only and os.access(path, os.R_OK)
        text = "may be read but not written: add ,ro" if readable else "permission denied"
    elif error.errno in (
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.ENXIO,
        errno.ENODEV,
        errno.ETXTBSY,
    ):
        text = (error.strerror or "cannot be opened").lower()
    if text is None:
        return OSError(error.errno, f"disk {path}: {error.strerror}")
    return UserError(f"disk {path}: {text}", EXIT_IMAGE)


def _lock(fd: int, config: DiskConfig) -> None:
    kind = fcntl.F_RDLCK if config.read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise DiskBusyError(
                f"disk {config.path}: is in use by another vmrun (or QEMU)", EXIT_IMAGE
            ) from None
        raise OSError(error.errno, f"disk {config.path} cannot be locked: {error.strerror}") from None
