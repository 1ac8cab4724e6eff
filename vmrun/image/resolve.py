"""`resolve()`: from what a user names to a disk, converted on the way when it was not before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.guestkit import cache as kit_cache
from vmrun.guestkit.progress import Progress, Silent
from vmrun.image import cache, directory, docker, ext4, oci
from vmrun.image.config import Image, ImageConfig
from vmrun.image.layers import Layers
from vmrun.image.limits import Limits, refused
from vmrun.image.source import KIT, Source, parse
from vmrun.image.spool import Spool
from vmrun.image.stream import BLOCK, Decompressed, FileSlice, Hashed
from vmrun.image.tree import Tree


def resolve(
    spec: str | Path = KIT,
    progress: Progress | None = None,
    *,
    limits: Limits | None = None,
    disk_size: int | None = None,
) -> Image:
    """The image `spec` names, as a disk to put overlays over.

    `disk_size` is in bytes, for what is converted: as large as the disk is to be, instead of content and
    some room. What was converted before is found in the cache in milliseconds, whatever `limits` say now.
    Raises UserError for images that are missing, damaged, hostile or for another machine, and OSError when
    the host fails.
    """
    limits = limits or Limits()
    teller = progress or Silent()
    source = parse(spec, limits)
    conversion = _Conversion(str(spec), source, teller, limits, disk_size)
    if source.kind == KIT:
        return _kit()
    if source.kind in ("raw", "qcow2"):
        return _disk(source)
    if source.kind == "dir":
        return conversion.of_directory()
    if source.kind == "oci":
        blobs = oci.Directory(source.path)
        return conversion.of_oci(blobs, oci.find(blobs, source.tag), "oci")
    if source.kind == "docker":
        return conversion.of_docker()
    return conversion.of_tar()


def _kit() -> Image:
    from vmrun.guestkit import kit

    found = kit.find()
    if found is None:
        raise UserError("the guest kit is not built: vmrun guest build, or make guest", EXIT_IMAGE)
    # Its directory is named after a hash of all that it was made from.
    name = found.disk.parent.name
    return Image(found.disk, "qcow2", cache.digest(KIT, name), ImageConfig(), "ext4", KIT)


def _disk(source: Source) -> Image:
    """A disk as it is. Its key is that of its files, with those below it: nobody hashes terabytes."""
    from vmrun.host.disks import MachineDisk
    from vmrun.machine.config import DiskConfig

    disk = MachineDisk(DiskConfig(source.path, source.kind, read_only=True))
    try:
        files = [disk, *disk.backing]
        key = cache.digest("disk", *(_identity(file.fd) for file in files))
        file_system = _file_system(disk.fd) if source.kind == "raw" else ""
        backing = tuple(file.config.path for file in disk.backing)
    finally:
        disk.close()
    return Image(source.path, source.kind, key, ImageConfig(), file_system, "disk", backing)


class _Conversion:
    """One image on its way to the cache."""

    def __init__(
        self, spec: str, source: Source, progress: Progress, limits: Limits, disk_size: int | None
    ) -> None:
        if disk_size is not None and not 0 < disk_size <= 1 << 44:
            raise UserError("--disk-size: give up to 16T")
        # Whole blocks, so that two ways to say the same are the same.
        self._disk_size = None if disk_size is None else -(-disk_size // ext4.BLOCK) * ext4.BLOCK
        self._spec = spec
        self._path = source.path
        self._tag = source.tag
        self._progress = progress
        self._limits = limits

    def of_directory(self) -> Image:
        key = self._key("directory", directory.key(self._path, self._limits))

        def make(into: Path) -> None:
            with Spool(into, self._limits) as spool:
                tree = directory.read(self._path, spool, self._limits, self._progress)
                # A build that goes on in there while we read gives half of this and half of that.
                if self._key("directory", directory.key(self._path, self._limits)) != key:
                    raise refused(f"image {self._path}: it changed while it was read: try again")
                self._write(into, tree, spool, "directory", ImageConfig())

        return cache.find_or_make(key, make)

    def of_oci(self, blobs: oci.Blobs, image: oci.OciImage, kind: str) -> Image:
        def make(into: Path) -> None:
            with Spool(into, self._limits) as spool:
                layers = Layers(spool, self._limits)
                oci.merge(blobs, image, layers, self._limits, self._progress)
                self._write(into, layers.tree, spool, kind, image.config)

        # Both kinds name their layers in the same configuration.
        return cache.find_or_make(self._key("oci", image.key), make)

    def of_docker(self) -> Image:
        with _open(self._path) as fd:
            identity: list[int | str] = ["docker", self._tag, str(self._disk_size), *_identity(fd)]
            known = cache.known(identity)
            found = cache.find(known) if known is not None else None
            if found is not None:
                return found
            with self._uncompressed(fd) as (archive, size):
                blobs = docker.ArchiveBlobs(archive, size, f"image {self._path}", self._limits)
                image = self.of_oci(blobs, docker.find(blobs, self._tag), "docker")
            cache.remember(identity, image.digest)
            return image

    def of_tar(self) -> Image:
        with _open(self._path) as fd:
            size = os.fstat(fd).st_size
            identity: list[int | str] = ["tar", *_identity(fd)]
            content = cache.known(identity)
            if content is None:
                self._progress.step(f"hashing {self._path}", size >> 20)
                whole = Hashed(FileSlice(fd, 0, size), progress=self._progress)
                whole.read_rest()
                content = whole.hexdigest()
                cache.remember(identity, content)

            def make(into: Path) -> None:
                with Spool(into, self._limits) as spool:
                    self._progress.step(f"reading {self._path}", size >> 20)
                    packed = Hashed(FileSlice(fd, 0, size), progress=self._progress)
                    what = f"image {self._path}"
                    layers = Layers(spool, self._limits)
                    layers.add(Decompressed(packed, what, self._limits), what, whiteouts=False)
                    packed.read_rest()
                    if packed.hexdigest() != content:
                        raise refused(f"{what}: it changed while it was read: try again")
                    self._write(into, layers.tree, spool, "tar", ImageConfig())

            return cache.find_or_make(self._key("tar", content), make)

    def _key(self, kind: str, content: str) -> str:
        return cache.digest(kind, content, self._disk_size)

    def _write(self, into: Path, tree: Tree, spool: Spool, kind: str, config: ImageConfig) -> None:
        disk = into / cache.DISK
        ext4.write(tree, spool.fd, disk, self._disk_size or ext4.default_size(tree), self._progress)
        # The image's secrets, and those of its environment, are not for the host's other users.
        disk.chmod(0o400)
        cache.save(into, self._spec, kind, config)

    @contextmanager
    def _uncompressed(self, fd: int) -> Iterator[tuple[int, int]]:
        """The archive for reading here and there: itself, or a decompressed copy without a name."""
        size = os.fstat(fd).st_size
        packed = Hashed(FileSlice(fd, 0, size), progress=self._progress)
        source = Decompressed(packed, f"image {self._path}", self._limits)
        if source.method is None:
            yield fd, size
            return
        root = kit_cache.directory()
        root.mkdir(parents=True, exist_ok=True)
        self._progress.step(f"decompressing {self._path}", size >> 20)
        with tempfile.TemporaryFile(dir=root) as copy:
            while data := source.read(BLOCK):
                copy.write(data)
            copy.flush()
            yield copy.fileno(), copy.tell()


@contextmanager
def _open(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _identity(fd: int) -> list[int]:
    about = os.fstat(fd)
    return [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def _file_system(fd: int) -> str:
    """Of a raw disk without a partition table, by the magic number; the kernel checks the rest."""
    if os.pread(fd, 2, 0x438) == b"\x53\xef":
        return "ext4"
    if os.pread(fd, 4, 0) == b"XFSB":
        return "xfs"
    return "btrfs" if os.pread(fd, 8, 0x10040) == b"_BHRfS_M" else ""
