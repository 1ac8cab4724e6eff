"""Disk files: opened as they should be, and locked for as long as any copy of the fd is open."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, UserError
from vmrun.host.disks import Disks, disk_format
from vmrun.machine.config import DiskConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "x.raw"
    path.write_bytes(bytes(4096))
    return path


def raw(path: Path, read_only: bool = False) -> DiskConfig:
    return DiskConfig(path, "raw", read_only)


def open_elsewhere(path: Path, read_only: bool) -> str:
    """What another process gets to hear when it opens the disk ("" if nothing)."""
    program = (
        "import sys; from pathlib import Path; from vmrun.errors import UserError\n"
        "from vmrun.host.disks import Disks; from vmrun.machine.config import DiskConfig\n"
        f"try: Disks([DiskConfig(Path(sys.argv[1]), 'raw', {read_only})]).close()\n"
        "except UserError as error: print(error.code, error)"
    )
    command = [sys.executable, "-c", program, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_opened_as_asked(image: Path) -> None:
    with Disks([raw(image)]) as disks:
        (disk,) = disks
        assert len(disks) == 1
        assert os.pwrite(disk.fd, b"x", 0) == 1
        assert os.get_blocking(disk.fd) and not os.get_inheritable(disk.fd)
    with Disks([raw(image, read_only=True)]) as disks:
        (disk,) = disks
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(disk.fd, b"x", 0)


def test_lock(image: Path) -> None:
    busy = f"{EXIT_IMAGE} disk {image}: is in use by another vmrun"
    with Disks([raw(image)]):
        assert open_elsewhere(image, read_only=False).startswith(busy)
        assert open_elsewhere(image, read_only=True).startswith(busy)
    with Disks([raw(image, read_only=True)]):
        assert open_elsewhere(image, read_only=False).startswith(busy)
        assert open_elsewhere(image, read_only=True) == ""
    assert open_elsewhere(image, read_only=False) == ""


def test_lock_stays_with_the_workers_copy(image: Path) -> None:
    disks = Disks([raw(image)])
    (disk,) = disks
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(disk.fd,)) as worker:
        disks.close()
        assert "in use" in open_elsewhere(image, read_only=False)
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    assert open_elsewhere(image, read_only=False) == ""


def test_qemu_sees_the_lock(image: Path) -> None:
    with Disks([raw(image)]):
        command = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(image)]
        run = subprocess.run(command, capture_output=True, text=True)
    assert "lock" in run.stderr and run.returncode == 1


def test_same_disk_twice(image: Path) -> None:
    link = image.with_name("link.raw")
    link.symlink_to(image)
    with pytest.raises(UserError, match="given twice") as caught:
        Disks([raw(image), raw(link)])
    assert caught.value.code == EXIT_IMAGE
    assert open_elsewhere(image, read_only=False) == ""
    with Disks([raw(image, read_only=True), raw(link, read_only=True)]) as disks:
        assert len(disks) == 2


def expect(config: DiskConfig, text: str) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=text) as caught:
        Disks([config])
    assert caught.value.code == EXIT_IMAGE
    assert str(config.path) in str(caught.value)
    assert set(os.listdir("/proc/self/fd")) == fds


def test_what_is_no_disk(tmp_path: Path) -> None:
    expect(raw(tmp_path / "none.raw"), "no such file")
    expect(raw(tmp_path), "is a directory")
    expect(raw(tmp_path, read_only=True), "is a directory")
    os.mkfifo(tmp_path / "fifo")
    expect(raw(tmp_path / "fifo"), "not a file and not a block device")
    expect(raw(tmp_path / "fifo", read_only=True), "not a file and not a block device")
    expect(raw(Path("/dev/null")), "not a file and not a block device")
    (tmp_path / "loop").symlink_to("loop")
    expect(raw(tmp_path / "loop"), "symbolic links")


def test_read_only_file(image: Path) -> None:
    image.chmod(0o444)
    expect(raw(image), "read-only: add ,ro|may be read but not written: add ,ro")
    with Disks([raw(image, read_only=True)]):
        pass


@pytest.mark.root
def test_without_permission(image: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from vmrun.host.disks import Disks\n"
        "from vmrun.errors import UserError; from vmrun.machine.config import DiskConfig\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "for name in ('secret', 'readable'):\n"
        "  try: Disks([DiskConfig(Path(name), 'raw')])\n"
        "  except UserError as error: print(error)"
    )
    # By relative names: the folders above tmp_path let only root in.
    image.rename(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "readable").touch(0o644)
    tmp_path.chmod(0o755)
    with_path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vmrun.host.disks\n" + program
    run = subprocess.run(
        [sys.executable, "-c", with_path], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [
        "disk secret: permission denied",
        "disk readable: may be read but not written: add ,ro",
    ]


def test_format() -> None:
    assert disk_format(Path("a.qcow2")) == disk_format(Path("a.QCOW")) == "qcow2"
    assert disk_format(Path("a.img")) == disk_format(Path("a.raw")) == "raw"
    assert disk_format(Path("a.img"), "qcow2") == "qcow2"
    for path, stated in [("a.iso", None), ("/dev/sdx", None), ("a.raw", "vmdk")]:
        with pytest.raises(UserError, match="format=") as caught:
            disk_format(Path(path), stated)
        assert caught.value.code == EXIT_USAGE
