"""The two machines that run the conformance guest: QEMU, the oracle, and vmrun. Same ELF file, same devices.

A transcript is a set of "name = value" lines; what begins with "#" is for the human reader.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

QEMU = shutil.which("qemu-system-x86_64")
GUEST_MAC = "52:54:00:12:34:56"
SECONDS = 100  # for one run; it takes a few

# What our devices do not offer is switched off in QEMU where it has a switch.
_TRANSPORT = (
    "disable-legacy=off,disable-modern=off,event_idx=off,packed=off,queue_reset=off,notify_on_empty=off"
)
_BLK = f"{_TRANSPORT},config-wce=off,seg-max-adjust=off,min_io_size=512,discard_granularity=4096"
_NET = f"{_TRANSPORT},rombar=0," + ",".join(
    f"{feature}=off"
    for feature in (
        *("csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo", "host_tso4"),
        *("host_tso6", "host_ecn", "host_ufo", "mrg_rxbuf", "guest_announce", "ctrl_guest_offloads"),
        *("ctrl_vq", "ctrl_rx", "ctrl_vlan", "ctrl_rx_extra", "ctrl_mac_addr"),
    )
)
_SCSI = f"{_TRANSPORT},hotplug=off,param_change=off,virtqueue_size=128"


@dataclass(frozen=True)
class Devices:
    """What is plugged into either machine; a virtio-rng always is. Each run gets copies of the images."""

    disk: Path
    read_only_disk: Path
    cdrom: Path | None = None
    tap: str | None = None


def run_qemu(guest: Path, sections: str, devices: Devices, folder: Path) -> str:
    """The transcript. `folder` keeps the disk as the guest left it (disk.raw) and the transcript."""
    assert QEMU is not None
    disk, serial = shutil.copy(devices.disk, folder / "disk.raw"), folder / "serial"
    command = [
        *(QEMU, "-M", "pc", "-accel", "tcg", "-m", "64", "-nodefaults", "-vga", "none", "-display", "none"),
        *("-kernel", os.fspath(guest), "-append", sections, "-serial", f"file:{serial}"),
        *("-device", "isa-debug-exit,iobase=0x501,iosize=1"),
        *("-drive", f"if=none,id=disk,file={disk},format=raw,discard=unmap"),
        *("-device", f"virtio-blk-pci,drive=disk,serial=first,{_BLK}"),
        *("-drive", f"if=none,id=second,file={devices.read_only_disk},format=raw,readonly=on"),
        *("-device", f"virtio-blk-pci,drive=second,serial=second,{_BLK},discard=off,write-zeroes=off"),
        *("-device", f"virtio-rng-pci,{_TRANSPORT}"),
    ]
    if devices.cdrom is not None:
        command += [
            *("-device", f"virtio-scsi-pci,id=scsi,{_SCSI}"),
            *("-drive", f"if=none,id=cdrom,file={devices.cdrom},format=raw,media=cdrom,readonly=on"),
            *("-device", "scsi-cd,drive=cdrom,bus=scsi.0,scsi-id=0"),
        ]
    if devices.tap is not None:
        command += [
            *("-netdev", f"tap,id=net,ifname={devices.tap},script=no,downscript=no,vhost=off"),
            *("-device", f"virtio-net-pci,netdev=net,mac={GUEST_MAC},{_NET}"),
        ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    transcript = serial.read_text(errors="replace")
    assert run.returncode == 1, (
        f"QEMU exits with {run.returncode}: {run.stderr}\n{transcript}"
    )  # (0 << 1) | 1
    return transcript


def run_vmrun(guest: Path, sections: str, devices: Devices, folder: Path) -> str:
    """The same in vmrun."""
    disk = shutil.copy(devices.disk, folder / "disk.raw")
    command = [
        *(sys.executable, "-m", "vmrun", "boot", "--kernel", os.fspath(guest), "--append", sections),
        *("--mem", "64M", "--timeout", f"{SECONDS - 10}s"),
        *("--disk", f"{disk},format=raw,serial=first"),
        *("--disk", f"{devices.read_only_disk},format=raw,ro,serial=second"),
    ]
    if devices.cdrom is not None:
        command += ["--cdrom", os.fspath(devices.cdrom)]
    if devices.tap is not None:
        command += ["--nic", f"{devices.tap},mac={GUEST_MAC}"]
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS
    )
    assert run.returncode == 0, f"vmrun exits with {run.returncode}: {run.stderr}\n{run.stdout}"
    return run.stdout


def parse(transcript: str) -> dict[str, str]:
    """The lines to compare. A name that comes twice would hide a line: AssertionError."""
    lines: dict[str, str] = {}
    for line in transcript.splitlines():
        name, equals, value = line.partition(" = ")
        if equals and not line.startswith("#"):
            assert name not in lines, f"{name} comes twice"
            lines[name] = value
    assert lines, f"an empty transcript: {transcript!r}"
    return lines
