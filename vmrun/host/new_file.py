"""New files that get their name when they are whole: whatever interrupts the making leaves nothing that is
taken for an image. VMM process and its user side.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmrun.errors import EXIT_IMAGE, UserError

# open(2): what a file system without O_TMPFILE says, and a kernel that takes it for O_DIRECTORY.
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor of an empty file that becomes `path`, durably, when the body ends without an error.

    UserError when `path` is there already, before or after: nothing is ever overwritten. The file has no name
    until then, so that nothing is left even after kill -9; on file systems that cannot do that (NFS) it is
    called .NAME.XXXX.part meanwhile.
    """
    if path.is_symlink() or path.exists():
        raise _exists(path)
    directory = _open_directory(path)
    try:
        fd, name = _open_unnamed(path, directory)
        try:
            yield fd
            os.fsync(fd)
            _link(path, directory, fd, name)
            os.fsync(directory)
        finally:
            os.close(fd)
            if name is not None:
                os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


def open_unnamed(directory: Path) -> int:
    """A descriptor of an empty file in `directory` that has no name, and ends with its last descriptor unless
    `give_name` gives it one. Raises UserError and OSError.
    """
    file = directory / "overlay"
    directory_fd = _open_directory(file)
    try:
        fd, name = _open_unnamed(file, directory_fd)
        if name is not None:
            os.unlink(name, dir_fd=directory_fd)  # and then there is no way to name it again
        return fd
    finally:
        os.close(directory_fd)


def give_name(fd: int, path: Path) -> None:
    """Let the file of `open_unnamed` be `path`, durably: on the same file system. UserError when `path` is
    there already; OSError, on file systems without O_TMPFILE too.
    """
    directory = _open_directory(path)
    try:
        os.fsync(fd)
        _link(path, directory, fd, None)
        os.fsync(directory)
    finally:
        os.close(directory)


def _open_directory(path: Path) -> int:
    try:
        return os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path}: its directory: {(error.strerror or str(error)).lower()}") from None


def _open_unnamed(path: Path, directory: int) -> tuple[int, str | None]:
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666, dir_fd=directory), None
    except OSError as error:
        if error.errno not in NO_TMPFILE:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
    import secrets  # here: few file systems need it, and it is slow to import

    name = f".{path.name[:200]}.{secrets.token_hex(4)}.part"
    try:
        return os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666, dir_fd=directory), name
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from None


def _link(path: Path, directory: int, fd: int, name: str | None) -> None:
    try:
        # Not rename: that would replace what somebody else put there meanwhile.
        if name is None:
            os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=directory, follow_symlinks=True)
        else:
            os.link(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        raise _exists(path) from None


def _exists(path: Path) -> UserError:
    return UserError(f"{path}: is there already, and is not overwritten: remove it first", EXIT_IMAGE)
