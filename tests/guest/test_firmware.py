"""Other people's drivers of our virtio devices: SeaBIOS boots from disk and CD, and iPXE from the network,
through the legacy layout and through the modern one.

What they boot is firmware/boot.S, which reads itself back by INT 13h and reports on the serial port.
"""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.conftest import REPOSITORY, boot
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE
from vmrun.host.check import kvm_flavour

SEABIOS = Path("/usr/share/seabios/bios.bin")
SEABIOS_256K = SEABIOS.with_name("bios-256k.bin")
IPXE = Path("/usr/lib/ipxe/qemu/pxe-virtio.rom")

SOURCE = Path(__file__).with_name("firmware") / "boot.S"
LOAD_ADDRESS = 0x7C00
LENGTH = (
    40 * 1024 + 4
)  # of the program with what follows it: several requests, and no whole sector at the end
SECTOR = 512
DISK_SECTORS = 4096
COPY_SECTOR, COPY_SECTORS = 1024, 16  # what boot.S writes
INFO_TABLE, SUMMED = 8, 64  # genisoimage(8), "EL TORITO BOOT INFORMATION TABLE"
TIMEOUT = 120.0

LAYOUTS = pytest.mark.parametrize(
    ("options", "layout"),
    [((), "modern (1.0)"), (("--legacy-virtio",), "legacy (0.9.5)")],
    ids=["modern", "legacy"],
)


def checks(console: str) -> list[str]:
    """What boot.S said, without what the firmware put between."""
    return [line.removeprefix("check: ") for line in console.splitlines() if line.startswith("check: ")]


def checksum(program: bytes) -> int:
    total: int = sum(struct.unpack(f"<{(LENGTH - SUMMED) // 4}I", program[SUMMED:]))
    return total & 0xFFFFFFFF


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """boot.S, made LENGTH bytes long with noise, so that nothing but all of it has the right sum."""
    folder = tmp_path_factory.mktemp("firmware")
    code, binary = folder / "boot.o", folder / "boot.bin"
    subprocess.run(["as", "--32", "-o", code, SOURCE], check=True)
    link: list[str | Path] = [
        "ld",
        "-m",
        "elf_i386",
        f"-Ttext={LOAD_ADDRESS:#x}",
        "--oformat",
        "binary",
        "-o",
        binary,
        code,
    ]
    subprocess.run(link, check=True)
    data = binary.read_bytes()
    return data + os.urandom(LENGTH - len(data))


@pytest.fixture
def disk(program: bytes, tmp_path: Path) -> Path:
    image = bytearray(program).ljust(DISK_SECTORS * SECTOR, b"\0")
    struct.pack_into("<III", image, INFO_TABLE + 4, 0, LENGTH, checksum(program))
    path = tmp_path / "disk.raw"
    path.write_bytes(image)
    return path


@pytest.fixture
def disc(program: bytes, tmp_path: Path) -> Path:
    tree, path = tmp_path / "tree", tmp_path / "disc.iso"
    tree.mkdir()
    (tree / "boot.img").write_bytes(program)
    el_torito = ["-b", "boot.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    subprocess.run(["genisoimage", "-quiet", "-R", *el_torito, "-o", path, tree], check=True)
    return path


@LAYOUTS
@pytest.mark.parametrize("firmware", [SEABIOS, SEABIOS_256K], ids=["128k", "256k"])
def test_seabios_boots_from_a_disk(
    program: bytes, disk: Path, firmware: Path, options: tuple[str, ...], layout: str
) -> None:
    result = boot("--firmware", firmware, "--disk", disk, "--verbose", *options, timeout=TIMEOUT)
    said = checks(result.console)
    assert result.code == 0, result.stderr + result.console
    assert said[0] == "started"
    assert said[2:] == [
        f"sector size {SECTOR:08x}",
        f"sectors {DISK_SECTORS:08x}",
        f"right sum {checksum(program):08x}",
        "written",
        "end",
    ]
    assert f"using {layout} virtio mode" in result.stderr
    written = disk.read_bytes()[COPY_SECTOR * SECTOR :][: COPY_SECTORS * SECTOR]
    assert written == disk.read_bytes()[: COPY_SECTORS * SECTOR]


def test_operating_systems_find_our_acpi_tables(disk: Path) -> None:
    result = boot("--firmware", SEABIOS, "--disk", disk, "--mem", "64M", timeout=TIMEOUT)
    found = checks(result.console)[1].replace(",", "").split()
    assert found[:2] == ["RSDP", "at"] and found[3:5] == ["RSDT", "at"], result.console
    assert 0xF0000 <= int(found[2], 16) < 1 << 20
    assert (64 << 20) - (64 << 10) <= int(found[5], 16) < 64 << 20


def test_seabios_starts_all_cpus(disk: Path) -> None:
    result = boot("--firmware", SEABIOS, "--disk", disk, "--cpus", "2", "--verbose", timeout=TIMEOUT)
    assert "Found 2 cpu(s) max supported 2 cpu(s)" in result.stderr
    assert checks(result.console)[-1] == "end"


@LAYOUTS
def test_seabios_boots_from_a_disc(program: bytes, disc: Path, options: tuple[str, ...], layout: str) -> None:
    result = boot("--firmware", SEABIOS, "--cdrom", disc, "--verbose", *options, timeout=TIMEOUT)
    said = checks(result.console)
    assert result.code == 0, result.stderr + result.console
    assert said[0] == "started"
    # SeaBIOS does not look how large a disc is.
    summed = f"right sum {checksum(program):08x}"
    assert said[2:] == ["sector size 00000800", "sectors ffffffff", summed, "end"]
    assert f"using {layout} virtio mode" in result.stderr
    assert "found virtio-scsi" in result.stderr


def test_disks_come_before_discs(disk: Path, disc: Path, tmp_path: Path) -> None:
    blank = tmp_path / "blank.raw"
    blank.write_bytes(bytes(DISK_SECTORS * SECTOR))
    for path, size in ((disk, SECTOR), (blank, 2048)):
        result = boot("--firmware", SEABIOS, "--disk", path, "--cdrom", disc, timeout=TIMEOUT)
        assert f"sector size {size:08x}" in checks(result.console), result.console


@contextmanager
def tftp_server(files: dict[str, bytes]) -> Iterator[list[str]]:
    """Serves `files` on port 69 as RFC 1350 says, without options; gives the names that were asked for."""
    asked: list[str] = []
    stop = threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        door.bind(("", 69))
        door.settimeout(0.2)

        def serve() -> None:
            while not stop.is_set():
                try:
                    request, client = door.recvfrom(2048)
                except TimeoutError:
                    continue
                if request[:2] == b"\0\1":
                    name = request[2:].split(b"\0")[0].decode()
                    asked.append(name)
                    send(client, files.get(name))

        def send(client: tuple[str, int], data: bytes | None) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as transfer:
                transfer.settimeout(1)
                transfer.connect(client)
                if data is None:
                    transfer.send(b"\0\5\0\1no such file\0")
                    return
                for block in range(len(data) // 512 + 1):
                    packet = struct.pack(">HH", 3, block + 1) + data[512 * block : 512 * (block + 1)]
                    answer = b""
                    while answer[:4] != struct.pack(">HH", 4, block + 1) and not stop.is_set():
                        transfer.send(packet)
                        try:
                            answer = transfer.recv(2048)
                        except (TimeoutError, ConnectionRefusedError):
                            continue
                        if answer[:2] == b"\0\5":
                            return  # the client has seen enough

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            stop.set()
            thread.join()


@pytest.mark.root
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("network_namespace")
@pytest.mark.parametrize("options", [(), ("--legacy-virtio",)], ids=["modern", "legacy"])
def test_ipxe_starts_from_its_option_rom(options: tuple[str, ...]) -> None:
    prompt = "Press Ctrl-B for the iPXE command line"
    nic = f"tap0,local,rom={IPXE}"
    result = boot("--firmware", SEABIOS, "--nic", nic, *options, timeout=150, until=prompt)
    assert "starting execution...ok" in result.console, result.stderr
    assert "iPXE initialising devices...ok" in result.console
    assert prompt in result.console


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("network_namespace")
@pytest.mark.xfail(
    kvm_flavour() == "pvm",
    reason="kvm_pvm breaks interrupts in 32-bit protected mode: iPXE dies under QEMU there too",
    strict=True,
)
@pytest.mark.parametrize("options", [(), ("--legacy-virtio",)], ids=["modern", "legacy"])
def test_ipxe_boots_from_the_network(program: bytes, options: tuple[str, ...]) -> None:
    with tftp_server({"boot.bin": program}) as asked:
        nic = f"tap0,local,locked,boot=boot.bin,rom={IPXE}"
        result = boot("--firmware", SEABIOS, "--nic", nic, *options, timeout=300)
    assert "net0: 100.64.1.3/255.255.255.254 gw 100.64.1.2" in result.console, result.stderr + result.console
    assert asked, result.console
    assert set(asked) == {"boot.bin"}
    said = checks(result.console)
    assert (said[0], said[-1]) == ("started", "end"), result.console
    assert result.code == 0, result.stderr


@pytest.mark.root
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("network_namespace")
@pytest.mark.parametrize("layout", ["disable-modern=off", "disable-modern=on"], ids=["modern", "legacy"])
def test_ipxe_boots_from_our_network_worker_in_qemu(program: bytes, tmp_path: Path, layout: str) -> None:
    """iPXE's driver and network stack with our rings, DHCP answer and tap, on a CPU that runs it: TCG."""
    path = tmp_path / "net.sock"
    mac = "52:54:00:12:34:56"
    worker = [sys.executable, "-m", "vmrun", "worker", "net", "--socket", str(path)]
    qemu = ["qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-nographic", "-no-reboot"]
    qemu += ["-M", "pc,memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=128M,share=on"]
    qemu += ["-chardev", f"socket,id=worker,path={path}", "-netdev", "vhost-user,id=net,chardev=worker"]
    qemu += ["-device", f"virtio-net-pci,netdev=net,mac={mac},bootindex=1,{layout}"]
    qemu += ["-device", "isa-debug-exit,iobase=0x501,iosize=1"]
    nic = f"tap0,local,locked,mac={mac},boot=boot.bin"
    with (
        tftp_server({"boot.bin": program}) as asked,
        subprocess.Popen([*worker, "--nic", nic], cwd=REPOSITORY) as serving,
    ):
        try:
            while not path.exists():
                assert serving.poll() is None
                time.sleep(0.05)
            ended = subprocess.run(
                qemu, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150
            )
        finally:
            serving.terminate()
    assert "net0: 100.64.1.3/255.255.255.254 gw 100.64.1.2" in ended.stdout, ended.stderr + ended.stdout
    assert asked and set(asked) == {"boot.bin"}
    said = checks(ended.stdout)
    assert (said[0], said[-1]) == ("started", "end"), ended.stdout
    assert ended.returncode == 1  # isa-debug-exit makes 2n + 1 of n


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--firmware", "/dev/null"], EXIT_IMAGE, "not a regular file"),
        (["--firmware", "{folder}/odd"], EXIT_IMAGE, "such as SeaBIOS"),
        (["--firmware", "{folder}/missing"], EXIT_IMAGE, "no such file"),
        (["--firmware", str(SEABIOS), "--append", "quiet"], EXIT_USAGE, "leave out --kernel"),
        (["--nic", "tap0,rom=x.rom"], EXIT_USAGE, "add --firmware"),
        (
            ["--firmware", str(SEABIOS), "--nic", "tap0,rom=a", "--nic", "tap1,rom=b"],
            EXIT_USAGE,
            "the same file",
        ),
    ],
)
def test_what_cannot_be(tmp_path: Path, arguments: list[str], code: int, text: str) -> None:
    (tmp_path / "odd").write_bytes(bytes(70000))
    ended = boot(*(argument.format(folder=tmp_path) for argument in arguments), timeout=TIMEOUT)
    assert (ended.code, ended.console) == (code, "")
    assert text in ended.stderr
