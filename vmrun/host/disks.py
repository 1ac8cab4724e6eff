"""Disk files: found, opened, and locked against another vmrun, before a worker gets them. VMM process.

Workers open nothing: they get these fds. The lock is an OFD lock (fcntl(2), "Open file description locks"),
which belongs to the open file description: it travels with the fd to the worker and lasts until the last copy
is closed, whoever dies first.

QEMU locks with OFD locks too (block/file-posix.c, "permissions"): a read lock on byte 100 + n says "I use
permission n", one on byte 200 + n "nobody else may". Who writes locks the whole file exclusively, which
agrees with nobody; who reads locks what a reader in QEMU locks. So one base image serves any number of
readers here and there, and no reader meets a writer.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from devices.block.image import SECTOR_SIZE
from devices.block.qcow2_header import COMPRESSION_ZSTD, Header
from devices.block.qcow2_journal import JOURNAL_SIZE
from devices.errors import ImageError
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import FORMATS, MAX_BACKING_FILES, backing_config
from vmrun.machine.config import DiskConfig

SUFFIXES = {".qcow2": "qcow2", ".qcow": "qcow2", ".raw": "raw", ".img": "raw"}

# QEMU's permissions: 0 consistent read, 1 write, 3 resize. A reader uses 0 and forbids 1 and 3 to others.
READER_LOCKS = (100, 201, 203)
READER_CONFLICTS = (101, 103, 200)

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
    if found is None and path.is_dir():
        raise UserError(f"--disk {path}: is a directory, not a disk", EXIT_IMAGE)
    if found is None:
        raise UserError(
            f"--disk {path}: the suffix does not tell the format: add ,format=raw or ,format=qcow2"
        )
    return found


class OpenDisk:
    """One open, locked disk file. Owns `fd`; closing it leaves the lock to the worker's copy.

    `header` is a qcow2 image's, checked: all of an image that is ever parsed in this process.
    """

    __slots__ = ("config", "fd", "header", "identity")

    def __init__(self, config: DiskConfig) -> None:
        self.config = config
        self.header: Header | None = None
        self.fd = _open(config) if config.overlay is None else os.dup(config.overlay)
        try:
            status = os.fstat(self.fd)
            self.identity = (status.st_dev, status.st_ino)
            _lock(self.fd, config)
            if self.format == "qcow2":
                self.header = Header(self.fd)
        except ImageError as error:
            self.close()
            raise UserError(f"disk {config.path}: {error}", EXIT_IMAGE) from None
        except BaseException:
            self.close()
            raise

    @property
    def format(self) -> str:
        """Of what `fd` is."""
        return self.config.format if self.config.overlay is None else "qcow2"

    @property
    def size(self) -> int:
        """Of the guest's disk, in bytes."""
        if self.header is not None:
            return int(self.header.size)
        return -(-os.lseek(self.fd, 0, os.SEEK_END) // SECTOR_SIZE) * SECTOR_SIZE

    def read_again(self) -> None:
        """After its worker has ended, which may have made the image larger. UserError when it has another
        backing file than before: no worker of ours does that, and whoever took one over could have us open
        any file of the directory as a part of the disk.
        """
        before = self.header
        if before is None:
            return
        try:
            now = Header(self.fd)
        except ImageError as error:
            raise UserError(f"disk {self.config.path}: {error}", EXIT_IMAGE) from None
        if (now.backing_file, now.backing_format) != (before.backing_file, before.backing_format):
            raise UserError(
                f"disk {self.config.path}: its header names another backing file than when it was opened, "
                "which nothing but a compromised worker does: compare it with a backup",
                EXIT_IMAGE,
            )
        self.header = now

    def unlock(self) -> None:
        """To open the file anew while whoever made it still has a descriptor, which shares the lock."""
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class MachineDisk(OpenDisk):
    """A disk of the machine with all its worker needs: the files below it, and the journal that survives the
    worker. Owns them.
    """

    __slots__ = ("backing", "journal")

    def __init__(self, config: DiskConfig) -> None:
        self.backing: list[OpenDisk] = []
        self.journal = -1
        super().__init__(config)
        try:
            self._open_backing_files()
            if self.header is not None and not config.read_only:
                self.journal = _create_journal()
        except BaseException:
            self.close()
            raise

    def _open_backing_files(self) -> None:
        disk: OpenDisk = self
        while (config := self._below(disk)) is not None:
            where = f"disk {disk.config.path}: its backing file {config.path}"
            if len(self.backing) == MAX_BACKING_FILES:
                raise UserError(
                    f"disk {self.config.path}: more than {MAX_BACKING_FILES} backing files below it: "
                    "merge some of them with qemu-img commit or rebase",
                    EXIT_IMAGE,
                )
            try:
                disk = OpenDisk(config)
                loop = disk.identity in self.identities
                self.backing.append(disk)
            except DiskBusyError:
                # Our own lock on an image that is written to says no like a stranger's.
                if _identity(config.path) not in self.identities:
                    raise
                loop = True
            except UserError as error:
                raise UserError(f"{error} (a backing file of disk {self.config.path})", error.code) from None
            if loop:
                raise UserError(f"{where} is itself or an image above it", EXIT_IMAGE)

    def _below(self, disk: OpenDisk) -> DiskConfig | None:
        """The backing file of `disk`, one of this chain. What is below an overlay of ours is no question to
        its header.
        """
        if disk.config.overlay is not None:
            return replace(disk.config, read_only=True, throw_away=False, overlay=None)
        if disk.header is None:
            return None
        allowed = (*self.config.backing, self.config.path.parent)
        return backing_config(disk.config.path, disk.header, allowed)

    @property
    def identities(self) -> list[tuple[int, int]]:
        """Of this file and all below it."""
        return [self.identity, *(disk.identity for disk in self.backing)]

    @property
    def words(self) -> dict[str, str]:
        """For the worker's command line (`devices.worker.main`)."""
        config = self.config
        words = {"format": self.format, "read_only": str(int(config.read_only))}
        if config.serial:
            words["serial"] = config.serial
        if config.quota is not None:
            words["quota"] = str(config.quota)
        if self.backing:
            words["backing"] = ",".join(disk.config.format for disk in self.backing)
        headers = [disk.header for disk in (self, *self.backing)]
        if any(header is not None and header.compression_type == COMPRESSION_ZSTD for header in headers):
            words["zstd"] = "1"
        return words

    @property
    def fds(self) -> dict[str, int]:
        """The descriptors for the worker, by their words. They stay this object's."""
        fds = {"image": self.fd}
        fds.update((f"backing{index}", disk.fd) for index, disk in enumerate(self.backing))
        if self.journal >= 0:
            fds["journal"] = self.journal
        return fds

    def close(self) -> None:
        if self.journal >= 0:
            os.close(self.journal)
            self.journal = -1
        while self.backing:
            self.backing.pop().close()
        super().close()


def _create_journal() -> int:
    fd = os.memfd_create("vmrun-qcow2-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, JOURNAL_SIZE)
    # Who has it mapped must not be cut off by a worker that was taken over.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


class Disks:
    """The open disks of one machine, in order: a context manager that owns them all."""

    def __init__(self, configs: Iterable[DiskConfig]) -> None:
        self._disks: list[MachineDisk] = []
        try:
            for config in configs:
                self._disks.append(self._open_another(config))
        except BaseException:
            self.close()
            raise

    def _open_another(self, config: DiskConfig) -> MachineDisk:
        try:
            return MachineDisk(config)
        except DiskBusyError as error:
            # Our own earlier lock says no just like a stranger's.
            identity = _identity(error.path)
            if identity in (disk.identity for disk in self._disks) and error.path == config.path:
                raise UserError(
                    f"--disk {config.path}: the same file is given twice: only ,ro disks may be", EXIT_IMAGE
                ) from None
            if any(identity in disk.identities for disk in self._disks):
                raise UserError(
                    f"--disk {config.path}: {error.path} is one disk and a backing file of another: "
                    "only ,ro disks may be",
                    EXIT_IMAGE,
                ) from None
            raise

    def __iter__(self) -> Iterator[MachineDisk]:
        return iter(self._disks)

    def __getitem__(self, index: int) -> MachineDisk:
        return self._disks[index]

    def exchange(self, index: int, config: DiskConfig) -> MachineDisk:
        """Close disk `index`, which no worker has any more, and open `config` in its place. Raises as the
        constructor does; then the disk is closed.
        """
        if self._disks[index].fd >= 0:
            self._disks[index].unlock()
        self._disks[index].close()
        self._disks[index] = MachineDisk(config)
        return self._disks[index]

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
    """Somebody else holds a lock on the file at `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"disk {path}: is in use by another vmrun (or QEMU)", EXIT_IMAGE)
        self.path = path


def _open(config: DiskConfig) -> int:
    path = config.path
    # O_NONBLOCK: the name may turn out to be a FIFO, which must not hang us.
    flags = (os.O_RDONLY if config.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    fd = -1
    try:
        fd = _open_exclusive_if_block_device(path, flags)
        status = os.fstat(fd)
        mode = status.st_mode
        if status.st_dev in _kernel_file_systems():
            raise UserError(f"disk {path}: not a file of a disk but the kernel's", EXIT_IMAGE)
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


def _kernel_file_systems() -> set[int]:
    """The device numbers of /proc and /sys. Their files pass for regular ones, and an image may call one its
    backing file: /proc/self/mem would hand a worker the memory of the VMM.
    """
    return {os.stat(path).st_dev for path in ("/proc", "/sys") if os.path.ismount(path)}


def _open_exclusive_if_block_device(path: Path, flags: int) -> int:
    # Asked first, and again when it is open: the name may be an image's choice (a backing file), and opening
    # alone does something to many device nodes: it starts a watchdog, rewinds a tape, wakes a FIFO's writer.
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"disk {path}: not a file and not a block device", EXIT_IMAGE)
    # On a block device O_EXCL (without O_CREAT) fails with EBUSY while it is mounted or part of a volume; a
    # lock alone would not know. On other files it means nothing, so asking first what it is opens no race
    # that matters.
    if flags & os.O_RDWR and stat.S_ISBLK(mode):
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
    try:
        if not config.read_only:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            return
        for byte in READER_LOCKS:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        # First lock, then look: of two that begin at once, at least one sees the other.
        for byte in READER_CONFLICTS:
            query = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            if FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))[0] != fcntl.F_UNLCK:
                raise DiskBusyError(config.path)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise DiskBusyError(config.path) from None
        raise OSError(error.errno, f"disk {config.path} cannot be locked: {error.strerror}") from None
