"""A blk worker is killed while a Linux guest writes through it: the guest sees a pause and no loss."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from devices.block.qcow2_create import create_qcow2
from vmrun.guestkit import host, kit

ROUNDS = 8
ROUND_BYTES = 1 << 18
KILL_AFTER = (1, 3, 5)  # rounds; a fourth death within a minute would end the machine

INIT = f"""#!/bin/busybox sh
busybox mount -t devtmpfs none /dev
busybox yes 'what the guest wrote' | busybox head -c {ROUND_BYTES} >/x
for i in $(busybox seq {ROUNDS}); do
  busybox dd if=/x of=/dev/vda bs=64k seek=$((i*4)) conv=fsync,notrunc 2>/err || echo "failed-$i."
  echo "wrote-$i."
done
busybox mount -t proc none /proc
echo 3 >/proc/sys/vm/drop_caches
expected=$(busybox md5sum </x)
for i in $(busybox seq {ROUNDS}); do
  found=$(busybox dd if=/dev/vda bs=64k skip=$((i*4)) count=4 2>/err | busybox md5sum)
  [ "$found" = "$expected" ] && echo "same-$i."
done
busybox reboot -f
"""


def worker_of(vmrun: int) -> int | None:
    for child in psutil.Process(vmrun).children():
        if "blk0" in child.cmdline():
            return child.pid
    return None


@pytest.mark.timeout(200)
def test_a_guest_outlives_its_disk_worker(
    guest_kit: kit.GuestKit, initramfs: Callable[..., Path], tmp_path: Path
) -> None:
    root = initramfs({"init": INIT.encode(), "bin/busybox": host.BUSYBOX, "proc/.keep": b""})
    disk = tmp_path / "disk.qcow2"
    with disk.open("wb+") as file:
        create_qcow2(file.fileno(), (ROUNDS + 1) * ROUND_BYTES)
    command = [
        sys.executable,
        "-m",
        "vmrun",
        "boot",
        "--initrd",
        str(root),
        "--disk",
        str(disk),
    ]
    command += ["--timeout", "120s"]
    killed = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as machine:
        assert machine.stdout is not None
        said = b""
        while piece := os.read(machine.stdout.fileno(), 65536):
            said += piece
            for number in KILL_AFTER:
                if f"wrote-{number}.".encode() in said and number not in [number for number, _ in killed]:
                    killed.append((number, kill_worker(machine.pid)))
        stderr = machine.stderr.read().decode() if machine.stderr else ""
    text = said.decode(errors="replace")
    assert machine.returncode == 0, stderr + text[-2000:]
    assert len({pid for _, pid in killed}) == len(KILL_AFTER), killed
    assert not [number for number in range(1, ROUNDS + 1) if f"failed-{number}." in text]
    assert [f"same-{number}." in text for number in range(1, ROUNDS + 1)] == [True] * ROUNDS, text[-2000:]
    check = subprocess.run(["qemu-img", "check", str(disk)], capture_output=True, text=True, check=False)
    assert check.returncode in (0, 3), check.stdout  # 3: clusters leaked by a worker that died
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)], check=True)
    expected = (b"what the guest wrote\n" * (ROUND_BYTES // 21 + 1))[:ROUND_BYTES]
    assert raw.read_bytes()[ROUND_BYTES : (ROUNDS + 1) * ROUND_BYTES] == expected * ROUNDS


def kill_worker(vmrun: int) -> int:
    """SIGKILL the disk's worker, once the one before it has been replaced. Returns its process id."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pid = worker_of(vmrun)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.01)
    raise AssertionError("there is no disk worker")
