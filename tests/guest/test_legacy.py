"""Linux on the legacy layout of its virtio devices, by MSI-X and by INTx: what it wrote is on the disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrun.guestkit import kit

pytestmark = pytest.mark.guest

PATIENCE = 200.0  # seconds; where kernels are interpreted and the host is busy, a boot takes tens of them
PATTERN = bytes(range(256)) * 256


class Linux:
    """The guest kit's shell on a pipe."""

    def __init__(self, disk: Path, append: str) -> None:
        found = kit.find()
        assert found is not None
        command = [sys.executable, "-m", "vmrun", "boot", "--initrd", str(found.initramfs)]
        command += ["--disk", str(disk), "--append", append, "--timeout", str(PATIENCE)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.output = b""

    def wait_for(self, text: bytes) -> bytes:
        """Returns what came before `text`, from the last call on."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while text not in self.output:
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data and time.monotonic() < deadline, self.output.decode(errors="replace")
            self.output += data
        before, _, self.output = self.output.partition(text)
        return before

    def run(self, command: str) -> str:
        """The output of a shell command."""
        assert self.process.stdin is not None
        # The shell echoes what it reads, so the marks must not stand there as they will be printed.
        self.process.stdin.write(f"echo BEG''IN; {command}; echo EN''D\n".encode())
        self.process.stdin.flush()
        self.wait_for(b"BEGIN\r\n")
        return self.wait_for(b"END\r\n").decode(errors="replace")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(PATTERN + bytes((4 << 20) - len(PATTERN)))
    return path


def boot(disk: Path, append: str) -> Iterator[Linux]:
    linux = Linux(disk, append)
    try:
        linux.wait_for(b"vmrun guest: init")
        yield linux
    finally:
        linux.process.kill()
        for pipe in (linux.process.stdin, linux.process.stdout):
            assert pipe is not None
            pipe.close()
        linux.process.wait()


@pytest.fixture(params=["", "pci=nomsi"], ids=["msix", "intx"])
def legacy(request: pytest.FixtureRequest, disk: Path) -> Iterator[Linux]:
    yield from boot(disk, f"virtio_pci.force_legacy=1 {request.param}")


@pytest.fixture
def modern(disk: Path) -> Iterator[Linux]:
    yield from boot(disk, "")


def check(linux: Linux, disk: Path, *, version_1: bool) -> None:
    """The disk (virtio0), the entropy device, which was used by the kernel already, and the agent's ports."""
    features = linux.run("cat /sys/bus/virtio/devices/*/features").split()
    assert len(features) == 3
    assert {bits[32] for bits in features} == {"1" if version_1 else "0"}
    status = linux.run("cat /sys/bus/virtio/devices/*/status").split()
    assert {int(bits, 16) for bits in status} == {0xF if version_1 else 0x7}
    # The second copy comes from the disk: an O_DIRECT read shares no page with the first.
    copy = "dd if=/dev/vda of=/dev/vda bs=4096 count=16 seek=512 conv=notrunc,fsync 2>&1"
    assert "16+0 records out" in linux.run(copy)
    assert disk.read_bytes()[512 * 4096 :][: len(PATTERN)] == PATTERN
    assert linux.run("head -c 256 /dev/hwrng | wc -c").strip() == "256"
    linux.process.send_signal(signal.SIGTERM)
    # This kernel has no driver that could be asked to shut down; the agent, on its own device, is.
    assert linux.process.wait(PATIENCE) == 0


def test_legacy_layout(legacy: Linux, disk: Path) -> None:
    check(legacy, disk, version_1=False)


def test_modern_layout_of_the_same_devices(modern: Linux, disk: Path) -> None:
    check(modern, disk, version_1=True)
