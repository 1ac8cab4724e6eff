"""The cache directory, and how something built appears in it whole or not at all.

What is built is a directory named after a hash of its inputs. It is made under another name next to its
place and renamed, so that a build that was killed is never taken for a finished one; a lock keeps two builds
of the same thing apart, and the second finds the first one's result.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished-"
_SCRATCH = ".scratch-"


def directory() -> Path:
    """$VMRUN_CACHE, or /var/cache/vmrun for root, or $XDG_CACHE_HOME/vmrun, or ~/.cache/vmrun."""
    chosen = os.environ.get("VMRUN_CACHE")
    if chosen:
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/vmrun")
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory specification has a relative path ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vmrun"


def find(name: str) -> Path | None:
    """The finished directory `name`, or None."""
    path = directory() / name
    return path if path.is_dir() else None


def find_or_make(name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name`; when it is not there, `make` fills an empty one that becomes it.

    Waits while another process makes the same. What killed processes left behind is removed. Raises what
    `make` raises, and OSError when the cache cannot be written.
    """
    finished = find(name)
    if finished is not None:
        return finished
    root = directory()
    root.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(root)
    with _lock(root, name):
        finished = find(name)
        if finished is not None:
            return finished
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}{_UNFINISHED}", dir=root))
        try:
            make(unfinished)
            _write_back(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(root / name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return root / name


def remove(name: str) -> bool:
    """Remove the finished directory `name`, or say False when there is none. Open files of it stay usable.

    It goes as it came: at once, by a rename, so that nobody finds half of it.
    """
    root = directory()
    if not (root / name).is_dir():
        return False
    with _lock(root, name):
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}{_UNFINISHED}", dir=root))
        try:
            (root / name).rename(unfinished / "removed")
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return True


@contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """An empty directory that is gone afterwards; after kill -9, when the next thing is made here."""
    root = directory()
    root.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(root)
    made, lock = _locked_directory(root, f"{kind}{_SCRATCH}")
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def _locked_directory(root: Path, prefix: str) -> tuple[Path, int]:
    """A new directory that is its own lock: one for each would have to be removed, by whom holds it."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        try:
            lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process took it for one that was left behind
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return made, lock
        os.close(lock)


@contextmanager
def _lock(root: Path, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of `name`; without `wait`, False when another process holds it."""
    lock = os.open(root / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # Whoever may read a file may lock it, and other users could have us wait for ever: those that older
        # versions made were for all to read.
        found = os.fstat(lock)
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            os.fchmod(lock, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def _remove_left_behind(root: Path) -> None:
    """A killed build leaves a gigabyte; whose lock is free has no builder."""
    for unfinished in root.glob(f"*{_UNFINISHED}*"):
        with _lock(root, unfinished.name.partition(_UNFINISHED)[0], wait=False) as locked:
            if locked:
                shutil.rmtree(unfinished, ignore_errors=True)
    for scratched in root.glob(f"*{_SCRATCH}*"):
        try:
            lock = os.open(scratched, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratched, ignore_errors=True)
        except BlockingIOError:
            pass  # its maker lives
        finally:
            os.close(lock)


def _write_back(made: Path) -> None:
    """A rename may reach the host's disk before the data does; a power cut must not leave empty files."""
    for path in [*made.iterdir(), made]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
