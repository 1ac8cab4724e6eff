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
from typing import NamedTuple

from vmrun.errors import UserError
from vmrun.guestkit.progress import Progress
from vmrun.image.layers import is_kept
from vmrun.image.limits import Limits, refused, shown
from vmrun.image.spool import Spool
from vmrun.image.tree import Entry, Inode, Tree


class _Found(NamedTuple):
    """Something in the directory. `parent` is a descriptor of what it is in, open until the next one."""

    name: bytes
    """From the top; empty for the top itself."""
    about: os.stat_result
    target: bytes
    parent: int

    @property
    def last(self) -> bytes:
        return self.name.rpartition(b"/")[2] or b"."


def key(path: Path, limits: Limits) -> str:
    """A hash of the walk. Raises OSError for what cannot be read."""
    digest = hashlib.sha256()
    for name, about, target, _ in _walk(path, limits):
        fields = (
            about.st_mode, about.st_uid, about.st_gid, about.st_rdev,
            # The size of a directory is its file system's affair, and what is in it comes with the walk.
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
    top = path.stat()
    linked: dict[tuple[int, int], Inode] = {}
    directories: dict[bytes, Inode] = {b"": tree.root}
    progress.step(f"reading {path}")
    copied = 0
    for found in _walk(path, limits):
        about = found.about
        inode = linked.get((about.st_dev, about.st_ino))
        if inode is None:
            inode = Inode(about.st_mode, target=found.target) if found.name else tree.root
            if stat.S_ISDIR(about.st_mode):
                directories[found.name] = inode
            elif about.st_nlink > 1:
                linked[about.st_dev, about.st_ino] = inode
            if stat.S_ISREG(about.st_mode):
                _take_content(path, found, inode, spool)
            elif stat.S_ISBLK(about.st_mode) or stat.S_ISCHR(about.st_mode):
                inode.device = (os.major(about.st_rdev), os.minor(about.st_rdev))
            inode.mode = about.st_mode
            inode.uid = 0 if about.st_uid == top.st_uid else about.st_uid
            inode.gid = 0 if about.st_gid == top.st_gid else about.st_gid
            inode.mtime_ns = about.st_mtime_ns
            inode.xattrs = _xattrs(found)
        if found.name:
            parent, _, last = found.name.rpartition(b"/")
            tree.put(directories[parent], last, Entry(inode, 0))
        for _ in range((spool.size >> 20) - copied):
            progress.advance(shown(found.name))
        copied = spool.size >> 20
    return tree


def _walk(path: Path, limits: Limits) -> Iterator[_Found]:
    """The top and all below it, directories before what is in them, the same way each time.

    By descriptors: who may write in the directory cannot lead the walk out of it by putting a link in the
    place of a directory.
    """

    def fail(error: OSError) -> None:
        raise error

    top = os.fsencode(path.resolve())
    device = os.stat(top).st_dev
    count = 0
    for where, directories, files, parent in os.fwalk(top, onerror=fail):
        below = os.path.relpath(where, top)
        if below == b".":
            yield _Found(b"", os.fstat(parent), b"", parent)
        if os.fstat(parent).st_dev != device:
            directories.clear()  # a mount: its directory is in the image, empty
            continue
        directories.sort()
        for last in sorted([*directories, *files]):
            name = last if below == b"." else below + b"/" + last
            about = os.stat(last, dir_fd=parent, follow_symlinks=False)
            count += 1
            if count > limits.entries:
                raise limits.over_entries(shown(name))
            if name.count(b"/") >= limits.depth:
                raise limits.over_depth(shown(name))
            if not stat.S_ISSOCK(about.st_mode):
                target = os.readlink(last, dir_fd=parent) if stat.S_ISLNK(about.st_mode) else b""
                yield _Found(name, about, target, parent)


def _take_content(path: Path, found: _Found, inode: Inode, spool: Spool) -> None:
    """Copy a file, its holes left out."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(found.last, flags, dir_fd=found.parent)
    try:
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino) != (found.about.st_dev, found.about.st_ino):
            raise _changed(path, found)
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
                at = spool.append(lambda size: os.read(fd, size), end - start, shown(found.name))
            except EOFError:
                raise _changed(path, found) from None
            inode.pieces.append((start, at, end - start))
            position = end
    finally:
        os.close(fd)


def _changed(path: Path, found: _Found) -> UserError:
    return refused(f"image {path}: {shown(found.name)} changed while it was read: try again")


def _xattrs(found: _Found) -> dict[bytes, bytes]:
    # There is no lgetxattrat(2) before Linux 6.13.
    path = os.path.join(b"/proc/self/fd/%d" % found.parent, found.last)
    try:
        names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
        return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if is_kept(name)}
    except OSError:
        return {}  # a file system without them, or a file that is not ours
