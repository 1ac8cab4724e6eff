"""Writes a snapshot of a machine that holds still. VMM process, on the thread of a parked vCPU.

Everything goes into a directory of another name beside the wanted one, which is renamed when it is whole:
whatever ends us before that leaves no snapshot, and the next one to that name removes what is there. The
disks are frozen meanwhile: each image's worker finishes, flushes and ends, and the image becomes the backing
file of a new overlay, which another worker serves. A disk is not written to from the moment its facts are
taken; should something go wrong, the machine goes on with the disks it had.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import vmrun
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.new_file import give_name
from vmrun.host.overlays import create_overlay, free_name, temporary_directory
from vmrun.machine.config import DiskConfig, MachineConfig
from vmrun.machine.config_json import describe_config
from vmrun.machine.state import save_state
from vmrun.snapshot import manifest
from vmrun.snapshot.manifest import FrozenFile, Manifest
from vmrun.snapshot.memory_file import write_memory
from vmrun.snapshot.sha256 import sha256

if TYPE_CHECKING:
    from vmrun.host.disks import MachineDisk
    from vmrun.machine.machine import Machine

logger = logging.getLogger(__name__)

COPY_PIECE = 1 << 24


@dataclass(frozen=True, slots=True)
class Saved:
    """What came of it: where the snapshot is, with what configuration the machine goes on, and which frozen
    images go on as which new ones.
    """

    directory: Path
    config: MachineConfig
    frozen: dict[str, str]
    memory_bytes: int
    seconds: float


class _Disk:
    """One disk that is written to, while it is being frozen."""

    def __init__(self, index: int, config: DiskConfig) -> None:
        self.index = index
        self.config = config
        self.overlay = -1  # the new one, as long as it is ours
        self.released = False  # its worker is, or was told to end
        self.exchanged = False
        self.name: Path | None = None  # the new overlay's


def save(machine: "Machine", directory: Path, *, go_on: bool) -> Saved:
    """Write the snapshot `directory`, which must not exist. Unless the machine is to `go_on`, it gets no new
    disks, and can only be ended. Raises UserError and OSError; the machine then has the disks it had.
    """
    began = time.monotonic()
    directory = directory.absolute()
    check(machine.config)
    disks = [
        _Disk(index, disk)
        for index, disk in enumerate(machine.config.disks)
        if isinstance(disk, DiskConfig) and not disk.read_only
    ]
    with _partial(directory) as partial:
        state = json.dumps(save_state(machine), separators=(",", ":")).encode()
        manifest.write_file(partial / manifest.STATE, state)
        memory = write_memory(
            machine.ram.fd, machine.config.memory, partial / manifest.MEMORY, machine.memory_source()
        )
        try:
            files = {disk.index: _freeze(machine, disk, partial) for disk in disks}
            for index, config in enumerate(machine.config.disks):
                if index not in files:
                    chain = isinstance(config, DiskConfig)
                    files[index] = _chain(machine.disk(index), partial) if chain else []
            if go_on:
                for disk in disks:
                    size = machine.disk(disk.index).size
                    _exchange(machine, disk, _overlay_config(disk, partial, directory, size))
            cdrom = machine.config.cdrom
            manifest.write(
                Manifest(
                    name=machine.config.name,
                    created=time.time(),
                    vmrun=vmrun.__version__,
                    config=describe_config(_saved_config(machine.config)),
                    cpu=machine.cpu_identity(),
                    memory=memory.save(),
                    state_sha256=sha256(state).hexdigest(),
                    disks=[files[index] for index in sorted(files)],
                    cdrom=None if cdrom is None else manifest.freeze(cdrom, "raw", partial),
                    macs=machine.macs(),
                ),
                partial,
            )
            _commit(partial, directory)
            if go_on:
                _name_overlays(disks, directory, partial)
        except BaseException:
            _go_back(machine, disks)
            raise
        finally:
            if not go_on:
                _close(disks)
    now, frozen = _going_on(machine.config, disks if go_on else [], directory)
    _close(disks)
    memory_bytes = memory.data_chunks * memory.chunk_size
    return Saved(directory, now, frozen, memory_bytes, time.monotonic() - began)


def check(config: MachineConfig) -> None:
    """UserError for a machine that cannot be saved."""
    if config.firmware is not None:
        raise UserError("a machine that was started by firmware cannot be saved: boot it with --kernel")
    if any(not isinstance(disk, DiskConfig) for disk in config.disks):
        raise UserError("a machine with a vhost-user disk cannot be saved: what serves it cannot be frozen")
    if any(mount.host is not None for mount in config.mounts):
        raise UserError(
            "a machine with a directory of the host's mounted cannot be saved: which files its guest has "
            "open is known to virtiofsd only"
        )


def _saved_config(config: MachineConfig) -> MachineConfig:
    """What the machine is made of, with paths that mean the same elsewhere."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    return replace(
        config,
        kernel=absolute(config.kernel),
        initrd=absolute(config.initrd),
        cdrom=absolute(config.cdrom),
        disks=tuple(
            replace(disk, path=disk.path.absolute(), backing=_directories(disk), overlay=None)
            for disk in config.disks
            if isinstance(disk, DiskConfig)
        ),
    )


def _directories(disk: DiskConfig) -> tuple[Path, ...]:
    """Where what is below the disk may be, and where the disk itself is, for whatever goes above it."""
    own = disk.path.absolute().parent
    others = [each.absolute() for each in disk.backing if each.absolute() != own]
    return (own, *others)


@contextmanager
def _partial(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, gone at the end if it is still there. The file beside it is locked
    by whoever makes a snapshot of that name.
    """
    if directory.exists() or directory.is_symlink():
        raise UserError(f"{directory}: is there already, and is not overwritten: remove it first", EXIT_IMAGE)
    partial = directory.with_name(f".{directory.name}.partial")
    lock = directory.with_name(f".{directory.name}.lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UserError(f"{directory}: {(error.strerror or str(error)).lower()}", EXIT_IMAGE) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _another(directory) from None
        try:
            if not os.path.samestat(os.stat(lock), os.fstat(fd)):
                raise _another(directory)
        except FileNotFoundError:
            # Its maker has just removed it: whoever comes next locks another file.
            raise _another(directory) from None
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        partial.mkdir(mode=0o700)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _another(directory: Path) -> UserError:
    return UserError(f"{directory}: another snapshot of that name is being made")


def _freeze(machine: "Machine", disk: _Disk, partial: Path) -> list[FrozenFile]:
    """Let the disk's worker end; nobody writes to the image from now on. Returns the facts of its files."""
    open_disk = machine.disk(disk.index)
    disk.released = True
    machine.workers[f"blk{disk.index}"].release()
    open_disk.read_again()
    files = _chain(open_disk, partial)
    overlay = disk.config.overlay
    if overlay is not None:
        kept = partial / f"disk{disk.index}.qcow2"
        _keep(overlay, kept)
        files[:0] = [manifest.freeze(kept, "qcow2", partial)]
    return files


def _chain(disk: "MachineDisk", partial: Path) -> list[FrozenFile]:
    """The files of a disk that have names, the topmost first."""
    named = [each for each in (disk, *disk.backing) if each.config.overlay is None]
    return [manifest.freeze(each.config.path, each.config.format, partial) for each in named]


def _keep(overlay: int, path: Path) -> None:
    """Let what a throw-away overlay has so far be the file `path`: the very file, where the file system
    allows it, since the machine goes on with another one above it.
    """
    try:
        give_name(overlay, path)
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOENT, errno.EPERM):
            raise
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(overlay).st_size
        os.ftruncate(fd, size)
        at = 0
        while at < size:
            try:
                at = os.lseek(overlay, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # nothing but a hole up to the end
                raise
            end = os.lseek(overlay, at, os.SEEK_HOLE)
            os.lseek(fd, at, os.SEEK_SET)
            while at < end:
                at += os.sendfile(fd, overlay, at, min(end - at, COPY_PIECE))
        os.fsync(fd)
    finally:
        os.close(fd)


def _overlay_config(disk: _Disk, partial: Path, directory: Path, size: int) -> DiskConfig:
    """The frozen disk with a new overlay above it."""
    if disk.config.throw_away:
        name = f"disk{disk.index}.qcow2"
        kept = _kept_config(disk, partial / name, None)
        disk.overlay = create_overlay(kept, temporary_directory(), size, directory / name)
        return replace(kept, overlay=disk.overlay)
    disk.overlay = create_overlay(disk.config, disk.config.path.absolute().parent, size)
    return replace(disk.config, overlay=disk.overlay)


def _kept_config(disk: _Disk, path: Path, overlay: int | None) -> DiskConfig:
    """A throw-away disk of which the snapshot keeps `path`: in all else, its quota too, what it was."""
    return replace(disk.config, path=path, format="qcow2", backing=_directories(disk.config), overlay=overlay)


def _exchange(machine: "Machine", disk: _Disk, config: DiskConfig) -> None:
    disk.exchanged = True
    machine.exchange_disk(disk.index, config)


def _go_back(machine: "Machine", disks: list[_Disk]) -> None:
    """Give the machine the disks it had."""
    for disk in disks:
        if disk.name is not None:
            disk.name.unlink(missing_ok=True)
        if not disk.released:
            continue  # its worker serves it
        try:
            if disk.exchanged:
                _forget_overlay(machine, disk)
                machine.exchange_disk(disk.index, disk.config)
            else:
                # The very files, and the journal: a worker that did not end well left there what it had not
                # written to the image yet.
                machine.exchange_disk(disk.index)
        except (OSError, UserError) as error:
            # Its requests wait; a machine without its disk says so once it is asked for anything.
            logger.error("disk %d cannot go on: %s", disk.index, error)
    _close(disks)


def _forget_overlay(machine: "Machine", disk: _Disk) -> None:
    try:
        machine.workers[f"blk{disk.index}"].release()
    except OSError as error:
        # The guest has not run with it: what it served holds nothing.
        logger.warning("disk %d: %s", disk.index, error)


def _commit(partial: Path, directory: Path) -> None:
    _sync(partial)
    try:
        os.rename(partial, directory)
    except OSError as error:
        raise UserError(f"{directory}: {(error.strerror or str(error)).lower()}", EXIT_IMAGE) from None
    try:
        _sync(directory.parent)
    except BaseException:
        os.rename(directory, partial)
        raise


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _name_overlays(disks: list[_Disk], directory: Path, partial: Path) -> None:
    """The snapshot is there: what the machine writes from now on is to stay as well. Where an overlay cannot
    have a name, all that would be lost with the machine, so then there is no snapshot either.
    """
    try:
        for disk in disks:
            if not disk.config.throw_away:
                path = free_name(disk.config.path)
                give_name(disk.overlay, path)
                disk.name = path
    except BaseException:
        os.rename(directory, partial)
        raise


def _going_on(
    config: MachineConfig, disks: list[_Disk], directory: Path
) -> tuple[MachineConfig, dict[str, str]]:
    """What the machine is made of now, and which image goes on as which."""
    frozen = {}
    configs = list(config.disks)
    for disk in disks:
        if disk.name is None:
            configs[disk.index] = _kept_config(disk, directory / f"disk{disk.index}.qcow2", disk.overlay)
            disk.overlay = -1  # from now on the machine's
            continue
        frozen[os.fspath(disk.config.path)] = os.fspath(disk.name)
        configs[disk.index] = replace(disk.config, path=disk.name, format="qcow2")
    return replace(config, disks=tuple(configs)), frozen


def _close(disks: list[_Disk]) -> None:
    for disk in disks:
        if disk.overlay >= 0:
            os.close(disk.overlay)
            disk.overlay = -1
