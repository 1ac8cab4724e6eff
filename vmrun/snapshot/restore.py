"""Opens a snapshot, checks it, and makes it a machine's memory and state. VMM process.

Nothing here depends on how much memory there is: the manifest and the state are read, the disks' files looked
at; memory comes page by page (`vmrun.snapshot.pager`). A snapshot is never written to, so that any number of
machines may be made of it, at once too: each has disks of its own, overlays above the frozen ones.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.overlays import create_overlay
from vmrun.kvm import abi
from vmrun.kvm.identity import cpu_difference
from vmrun.machine.config import DiskConfig, MachineConfig, NicConfig
from vmrun.machine.config_json import parse_config
from vmrun.machine.state import check_clocks, load_state, saved_leaves
from vmrun.snapshot import manifest
from vmrun.snapshot.manifest import FrozenFile
from vmrun.snapshot.memory_file import MemoryFacts, open_memory
from vmrun.snapshot.pager import LazyRam

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
        try:
            self.saved_config = parse_config(self.manifest.config)
            facts = MemoryFacts.load(self.manifest.memory)
            if self.saved_config.memory != facts.size:
                raise ValueError(f"{self.saved_config.memory} bytes of memory and a file of {facts.size}")
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
        throw_away: bool = False,
    ) -> MachineConfig:
        """What a machine made of this snapshot is made of. UserError when a disk is not there or has changed.

        `disks` are the new places of the files that the guest wrote to, in order, `nics` its cards', both all
        or none. A card without a MAC keeps its old one. What the guest writes is thrown away at its end, or
        goes to overlays, whose descriptors are the configuration's (`vmrun.host.overlays.Overlays`).
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
        return replace(saved, disks=found, nics=self._nics(nics))

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

    # What a machine asks for.

    def cpuid(self, cpu: dict[str, Any]) -> list[list[abi.kvm_cpuid_entry2]]:
        try:
            difference = cpu_difference(self.manifest.cpu, cpu)
            if difference is not None:
                raise UserError(f"{self.directory}: cannot be restored here: {difference}", EXIT_IMAGE)
            return saved_leaves(self.state, self.saved_config.cpus)
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def fill(self, machine: "Machine", stack: ExitStack) -> LazyRam:
        lazy = LazyRam(machine.ram, self.memory, machine.end, machine.halt, prefetch=self._prefetch)
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
        self.memory.close()

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
