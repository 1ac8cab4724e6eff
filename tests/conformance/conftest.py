"""The conformance guest, built once, and what is plugged into the machines that run it."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conformance.machines import QEMU, Devices

SOURCES = Path(__file__).parent / "guest"
COMPILER_FLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-nostdlib", "-static"),
    *(
        "-no-pie",
        "-fno-pic",
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
        "-fcf-protection=none",
    ),
    # Handlers run on the stack of what they interrupt, and nobody saves vector registers.
    *("-mno-red-zone", "-mgeneral-regs-only"),
    *("-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"),
)
MIB = 1 << 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.kvm)


@pytest.fixture(scope="session")
def conformance_guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's ELF file."""
    if shutil.which("gcc") is None:
        pytest.skip("no compiler (Debian: gcc)")
    elf = tmp_path_factory.mktemp("conformance") / "guest.elf"
    sources = sorted(SOURCES.glob("*.[cS]"))
    subprocess.run(
        ["gcc", *COMPILER_FLAGS, f"-Wl,-T,{SOURCES / 'guest.ld'}", f"-I{SOURCES}", "-o", elf, *sources],
        check=True,
    )
    return elf


@pytest.fixture
def oracle() -> None:
    if QEMU is None:
        pytest.skip("no QEMU (Debian: qemu-system-x86)")


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Devices:
    """Two disks and a disc of 1 MiB each, no two sectors alike, the same in every run."""
    folder = tmp_path_factory.mktemp("images")
    numbers = random.Random(20260704)
    for name in ("disk.raw", "read-only.raw", "disc.iso"):
        (folder / name).write_bytes(numbers.randbytes(MIB))
    return Devices(folder / "disk.raw", folder / "read-only.raw", cdrom=folder / "disc.iso")


@pytest.fixture
def tap(network_namespace: None) -> str:
    """A tap at 192.0.2.1 on which nobody speaks first: no IPv6, so no solicitations."""
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    for words in (
        "tuntap add tap0 mode tap vnet_hdr",
        "link set tap0 address 02:00:00:00:00:01",
        "addr add 192.0.2.1/24 dev tap0",
        "link set tap0 up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    return "tap0"
