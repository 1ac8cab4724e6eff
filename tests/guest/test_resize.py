"""A disk grows while a Linux guest uses it: the guest is told by a configuration interrupt."""

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.block.qcow2_create import create_qcow2
from vmrun.guestkit import kit
from vmrun.host.console import Console
from vmrun.machine.config import MIB, DiskConfig, MachineConfig
from vmrun.machine.machine import Machine

READY = b"vm:/root#"
TOLD = b"detected capacity change from 32768 to 131072"


@pytest.mark.timeout(150)
def test_linux_sees_its_disk_grow(guest_kit: kit.GuestKit, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with path.open("wb+") as file:
        create_qcow2(file.fileno(), 16 * MIB)
    config = MachineConfig(
        disks=(DiskConfig(path, "qcow2"),), initrd=guest_kit.initramfs, cmdline="loglevel=7"
    )
    with ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        machine = Machine(config, stack.enter_context(Console(null, null)), stack)
        seen = bytearray()
        # Growing waits for the worker, so it is not for the vCPU's thread, which prints, nor for the loop's.
        grower = threading.Thread(target=machine.resize_disk, args=(0, 64 * MIB))

        def output(data: bytes) -> None:
            seen.extend(data)
            if READY in seen and grower.ident is None:
                grower.start()
            if TOLD in seen:
                machine.end(0, "the guest was told")

        machine.uart.output = output
        outcome = machine.run(timeout=100)
        grower.join(timeout=20)
    assert outcome.reason == "the guest was told", seen.decode(errors="replace")[-2000:]
