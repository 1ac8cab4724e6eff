"""A directory of the host as an image: its files, and a key that changes when they do.

The key is of a walk, not of contents: names, types, modes, owners, sizes and times of change. Hashing a root
of a gigabyte before each run would take longer than the run.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vmrun.guestkit.progress import Progress
from vmrun.image.layers import is_kept
from vmrun.image.limits import Limits, refused, shown
from vmrun.image.spool import Spool
from vmrun.image.tree import Entry, Inode, Tree


def key(path: Path, limits: Limits) -> str:
    """A hash of the walk. Raises OSError for what cannot be read."""
    digest = hashlib.sha256()
    for name, about, target in _walk(path, limits):
        fields = (
            about.st_mode, about.st_uid, about.st_gid, about.st_rdev,
            # The size of a directory is its file system's affair, and its time is in the names.
            0 if stat.S_ISDIR(about.st_mode) else about.st_size,
            about.st_mtime_ns, about.st_ctime_ns,
        )  # fmt: skip
        digest.update(b"%d %s %d %s %r\n" % (len(name), name, len(target), target, fields))
    return digest.hexdigest()


def read(path: Path, spool: Spool, limits: Limits, progress: Progress) -> Tree:
    """The tree of a directory, without sockets and without what is mounted in it.

    When its top belongs to an ordinary user, that user's files are root's in the image: who fills a directory
    by hand means a root.
    """
    tree = Tree(limits)
    owner = os.lstat(path).st_uid
    group = os.lstat(path).st_gid
    linked: dict[tuple[int, int], Inode] = {}
    directories: dict[bytes, Inode] = {b"": tree.root}
    progress.step(f"reading {path}")
    copied = 0
    for name, about, target in _walk(path, limits):
        parent, _, last = name.rpartition(b"/")
        if not name:
            inode = tree.root
        elif (about.st_dev, about.st_ino) in linked:
            inode = linked[about.st_dev, about.st_ino]
        else:
            inode = Inode(about.st_mode, target=target)
            if stat.S_ISDIR(about.st_mode):
                directories[name] = inode
            elif about.st_nlink > 1:
                linked[about.st_dev, about.st_ino] = inode
            if stat.S_ISREG(about.st_mode):
                _take_content(path, name, about, inode, spool)
                copied += inode.size
            elif stat.S_ISBLK(about.st_mode) or stat.S_ISCHR(about.st_mode):
                inode.device = (os.major(about.st_rdev), os.minor(about.st_rdev))
        inode.mode = about.st_mode
        inode.uid = 0 if about.st_uid == owner else about.st_uid
        inode.gid = 0 if about.st_gid == group else about.st_gid
        inode.mtime_ns = about.st_mtime_ns
        inode.xattrs = _xattrs(os.path.join(os.fsencode(path), name))
        if name:
            tree.put(directories[parent], last, Entry(inode, 0))
        for _ in range(copied >> 20):
            progress.advance(shown(name))
        copied &= (1 << 20) - 1
    return tree


def _walk(path: Path, limits: Limits) -> Iterator[tuple[bytes, os.stat_result, bytes]]:
    """Each name below `path`, what lstat says, and a link's target; directories before what is in them."""
    top = os.fsencode(path)
    about = os.stat(top)
    device = about.st_dev
    yield b"", about, b""
    pending = [b""]
    count = 0
    while pending:
        parent = pending.pop()
        for name in sorted(os.listdir(os.path.join(top, parent))):
            below = parent + b"/" + name if parent else name
            full = os.path.join(top, below)
            about = os.lstat(full)
            count += 1
            if count > limits.entries:
                raise limits.over_entries(shown(below))
            if below.count(b"/") >= limits.depth:
                raise limits.over_depth(shown(below))
            if stat.S_ISSOCK(about.st_mode):
                continue
            yield below, about, os.readlink(full) if stat.S_ISLNK(about.st_mode) else b""
            if stat.S_ISDIR(about.st_mode) and about.st_dev == device:
                pending.append(below)


def _take_content(path: Path, name: bytes, about: os.stat_result, inode: Inode, spool: Spool) -> None:
    """Copy a file, its holes left out."""
    fd = os.open(
        os.path.join(os.fsencode(path), name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    )
    try:
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino) != (about.st_dev, about.st_ino):
            raise refused(f"{path}: {shown(name)} changed while it was read")
        inode.size = now.st_size
        position = 0
        while position < inode.size:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:
                break  # ENXIO: a hole to the end
            end = min(os.lseek(fd, start, os.SEEK_HOLE), inode.size)
            os.lseek(fd, start, os.SEEK_SET)
            try:
                at = spool.append(lambda size: os.read(fd, size), end - start, shown(name))
            except EOFError:
                raise refused(f"{path}: {shown(name)} changed while it was read") from None
            inode.pieces.append((start, at, end - start))
            position = end
    finally:
        os.close(fd)


def _xattrs(path: bytes) -> dict[bytes, bytes]:
    try:
        names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
        return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if is_kept(name)}
    except OSError:
        return {}  # a file system without them, or a file that is not ours
