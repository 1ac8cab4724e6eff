"""What a machine is made of, as frozen dataclasses: checked once, here, then believed everywhere. VMM
process.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vmrun.errors import UserError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """One virtio-blk disk. `format` is "raw" or "qcow2", stated or taken from the suffix: never probed.

    `serial` is what the guest reads as the disk's identity: at most 20 printable ASCII characters.
    """

    path: Path
    format: str
    read_only: bool = False
    serial: str = ""


@dataclass(frozen=True, slots=True)
class NicConfig:
    """One virtio-net card on tap `tap`. `address` is given to the host's end ("172.16.0.1/24"); a MAC is 6
    bytes.
    """

    tap: str
    mac: bytes | None = None
    address: str | None = None


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """`memory` is in bytes. `kernel` None means the guest kit's. `name` stands in messages."""

    memory: int = 128 * MIB
    cpus: int = 1
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str | None = None
    disks: tuple[DiskConfig, ...] = field(default=())
    nics: tuple[NicConfig, ...] = field(default=())
    name: str = "vm"
    verbose: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.cpus <= 64:
            raise UserError(f"--cpus {self.cpus}: give 1 to 64")
        if self.memory < 2 * MIB or self.memory % 4096:
            raise UserError(f"--mem: {self.memory} bytes is not a whole number of pages of at least 2 MiB")
