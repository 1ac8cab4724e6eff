"""What a sandbox is made of, as the user says it: checked once. Owner's process."""

from dataclasses import dataclass
from pathlib import Path

from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.config import MIB, DiskConfig, NicConfig

DEFAULT_MEMORY = 512 * MIB
DEFAULT_QUOTA = 10 << 30  # bytes that a guest may write over its image


@dataclass(frozen=True, slots=True)
class SharedDirectory:
    """The host's directory `host` is to be the guest's `guest`, live."""

    host: Path
    guest: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """`image` is what `vmrun.image.resolve` takes; `kernel` None means the guest kit's. `memory` is in bytes.

    `disks` are the guest's from /dev/vdb on; /dev/vda is the image, of which it may write over `quota` bytes.
    `nics` are its cards. `fresh`: boot, and use no template.
    """

    image: str = "kit"
    kernel: Path | None = None
    memory: int = DEFAULT_MEMORY
    cpus: int = 1
    disks: tuple[DiskConfig, ...] = ()
    nics: tuple[NicConfig, ...] = ()
    mounts: tuple[SharedDirectory, ...] = ()
    quota: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.kernel is not None and not self.kernel.exists():
            raise UserError(f"--kernel {self.kernel}: no such file", EXIT_IMAGE)
        if not self.image:
            raise UserError("--image: give a directory, a disk, an OCI layout or a tar; or leave it out")
