"""The model of a root file system that archives are merged into, before a byte of it is on the host's.

No name of an archive ever becomes a path of the host: names are keys of dictionaries here, links are followed
here, devices and set-uid bits are numbers here, and `ext4` writes them as such. An ordinary user can make any
of it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from vmrun.image.limits import MAX_LINK_TARGET, MAX_NAME, Limits, refused, shown

MAX_SYMLINKS = 40  # path_resolution(7), as the kernel
STEPS_PER_ENTRY = 100
"""Directories gone through for an entry, on average: 40 links of 4095 bytes each would be 80,000."""


@dataclass(slots=True, eq=False)
class Inode:
    """A file of any type. Two names that share an Inode are hard links."""

    mode: int
    """Type and permissions, as st_mode."""
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    size: int = 0
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    """Of a regular file: (offset in it, offset in the spool, bytes), ascending; the rest is holes."""
    target: bytes = b""
    """Of a symbolic link."""
    device: tuple[int, int] = (0, 0)
    """Of a device node: major, minor."""
    children: dict[bytes, Entry] = field(default_factory=dict)
    """Of a directory."""
    merged: int = -1
    """Of a directory: the layer in which what older layers had below it was last hidden."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)


@dataclass(slots=True, eq=False)
class Entry:
    """A name in a directory."""

    inode: Inode
    layer: int
    """The layer that last said something about it."""


def directory(mode: int = 0o755) -> Inode:
    return Inode(stat.S_IFDIR | mode)


class Tree:
    """The root directory, and how a path finds its way in it: as in a chroot, where ".." of / is /."""

    def __init__(self, limits: Limits) -> None:
        self.root = directory()
        self.limits = limits
        self.made = 0
        self._steps = 0

    def count(self, what: bytes) -> None:
        """One more entry: of an archive, or a directory made for one."""
        self.made += 1
        if self.made > self.limits.entries:
            raise self.limits.over_entries(shown(what))

    def parent(self, path: bytes, layer: int, *, make: bool = True) -> tuple[list[Inode], bytes] | None:
        """The directories from the root to the one that holds the last component of `path`, and that
        component; it is b"" for the root itself.

        Links on the way are followed inside the tree, and missing directories made, as containerd and Docker
        do it. Without `make`, None when a directory is missing.
        """
        names = components(path)
        # "a/.." names the directory that holds a, lexically, as filepath.Clean has it for them.
        clean: list[bytes] = []
        for name in names:
            if name != b"..":
                clean.append(name)
            elif clean:
                clean.pop()
        if not clean:
            return [self.root], b""
        last = clean.pop()
        stack = [self.root]
        pending = clean[::-1]
        links = 0
        while pending:
            name = pending.pop()
            self._steps += 1
            if self._steps > STEPS_PER_ENTRY * self.limits.entries:
                raise refused(f"{shown(path)}: links lead too far about: raise it with --max-entries")
            if name == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            entry = stack[-1].children.get(name)
            if entry is None:
                if not make:
                    return None
                self.count(path)
                entry = Entry(directory(), layer)
                self.put(stack[-1], name, entry)
            inode = entry.inode
            if inode.is_symlink:
                links += 1
                if links > MAX_SYMLINKS:
                    raise refused(f"{shown(path)}: too many symbolic links on the way")
                if inode.target.startswith(b"/"):
                    del stack[1:]
                pending.extend(reversed(components(inode.target)))
            elif inode.is_directory:
                stack.append(inode)
                if len(stack) > self.limits.depth:
                    raise self.limits.over_depth(shown(path))
            else:
                raise refused(f"{shown(path)}: {shown(name)} on the way is no directory")
        return stack, last

    def put(self, parent: Inode, name: bytes, entry: Entry) -> None:
        if len(name) > MAX_NAME:
            raise refused(f"{shown(name)}: a name of more than {MAX_NAME} bytes")
        parent.children[name] = entry

    def walk(self) -> Iterator[Inode]:
        """Every inode once, the root first; the order depends on names alone."""
        seen: set[int] = set()
        pending = [self.root]
        while pending:
            inode = pending.pop()
            if id(inode) in seen:
                continue
            seen.add(id(inode))
            yield inode
            pending.extend(inode.children[name].inode for name in sorted(inode.children, reverse=True))


def components(path: bytes) -> list[bytes]:
    """The names of a path, without empty ones and "."."""
    if b"\0" in path:
        raise refused(f"{shown(path)}: a zero byte in a name")
    if len(path) > MAX_LINK_TARGET:
        raise refused(f"{shown(path)}: a path of more than {MAX_LINK_TARGET} bytes")
    return [name for name in path.split(b"/") if name not in (b"", b".")]
