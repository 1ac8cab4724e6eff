"""Merges layers, tar archives on top of each other, into a tree (OCI image-spec, layer.md).

Where the specification leaves something open, this does what containerd and Docker do: links in the middle of
a path are followed inside the root, a directory over a directory keeps its children, anything else over
anything else replaces it.
"""

from __future__ import annotations

import stat

from vmrun.image.limits import MAX_LINK_TARGET, MAX_NAME, Limits, refused, shown
from vmrun.image.spool import Spool
from vmrun.image.stream import Reader
from vmrun.image.tar import Archive, Member
from vmrun.image.tree import Entry, Inode, Tree

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_PIECE_MEMORY = 160  # a tuple and its numbers
_ATTRIBUTE_MEMORY = 200  # a place in a dictionary, and two objects
_AUFS = b".wh..wh."  # what aufs kept its own state in


class Layers:
    """Takes one layer after the other, lowest first."""

    def __init__(self, spool: Spool, limits: Limits) -> None:
        self.tree = Tree(limits)
        self._spool = spool
        self._layer = -1
        self._metadata = 0

    def add(self, source: Reader, what: str, *, whiteouts: bool = True) -> None:
        """Merge the archive in `source`, and read it to its end. A plain root tar has no whiteouts."""
        self._layer += 1
        archive = Archive(source, what)
        for member in archive:
            self.tree.count(member.name)
            self._charge(member)
            self._apply(archive, member, whiteouts)
        archive.finish()

    def _apply(self, archive: Archive, member: Member, whiteouts: bool) -> None:
        if whiteouts and any(_is_bookkeeping(part) for part in member.name.split(b"/")):
            return
        found = self.tree.parent(member.name, self._layer)
        if found is None:
            return
        stack, name = found
        parent = stack[-1]
        if whiteouts and name.startswith(WHITEOUT):
            if name == OPAQUE:
                self._hide_older(parent)
            else:
                self._remove_older(parent, name[len(WHITEOUT) :])
            return
        if member.link is not None:
            self._link(parent, name, member)
            return
        inode = self._inode(member)
        if not name:
            if not inode.is_directory:
                raise refused(f"{shown(member.name)}: the root can only be a directory")
            _set_attributes(self.tree.root, inode)
            return
        if inode.is_directory and len(stack) >= self.tree.limits.depth:
            raise self.tree.limits.over_depth(shown(member.name))
        self._take_content(archive, member, inode)
        there = parent.children.get(name)
        if there is not None and there.inode.is_directory and inode.is_directory:
            _set_attributes(there.inode, inode)
            there.layer = self._layer
        else:
            self.tree.put(parent, name, Entry(inode, self._layer))

    def _charge(self, member: Member) -> None:
        """What a member costs in memory until the disk is written: an archive is cheap, this is not."""
        self._metadata += len(member.name) + len(member.target) + _PIECE_MEMORY * len(member.pieces)
        self._metadata += sum(
            len(name) + len(value) + _ATTRIBUTE_MEMORY for name, value in member.xattrs.items()
        )
        if self._metadata > self.tree.limits.metadata:
            raise self.tree.limits.over_metadata(shown(member.name))

    def _inode(self, member: Member) -> Inode:
        if stat.S_ISLNK(member.mode) and not 0 < len(member.target) <= MAX_LINK_TARGET:
            raise refused(f"{shown(member.name)}: a symbolic link to nothing, or to too long a name")
        if b"\0" in member.target:
            raise refused(f"{shown(member.name)}: a zero byte in a symbolic link")
        mode = member.mode | (0o777 if stat.S_ISLNK(member.mode) else 0)
        return Inode(
            mode,
            member.uid,
            member.gid,
            member.mtime_ns,
            {name: value for name, value in member.xattrs.items() if is_kept(name)},
            target=member.target,
            device=member.device,
        )

    def _take_content(self, archive: Archive, member: Member, inode: Inode) -> None:
        if not stat.S_ISREG(inode.mode):
            return
        inode.size = member.size
        for offset, length in member.pieces:
            start = self._spool.append(archive.read, length, shown(member.name))
            inode.pieces.append((offset, start, length))

    def _link(self, parent: Inode, name: bytes, member: Member) -> None:
        found = self.tree.parent(member.link or b"", self._layer, make=False)
        entry = found[0][-1].children.get(found[1]) if found is not None else None
        if not name or entry is None:
            raise refused(
                f"{shown(member.name)}: a hard link to {shown(member.link or b'')}, which is not there"
            )
        if entry.inode.is_directory:
            raise refused(f"{shown(member.name)}: a hard link to a directory")
        # GNU tar stores a file that it was given twice as a link to itself: nothing changes then.
        self.tree.put(parent, name, Entry(entry.inode, self._layer))

    def _remove_older(self, parent: Inode, name: bytes) -> None:
        """A whiteout: hides what older layers have there, and nothing of its own layer."""
        entry = parent.children.get(name)
        if entry is not None and not self._survives(entry):
            del parent.children[name]

    def _hide_older(self, inode: Inode) -> None:
        """An opaque directory: without the children of older layers."""
        # Once a layer: nothing older comes back, and asking again would let an archive of whiteouts take
        # quadratic time.
        if inode.merged == self._layer:
            return
        inode.merged = self._layer
        for name, entry in list(inode.children.items()):
            if not self._survives(entry):
                del inode.children[name]

    def _survives(self, entry: Entry) -> bool:
        """Whether this layer has the entry or anything below it. The depth limit bounds the recursion."""
        if entry.inode.is_directory:
            self._hide_older(entry.inode)
            return entry.layer == self._layer or bool(entry.inode.children)
        return entry.layer == self._layer


def _is_bookkeeping(name: bytes) -> bool:
    return name.startswith(_AUFS) and name != OPAQUE


def is_kept(name: bytes) -> bool:
    """Attributes that a file system of another host can mean.

    POSIX ACLs (system.) have another form on disk, and overlayfs' own marks would be taken for the guest's.
    """
    return (
        name.startswith((b"user.", b"security.", b"trusted."))
        and not name.startswith((b"trusted.overlay.", b"user.overlay."))
        and b"\0" not in name
        and len(name) <= MAX_NAME
    )


def _set_attributes(inode: Inode, new: Inode) -> None:
    inode.mode, inode.uid, inode.gid = new.mode, new.uid, new.gid
    inode.mtime_ns, inode.xattrs = new.mtime_ns, new.xattrs
