"""What a machine is made of, as frozen dataclasses: checked once, here, then believed everywhere. VMM
process.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from vmrun.errors import UserError

MIB = 1 << 20
MAX_TAG = 36  # bytes; virtio 1.2, 5.11.4


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """One virtio-blk disk. `format` is "raw" or "qcow2", stated or taken from the suffix: never probed.

    `serial` is what the guest reads as the disk's identity: at most 20 printable ASCII characters. `backing`
    are directories that backing files may lie in, symbolic links resolved, besides the disk's own.

    `throw_away`: the guest's writes go to an overlay that ends with the machine, and that grows to `quota`
    bytes at most; `overlay`, when it is there
    already, is the descriptor of that file, which stays its opener's (`vmrun.host.overlays`).
    """

    path: Path
    format: str
    read_only: bool = False
    serial: str = ""
    backing: tuple[Path, ...] = ()
    throw_away: bool = False
    quota: int | None = None
    overlay: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class VhostUserDisk:
    """A virtio-blk disk that a process of somebody else's serves at the UNIX socket `path`."""

    path: Path


@dataclass(frozen=True, slots=True)
class NicConfig:
    """One virtio-net card on tap `tap`. `address` is given to the host's end ("172.16.0.1/24"): the tap, or
    `bridge` if that is given; a MAC is 6 bytes.

    `locked`: the guest sends from its MAC only, and gets only what is for it. `local`: a link of two
    addresses with the host, which the guest learns by DHCP, with `boot_file` (at most 127 bytes) as what to
    boot. `rom` is an option ROM for the firmware.

    `user`: there is no tap, and `tap` is only a name for messages; passt serves the card. The guest then
    reaches public addresses, or only what is in `allow` ("example.org:443", "10.1.0.0/16"), and with
    `allow_private` the private networks too (`vmrun.host.outbound`).
    """

    tap: str
    mac: bytes | None = None
    address: str | None = None
    mtu: int | None = None
    locked: bool = False
    local: bool = False
    bridge: str | None = None
    boot_file: str = ""
    rom: Path | None = None
    user: bool = False
    allow: tuple[str, ...] = ()
    allow_private: bool = False

    def __post_init__(self) -> None:
        taps_only = self.address is not None or self.bridge is not None or self.locked or self.local
        if self.user and taps_only:
            raise UserError(
                f"--nic {self.tap}: ip=, bridge=, locked and local are for taps: a user card has its own "
                "addresses, and sends from those only"
            )
        if (self.allow or self.allow_private) and not self.user:
            raise UserError(
                f"--nic {self.tap}: allow= and allow-private are for --nic user; a tap is not filtered"
            )
        if self.mtu is not None and not 68 <= self.mtu <= 65521:
            raise UserError(f"--nic {self.tap}: mtu={self.mtu}: give 68 to 65521, the sizes a tap takes")
        if self.local and (self.address is not None or self.bridge is not None):
            raise UserError(
                f"--nic {self.tap}: local is a link with the host alone, and chooses the addresses itself: "
                "give it, or ip= and bridge="
            )
        if self.boot_file and not self.local:
            raise UserError(f"--nic {self.tap}: boot= is what the DHCP answer of local hands out: add local")
        if len(os.fsencode(self.boot_file)) > 127 or "\0" in self.boot_file:
            raise UserError(f"--nic {self.tap}: boot= is a file name of at most 127 bytes")


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of the host's that the guest may mount, as the virtiofs of name `tag`: 1 to 36 bytes of
    UTF-8.

    `host` None is a place for one: the device is there, and the guest's mount(2) would wait. A machine made
    of this one's snapshot may have a directory there.
    """

    host: Path | None
    tag: str
    read_only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.tag.encode()) <= MAX_TAG or not self.tag.isprintable():
            raise UserError(f"a mount's tag is 1 to {MAX_TAG} bytes of printable text, not {self.tag!r}")


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """`memory` is in bytes. `kernel` None means the guest kit's, unless there is `firmware`, which then looks
    for something to boot itself. `name` stands in messages.

    `legacy_virtio`: the guest sees virtio devices as they were before virtio 1.0. `agent`: it has ports for
    an agent, through which programs are run in it.
    """

    memory: int = 128 * MIB
    cpus: int = 1
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str | None = None
    disks: tuple[DiskConfig | VhostUserDisk, ...] = field(default=())
    nics: tuple[NicConfig, ...] = field(default=())
    mounts: tuple[Mount, ...] = field(default=())
    cdrom: Path | None = None
    firmware: Path | None = None
    legacy_virtio: bool = False
    agent: bool = True
    name: str = "vm"
    verbose: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.cpus <= 64:
            raise UserError(f"--cpus {self.cpus}: give 1 to 64")
        if self.memory < 2 * MIB or self.memory % 4096:
            raise UserError(f"--mem: {self.memory} bytes is not a whole number of pages of at least 2 MiB")
        if self.firmware is not None and (self.kernel or self.initrd or self.cmdline is not None):
            raise UserError("--firmware finds what to boot itself: leave out --kernel, --initrd and --append")
        if len({mount.tag for mount in self.mounts}) < len(self.mounts):
            raise UserError("each mount needs a tag of its own")
        if self.mounts and self.legacy_virtio:
            raise UserError("virtiofs is younger than what --legacy-virtio shows: leave out one of them")
        roms = {nic.rom for nic in self.nics}
        if roms != {None} and self.nics:
            if self.firmware is None:
                raise UserError("--nic rom= is an option ROM for firmware: add --firmware")
            if len(roms - {None}) > 1:
                raise UserError("--nic rom=: all cards are of one kind and use one ROM: give the same file")
