"""Opens a snapshot, checks it, and makes it a machine's memory and state. VMM process.

Nothing here depends on how much memory there is: the manifest and the state are read, the disks' files looked
at; memory comes page by page (`vmrun.snapshot.pager`). A snapshot is never written to, so that any number of
machines may be made of it, at once too: each has disks of its own, overlays above the frozen ones.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.block.qcow2_header import Header
from devices.errors import ImageError
from devices.pager import userfaultfd
from devices.worker.launcher import Worker
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import backing_config
from vmrun.host.overlays import create_overlay
from vmrun.kvm import abi
from vmrun.kvm.identity import cpu_difference
from vmrun.machine.config import DiskConfig, MachineConfig, Mount, NicConfig
from vmrun.machine.config_json import parse_config
from vmrun.machine.state import check_clocks, load_state, saved_leaves
from vmrun.snapshot import manifest
from vmrun.snapshot.manifest import FrozenFile
from vmrun.snapshot.memory_file import MemoryFacts, open_memory
from vmrun.snapshot.pager import LazyRam, launch_pager

if TYPE_CHECKING:
    from vmrun.machine.machine import Machine


class Snapshot:
    """An open snapshot: a context manager. `vmrun.machine.machine.SavedMachine` for machines made of it.

    `hold`: the machine is to stay paused. `greet`: its guest is told of its new identity; without, somebody
    else does that. `prefetch`: all its memory is brought in, touched or not.
    """

    def __init__(
        self, directory: Path, *, hold: bool = False, prefetch: bool = False, greet: bool = True
    ) -> None:
        """UserError when it is none, is damaged, or is another version's."""
        self.directory = directory.absolute()
        self.hold = hold
        self.greet = greet
        self.manifest = manifest.read(self.directory)
        self.state = manifest.read_state(self.directory, self.manifest)
        self._prefetch = prefetch
        self._pager: Worker | None = None
        try:
            self.saved_config = parse_config(self.manifest.config)
            facts = MemoryFacts.load(self.manifest.memory)
            if self.saved_config.memory != facts.size:
                raise ValueError(f"{self.saved_config.memory} bytes of memory and a file of {facts.size}")
            if any(mount.host is not None for mount in self.saved_config.mounts):
                # None is ever saved: whoever wrote this wants its guest to have our files.
                raise ValueError("it mounts a directory of the host's")
            if len(self.saved_config.disks) != len(self.manifest.disks):
                raise ValueError("it has not the files of each disk")
            if len(self.saved_config.nics) != len(self.manifest.macs):
                raise ValueError("it has not the address of each card")
        except (UserError, ValueError, TypeError) as error:
            raise self._damaged(str(error)) from None
        self.memory = open_memory(self.directory / manifest.MEMORY, facts)

    @property
    def macs(self) -> list[str]:
        """Those that the guest knows its cards by."""
        return self.manifest.macs

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.directory / manifest.MANIFEST}: damaged: {why}", EXIT_IMAGE)

    def config(
        self,
        *,
        disks: Sequence[Path] = (),
        nics: Sequence[NicConfig] = (),
        mounts: Sequence[Mount] = (),
        throw_away: bool = False,
    ) -> MachineConfig:
        """What a machine made of this snapshot is made of. UserError when a disk is not there or has changed.

        `disks` are the new places of the files that the guest wrote to, in order, `nics` its cards', both all
        or none. A card without a MAC keeps its old one. `mounts` go where the snapshot has places of their
        tags. What the guest writes is thrown away at its end, or goes to overlays, whose descriptors are the
        configuration's (`vmrun.host.overlays.Overlays`).
        """
        saved = self.saved_config
        written = [index for index, disk in enumerate(saved.disks) if self._is_written(index)]
        if disks and len(disks) != len(written):
            raise UserError(f"--disk: the snapshot has {len(written)} disks that were written to: give all")
        moved = dict(zip(written, disks, strict=True)) if disks else {}
        found = tuple(self._disk(index, moved.get(index), throw_away) for index in range(len(saved.disks)))
        cdrom = self.manifest.cdrom
        if cdrom is not None:
            manifest.check_frozen(cdrom, self._path(cdrom))
        return replace(saved, disks=found, nics=self._nics(nics), mounts=self._mounts(mounts))

    def _is_written(self, index: int) -> bool:
        disk = self.saved_config.disks[index]
        return isinstance(disk, DiskConfig) and not disk.read_only

    def _disk(self, index: int, moved: Path | None, throw_away: bool) -> DiskConfig:
        files = self.manifest.disks[index]
        disk = self.saved_config.disks[index]
        if not isinstance(disk, DiskConfig) or not files:
            raise self._damaged(f"disk {index} has no files")
        paths = [self._path(file) for file in files]
        if moved is not None:
            paths[0] = moved.absolute()
        for file, path in zip(files, paths, strict=True):
            manifest.check_frozen(file, path)
        directories = tuple(dict.fromkeys((*(path.parent for path in paths), *disk.backing)))
        for number, (file, path) in enumerate(zip(files, paths, strict=True)):
            _check_below(file, path, paths[number + 1] if number + 1 < len(paths) else None, directories)
        frozen = replace(disk, path=paths[0], format=files[0].format, backing=directories, throw_away=False)
        if disk.read_only:
            return frozen
        if throw_away:
            return replace(frozen, throw_away=True)
        return replace(frozen, overlay=create_overlay(frozen, frozen.path.parent))

    def _path(self, file: FrozenFile) -> Path:
        return self.directory / file.path  # an absolute one stays what it is

    def _nics(self, given: Sequence[NicConfig]) -> tuple[NicConfig, ...]:
        saved = self.saved_config.nics
        if given and len(given) != len(saved):
            raise UserError(f"--nic: the snapshot has {len(saved)} network cards: give as many")
        macs = [bytes.fromhex(mac.replace(":", "")) for mac in self.manifest.macs]
        return tuple(
            nic if nic.mac is not None and given else replace(nic, mac=mac)
            for nic, mac in zip(given or saved, macs, strict=True)
        )

    def _mounts(self, given: Sequence[Mount]) -> tuple[Mount, ...]:
        chosen = {mount.tag: mount for mount in given}
        places = [mount.tag for mount in self.saved_config.mounts]
        if missing := sorted(chosen.keys() - set(places)):
            raise UserError(f"the snapshot has no place for a mount {missing[0]}: it has {places}")
        return tuple(chosen.get(place.tag, place) for place in self.saved_config.mounts)

    # What a machine asks for.

    def cpuid(self, cpu: dict[str, Any]) -> list[list[abi.kvm_cpuid_entry2]]:
        try:
            difference = cpu_difference(self.manifest.cpu, cpu)
            if difference is not None:
                raise UserError(f"{self.directory}: cannot be restored here: {difference}", EXIT_IMAGE)
            return saved_leaves(self.state, self.saved_config.cpus)
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def prepare(self) -> None:
        if os.access(userfaultfd.DEVICE, os.R_OK | os.W_OK):
            self._pager = launch_pager(self.memory, prefetch=self._prefetch)

    def fill(self, machine: "Machine", stack: ExitStack) -> LazyRam:
        lazy = LazyRam(
            *(machine.ram, self.memory, machine.end, machine.halt),
            prefetch=self._prefetch,
            pager=self._pager,
        )
        stack.enter_context(lazy)
        lazy.start()
        return lazy

    def load(self, machine: "Machine") -> None:
        try:
            difference = check_clocks(machine, self.state)
            if difference is not None:
                raise UserError(f"{self.directory}: cannot be restored here: {difference}", EXIT_IMAGE)
            load_state(machine, self.state)
        except ValueError as error:
            raise UserError(f"{self.directory}: the state does not fit: {error}", EXIT_IMAGE) from None

    def close(self) -> None:
        if self._pager is not None:
            self._pager.stop(0)  # unless its machine has done so
        self.memory.close()

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_below(file: FrozenFile, path: Path, below: Path | None, allowed: Sequence[Path]) -> None:
    """UserError unless the frozen file at `path` has the file `below` as its backing file, if any. Its header
    may name another one than the manifest, of which nobody knows whether it is what it was: a relative name
    of a file that was moved does, and one that a worker wrote which was taken over.
    """
    found = None
    if file.format == "qcow2":
        fd = manifest.open_file(path)
        try:
            found = backing_config(path, Header(fd), allowed)
        except ImageError as error:
            raise UserError(f"disk {path}: {error}", EXIT_IMAGE) from None
        finally:
            os.close(fd)
    if found is None and below is None:
        return
    if found is None or below is None or not os.path.exists(found.path) or not found.path.samefile(below):
        raise UserError(
            f"disk {path}: below it is {'nothing' if found is None else found.path}, and was "
            f"{'nothing' if below is None else below} when the snapshot was made: it is not the disk that "
            "was saved, or was moved without what is below it",
            EXIT_IMAGE,
        )
