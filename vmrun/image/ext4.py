"""Writes a tree as an ext4 file system into a raw disk, with mke2fs and libext2fs of e2fsprogs.

mke2fs makes the empty file system. What `mke2fs -d` and debugfs need, names and owners on the host, an
ordinary user cannot give to a hostile tree, and debugfs cannot quote a newline; so files are written by the
library below both, called through ctypes. It allocates blocks and inodes, keeps bitmaps and extents, and
stores attributes. Directories are written here, as blocks of `struct ext4_dir_entry_2`: the library's
ext2fs_link looks for room from the start each time, which is quadratic in the size of a directory.

Layouts are those of the kernel's Documentation/filesystems/ext4. The same tree gives the same disk, bit for
bit, with the same e2fsprogs.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmrun.errors import UserError
from vmrun.guestkit import host
from vmrun.guestkit.progress import Progress
from vmrun.image.limits import MAX_LINKS, MAX_XATTRS, refused, shown
from vmrun.image.spool import CHUNK
from vmrun.image.tree import Entry, Inode, Tree, directory

BLOCK = 4096
INODE = 256
SPARE = 512 << 20
"""At least this much room for what runs write, or half as much as there is already."""
SPARE_INODES = 65536

_ROOT_INODE = 2
_LOST_AND_FOUND_INODE = 11
LOST_AND_FOUND = b"lost+found"

# As the guest kit's disk, and for its reasons: no journal, no checksums, because each run throws its writes
# away.
_FEATURES = "none,extent,filetype,sparse_super,large_file,huge_file,flex_bg,ext_attr,extra_isize"
_UUID = "766d7275-6e00-4000-8000-000000000003"
_HASH_SEED = "766d7275-6e00-4000-8000-000000000004"
_FAKE_TIME = 1
_EPOCH = {"E2FSPROGS_FAKE_TIME": str(_FAKE_TIME)}

# e2fsprogs, lib/ext2fs/ext2fs.h
_EXT2_FLAG_RW = 0x01
_EXT2_FLAG_MASTER_SB_ONLY = 0x10
_EXT2_FLAG_64BITS = 0x20000
_EXT2_FILE_WRITE = 0x0001
_EXT2_SEEK_SET = 0
_EXT4_EXTENTS_FL = 0x80000
_ENOSPC_CODES = {2133571400, 2133571401}  # EXT2_ET_BLOCK_ALLOC_FAIL, EXT2_ET_INODE_ALLOC_FAIL
_EXTRA_ISIZE = 32

_INSTALL = "; as root: apt-get install e2fsprogs"

# struct ext4_inode up to i_extra_isize's end, and what the kernel calls the "extra" fields.
_INODE_FIELDS = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHHHHIIIIIII")
_DIRENT = struct.Struct("<IHBB")
_SUPER_WTIME = 1024 + 0x30

_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


def default_size(tree: Tree) -> int:
    """Bytes of a disk that has room for the tree, and for what a run writes."""
    blocks, inodes = _needed(tree)
    content = blocks * BLOCK
    spare = max(SPARE, content // 2)
    # Bitmaps, group descriptors and backups of the superblock are about 0.1 %.
    total = content + spare + _inode_count(inodes) * INODE
    return -(-(total + total // 256 + (4 << 20)) // (1 << 20)) << 20


def write(tree: Tree, spool_fd: int, disk: Path, size: int, progress: Progress) -> None:
    """Make `disk`, a sparse raw file of `size` bytes that holds the tree.

    Raises UserError when it does not fit or e2fsprogs is missing.
    """
    blocks, inodes = _needed(tree)
    if blocks * BLOCK + _inode_count(inodes) * INODE > size:
        raise _too_small(size)
    progress.step("making the file system")
    with disk.open("xb") as image:
        image.truncate(size)
    command: list[str | Path] = [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-N", str(_inode_count(inodes)),
        "-I", str(INODE), "-m", "0", "-O", _FEATURES, "-U", _UUID,
        "-E", f"lazy_itable_init=0,root_owner=0:0,hash_seed={_HASH_SEED}", disk,
    ]  # fmt: skip
    try:
        host.run(command, disk.parent, _EPOCH)
    except FileNotFoundError:
        raise UserError(f"no mke2fs on this host{_INSTALL}") from None
    total = sum(length for inode in tree.walk() for _, _, length in inode.pieces)
    progress.step("writing the disk", total // CHUNK + inodes // 1000)
    try:
        with _open(disk) as fs:
            _Writer(fs, tree, spool_fd, progress).write()
    except _Error as error:
        if error.code in _ENOSPC_CODES:
            raise _too_small(size) from None
        raise OSError(None, f"{disk}: {error}") from None
    with disk.open("r+b") as image:
        # Without checksums in the file system, a field can be put back to what the content alone decides.
        image.seek(_SUPER_WTIME)
        image.write(struct.pack("<I", _FAKE_TIME))


def _needed(tree: Tree) -> tuple[int, int]:
    """Blocks of contents, and inodes."""
    blocks = inodes = 0
    for inode in tree.walk():
        inodes += 1
        if inode.is_directory:
            blocks += 1 + sum(_dirent_size(name) for name in inode.children) // (BLOCK - 263)
        elif inode.is_symlink:
            blocks += len(inode.target) >= 60
        else:
            blocks += sum(-(-length // BLOCK) + 1 for _, _, length in inode.pieces)
            # A tree of extents takes a block for each 340 of them.
            blocks += len(inode.pieces) // 300
        blocks += sum(len(name) + len(value) for name, value in inode.xattrs.items()) > 64
    return blocks, inodes


def _inode_count(inodes: int) -> int:
    return inodes + max(SPARE_INODES, inodes // 2)


def _too_small(size: int) -> UserError:
    return refused(f"the image does not fit a disk of {size >> 20} MiB: give a larger --disk-size")


def _dirent_size(name: bytes) -> int:
    return (_DIRENT.size + len(name) + 3) & ~3


class _Library:
    """libext2fs.so.2, with its functions' types. Every function returns errcode_t: 0 is success."""

    def __init__(self) -> None:
        try:
            self._functions = ctypes.CDLL("libext2fs.so.2")
            self._messages = ctypes.CDLL("libcom_err.so.2")
        except OSError:
            raise UserError(f"no libext2fs.so.2 on this host{_INSTALL}") from None
        self._functions.initialize_ext2_error_table()
        self.io_manager = ctypes.c_void_p.in_dll(self._functions, "unix_io_manager")
        self._messages.error_message.restype = ctypes.c_char_p
        self._messages.error_message.argtypes = [ctypes.c_long]
        pointer, number, size = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_size_t
        bytes_, integer = ctypes.c_char_p, ctypes.c_int
        self.open = self._declare("ext2fs_open", bytes_, integer, integer, ctypes.c_uint, pointer, pointer)
        self.read_bitmaps = self._declare("ext2fs_read_bitmaps", pointer)
        self.close_free = self._declare("ext2fs_close_free", pointer)
        self.read_inode = self._declare("ext2fs_read_inode_full", pointer, number, bytes_, integer)
        self.write_inode = self._declare("ext2fs_write_inode_full", pointer, number, bytes_, integer)
        self.punch = self._declare(
            "ext2fs_punch", pointer, number, pointer, pointer, ctypes.c_uint64, ctypes.c_uint64
        )
        self.file_open = self._declare("ext2fs_file_open", pointer, number, integer, pointer)
        self.file_write = self._declare("ext2fs_file_write", pointer, bytes_, ctypes.c_uint, pointer)
        self.file_seek = self._declare("ext2fs_file_llseek", pointer, ctypes.c_uint64, integer, pointer)
        self.file_set_size = self._declare("ext2fs_file_set_size2", pointer, ctypes.c_uint64)
        self.file_close = self._declare("ext2fs_file_close", pointer)
        self.xattrs_open = self._declare("ext2fs_xattrs_open", pointer, number, pointer)
        self.xattrs_read = self._declare("ext2fs_xattrs_read", pointer)
        self.xattr_set = self._declare("ext2fs_xattr_set", pointer, bytes_, bytes_, size)
        self.xattrs_close = self._declare("ext2fs_xattrs_close", pointer)
        # The one without a result: (fs, inode number, +1 or -1, whether a directory).
        self.inode_alloc_stats = self._functions.ext2fs_inode_alloc_stats2
        self.inode_alloc_stats.restype = None
        self.inode_alloc_stats.argtypes = [pointer, number, integer, integer]

    # `Any`: ctypes' types of arguments have no common class with a name.
    def _declare(self, name: str, *arguments: Any) -> Callable[..., None]:
        function = getattr(self._functions, name)
        function.restype = ctypes.c_long
        function.argtypes = arguments

        def call(*values: object) -> None:
            code = function(*values)
            if code:
                raise _Error(name, code, self._messages.error_message(code).decode("ascii", "replace"))

        return call


class _Error(Exception):
    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"{function}: {text}")
        self.code = code


class _FileSystem:
    def __init__(self, library: _Library, handle: ctypes.c_void_p) -> None:
        self.library = library
        self.handle = handle


@contextmanager
def _open(disk: Path) -> Iterator[_FileSystem]:
    library = _Library()
    handle = ctypes.c_void_p()
    flags = _EXT2_FLAG_RW | _EXT2_FLAG_64BITS | _EXT2_FLAG_MASTER_SB_ONLY
    library.open(os.fsencode(disk), flags, 0, BLOCK, library.io_manager, ctypes.byref(handle))
    try:
        library.read_bitmaps(handle)
        yield _FileSystem(library, handle)
    finally:
        # Also after an error: this frees memory and closes the file; the disk is thrown away by the caller.
        library.close_free(ctypes.byref(handle))


class _Writer:
    """Gives inode numbers to a tree and writes it."""

    def __init__(self, fs: _FileSystem, tree: Tree, spool_fd: int, progress: Progress) -> None:
        self._library, self._fs = fs.library, fs.handle
        self._tree = tree
        self._spool_fd = spool_fd
        self._progress = progress
        self._numbers: dict[int, int] = {}
        self._links: dict[int, int] = {}
        self._parents: dict[int, Inode] = {}

    def write(self) -> None:
        self._number()
        copied = 0
        for written, inode in enumerate(self._tree.walk(), 1):
            self._write_inode(inode)
            if not written % 1000:
                self._progress.advance()
            copied += sum(length for _, _, length in inode.pieces)
            while copied >= CHUNK:
                self._progress.advance()
                copied -= CHUNK

    def _number(self) -> None:
        """Numbers in the order of the walk, and how many names each inode has."""
        root = self._tree.root
        found = root.children.setdefault(LOST_AND_FOUND, Entry(directory(0o700), 0)).inode
        if not found.is_directory:
            raise refused("/lost+found is not a directory, and ext4 needs it to be one")
        self._numbers = {id(root): _ROOT_INODE, id(found): _LOST_AND_FOUND_INODE}
        following = _LOST_AND_FOUND_INODE + 1
        for inode in self._tree.walk():
            if id(inode) not in self._numbers:
                self._numbers[id(inode)] = following
                self._library.inode_alloc_stats(self._fs, following, 1, inode.is_directory)
                following += 1
            for name, entry in inode.children.items():
                count = self._links.get(id(entry.inode), 0) + 1
                if count > MAX_LINKS:
                    raise refused(f"{shown(name)}: a file of more than {MAX_LINKS} names")
                self._links[id(entry.inode)] = count
        for number in (_ROOT_INODE, _LOST_AND_FOUND_INODE):
            # mke2fs gave them blocks of its own.
            self._library.punch(self._fs, number, None, None, 0, (1 << 64) - 1)

    def _write_inode(self, inode: Inode) -> None:
        number = self._numbers[id(inode)]
        links = self._links.get(id(inode), 0)
        block = b""
        flags = 0
        if inode.is_directory:
            # One in its parent, one in itself, one in each child; the root is its own parent.
            links = 2 + sum(entry.inode.is_directory for entry in inode.children.values())
            if links > MAX_LINKS:
                raise refused(f"a directory of more than {MAX_LINKS - 2} directories")
        kind = stat.S_IFMT(inode.mode)
        if kind == stat.S_IFLNK and len(inode.target) < 60:
            block = inode.target
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            block = _device_block(*inode.device)
        elif kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            flags = _EXT4_EXTENTS_FL
            # An empty tree of extents: struct ext4_extent_header, room for four.
            block = struct.pack("<HHHHI", 0xF30A, 0, 4, 0, 0)
        size = len(inode.target) if block and kind == stat.S_IFLNK and not flags else 0
        self._library.write_inode(self._fs, number, _inode(inode, links, flags, block, size), INODE)
        if kind == stat.S_IFREG:
            if inode.size:
                with self._file(number) as file:
                    self._copy(file, inode)
        elif kind == stat.S_IFDIR:
            with self._file(number) as file:
                for data in self._directory_blocks(inode):
                    self._put(file, data)
        elif flags:
            with self._file(number) as file:
                self._put(file, inode.target)
        if inode.xattrs:
            self._write_xattrs(number, inode)

    @contextmanager
    def _file(self, number: int) -> Iterator[ctypes.c_void_p]:
        file = ctypes.c_void_p()
        self._library.file_open(self._fs, number, _EXT2_FILE_WRITE, ctypes.byref(file))
        try:
            yield file
        finally:
            self._library.file_close(file)

    def _put(self, file: ctypes.c_void_p, data: bytes) -> None:
        written = ctypes.c_uint()
        self._library.file_write(file, data, len(data), ctypes.byref(written))
        if written.value != len(data):
            raise OSError(None, "the image cannot be written: short write")

    def _copy(self, file: ctypes.c_void_p, inode: Inode) -> None:
        for start, offset, length in inode.pieces:
            self._library.file_seek(file, start, _EXT2_SEEK_SET, None)
            end = offset + length
            while offset < end:
                data = os.pread(self._spool_fd, min(CHUNK, end - offset), offset)
                if not data:
                    raise OSError(None, "the spool file became shorter")
                self._put(file, data)
                offset += len(data)
        last = inode.pieces[-1] if inode.pieces else (0, 0, 0)
        if last[0] + last[2] < inode.size:
            self._library.file_set_size(file, inode.size)

    def _directory_blocks(self, inode: Inode) -> Iterator[bytes]:
        """struct ext4_dir_entry_2, in the order of the names; the last of a block reaches to its end."""
        parent = self._parents.get(id(inode), self._tree.root)
        entries = [(b".", inode), (b"..", parent)]
        entries += [(name, inode.children[name].inode) for name in sorted(inode.children)]
        block = bytearray()
        last = 0
        for name, child in entries:
            size = _dirent_size(name)
            if len(block) + size > BLOCK:
                yield _closed(block, last)
                block = bytearray()
            last = len(block)
            kind = _FILE_TYPES[stat.S_IFMT(child.mode)]
            block += _DIRENT.pack(self._numbers[id(child)], size, len(name), kind) + name
            block += bytes(size - _DIRENT.size - len(name))
            if child.is_directory and child is not inode and name != b"..":
                self._parents[id(child)] = inode
        yield _closed(block, last)

    def _write_xattrs(self, number: int, inode: Inode) -> None:
        if sum(len(name) + len(value) + 20 for name, value in inode.xattrs.items()) > MAX_XATTRS:
            raise refused(f"a file with more than {MAX_XATTRS} bytes of extended attributes")
        handle = ctypes.c_void_p()
        self._library.xattrs_open(self._fs, number, ctypes.byref(handle))
        try:
            self._library.xattrs_read(handle)
            for name in sorted(inode.xattrs):
                self._library.xattr_set(handle, name, inode.xattrs[name], len(inode.xattrs[name]))
        finally:
            self._library.xattrs_close(ctypes.byref(handle))


def _closed(block: bytearray, last: int) -> bytes:
    struct.pack_into("<H", block, last + 4, BLOCK - last)
    return bytes(block.ljust(BLOCK, b"\0"))


def _device_block(major: int, minor: int) -> bytes:
    """i_block of a device: the 16 bit form where it fits, else the 32 bit one (kernel, fs/ext4/inode.c)."""
    if major < 256 and minor < 256:
        return struct.pack("<II", major << 8 | minor, 0)
    return struct.pack("<II", 0, (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12)


def _inode(inode: Inode, links: int, flags: int, block: bytes, size: int) -> bytes:
    """struct ext4_inode, with all its times that of the last change of the content."""
    seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
    # 34 bits of seconds since 1901; what does not fit is a wrong clock or a lie.
    seconds = max(-(1 << 31), min(seconds, (1 << 34) - (1 << 31) - 1))
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low >> 31 else low
    extra = (seconds - signed) >> 32 & 3 | nanoseconds << 2
    return _INODE_FIELDS.pack(
        inode.mode, inode.uid & 0xFFFF, size, low, low, low, 0, inode.gid & 0xFFFF, links, 0, flags, 0,
        block.ljust(60, b"\0"), 0, 0, 0, 0,
        0, 0, inode.uid >> 16, inode.gid >> 16, 0, 0,
        _EXTRA_ISIZE, 0, extra, extra, extra, low, extra, 0, 0,
    ).ljust(INODE, b"\0")  # fmt: skip
