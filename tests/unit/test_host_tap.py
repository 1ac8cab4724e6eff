"""Taps, real ones, in a network namespace of the test's own."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vmrun.errors import EXIT_USAGE, UserError
from vmrun.host.tap import (
    Tap,
    check_interface_name,
    parse_host_address,
    parse_mac,
    random_mac,
)

ROOT = Path(__file__).parents[2]


def exists(name: str) -> bool:
    return name in [found for _, found in socket.if_nameindex()]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def mac(interface: str) -> str:
    (link,) = json.loads(ip("-j", "link", "show", interface))
    return str(link["address"])


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_made_tap_carries_frames_and_disappears() -> None:
    with Tap("tap0", "172.16.0.1/24") as tap:
        assert tap.made_here
        assert "172.16.0.1/24" in ip("addr", "show", "tap0")
        assert not os.get_blocking(tap.fd)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("tap0", 0x88B5))  # the local experimental EtherType
            frame = b"\xff" * 6 + random_mac() + b"\x88\xb5" + b"from the host".ljust(50, b"\0")
            raw.send(frame)
            seen = []
            while frame not in seen:  # the host's own router solicitations may come first
                packet = os.read(tap.fd, 2048)
                assert packet[:12] == bytes(12)
                seen.append(packet[12:])
            raw.settimeout(10)
            answer = b"\xff" * 6 + random_mac() + b"\x88\xb5" + b"from the guest".ljust(50, b"\0")
            os.write(tap.fd, bytes(12) + answer)
            while raw.recv(2048) != answer:
                pass
    assert tap.fd == -1
    assert not exists("tap0")
    tap.close()


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_existing_tap_gets_back_what_it_was_lent() -> None:
    ip("tuntap", "add", "tap7", "mode", "tap")
    ip("addr", "add", "10.1.1.1/24", "dev", "tap7")
    with Tap("tap7", "10.2.2.1/24") as tap:
        assert not tap.made_here
        inside = ip("addr", "show", "tap7")
        assert "10.2.2.1/24" in inside and ",UP" in inside
    after = ip("addr", "show", "tap7")
    assert "10.1.1.1/24" in after and "10.2.2.1" not in after and ",UP" not in after


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_what_an_existing_tap_had_before_stays() -> None:
    ip("tuntap", "add", "tap7", "mode", "tap")
    ip("addr", "add", "10.1.1.1/24", "dev", "tap7")
    ip("link", "set", "tap7", "up")
    with Tap("tap7", "10.1.1.1/24"):
        pass
    after = ip("addr", "show", "tap7")
    assert "10.1.1.1/24" in after and ",UP" in after


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_existing_tap_deleted_meanwhile() -> None:
    ip("tuntap", "add", "tap7", "mode", "tap")
    with Tap("tap7", "10.2.2.1/24") as tap:
        ip("link", "del", "tap7")
    assert tap.fd == -1


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_tap_in_use() -> None:
    with Tap("tap0"), pytest.raises(UserError, match=r"tap0: in use by another vmrun") as caught:
        Tap("tap0")
    assert caught.value.code == EXIT_USAGE


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_not_a_tap() -> None:
    with pytest.raises(UserError, match="lo: exists, and is not a tap"):
        Tap("lo")
    ip("tuntap", "add", "tun7", "mode", "tun")
    with pytest.raises(UserError, match="tun7: exists, and is not a tap"):
        Tap("tun7")


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_nothing_is_left_when_the_address_is_refused() -> None:
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError):
        Tap("tap0", "172.16.0.1")
    # The kernel has its own reasons too: IPv6 turned off on the interface.
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    with pytest.raises(OSError, match="tap0, address fd00::1/64"):
        Tap("tap0", "fd00::1/64")
    assert not exists("tap0")
    assert set(os.listdir("/proc/self/fd")) == fds


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_link_alone_does_not_import_pyroute2() -> None:
    program = (
        "import sys; from vmrun.host.tap import Tap\n"
        "with Tap('tap0'): assert 'pyroute2' not in sys.modules\n"
        "with Tap('tap0', '10.0.0.1/8'): assert 'pyroute2' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_made_tap_is_gone_after_sigkill() -> None:
    program = (
        "from vmrun.host.tap import Tap; import time\n"
        "with Tap('tap9', '172.16.9.1/24'): print('up', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        assert exists("tap9")
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not exists("tap9")


def run_without_net_admin(program: str) -> str:
    """Run `program` as root without CAP_NET_ADMIN, and return the UserError it ended with."""
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c"]
    wrapped = f"from vmrun.host.tap import *\ntry: {program}\nexcept UserError as error: print(error)"
    return subprocess.run([*command, wrapped], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_without_net_admin() -> None:
    assert "tap0: making a tap, or using somebody else's, takes CAP_NET_ADMIN" in run_without_net_admin(
        "Tap('tap0')"
    )
    ip("tuntap", "add", "tap7", "mode", "tap", "user", "root")
    assert "tap7: is down, and bringing it up takes CAP_NET_ADMIN" in run_without_net_admin("Tap('tap7')")
    ip("link", "set", "tap7", "up")
    assert run_without_net_admin("Tap('tap7').close()") == ""
    assert "giving tap7 an address takes CAP_NET_ADMIN" in run_without_net_admin("Tap('tap7', '10.0.0.1/8')")


def test_tun_device_missing_or_closed_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: OSError) -> None:
        def fail(*arguments: object) -> int:
            raise error

        monkeypatch.setattr(os, "open", fail)

    failing(FileNotFoundError(2, "no"))
    with pytest.raises(UserError, match="/dev/net/tun is missing"):
        Tap("tap0")
    failing(PermissionError(13, "no"))
    with pytest.raises(UserError, match="/dev/net/tun: permission denied"):
        Tap("tap0")


@pytest.mark.parametrize("name", ["", "a" * 16, "a/b", "tap%d", "a b", ".", "..", "a:b", "t\n", "ä" * 8])
def test_bad_names(name: str) -> None:
    with pytest.raises(UserError):
        check_interface_name(name)


@pytest.mark.parametrize("name", ["tap0", "a" * 15, "vm-1.eth0", "ä" * 7])
def test_good_names(name: str) -> None:
    assert check_interface_name(name) == name


@pytest.mark.parametrize(
    "text",
    ["", "52:54:00:12:34", "52:54:00:12:34:5g", "525400123456", "52:54:00:12:34:567", "53:54:00:12:34:56",
     "00:00:00:00:00:00", "52:54:00:12:34:+1", "52:54:00:12:34:٣٤"],
)  # fmt: skip
def test_bad_macs(text: str) -> None:
    with pytest.raises(UserError, match=r"^mac="):
        parse_mac(text)


def test_macs() -> None:
    assert parse_mac("52:54:00:12:34:56") == parse_mac("52-54-00-12-34-56") == bytes.fromhex("525400123456")
    for _ in range(64):
        (first,) = struct.unpack_from("B", random_mac())
        assert first & 3 == 2
    assert random_mac() != random_mac()


@pytest.mark.parametrize(
    "text",
    ["", "172.16.0.1", "172.16.0.1/", "172.16.0.1/33", "172.16.0/24", "172.16.0.0/24", "172.16.0.255/24",
     "224.0.0.1/24", "0.0.0.0/0", "::/64", "x/24"],
)  # fmt: skip
def test_bad_addresses(text: str) -> None:
    with pytest.raises(UserError, match=r"^ip="):
        parse_host_address(text)


def test_good_addresses() -> None:
    assert parse_host_address("172.16.0.1/24") == ("172.16.0.1", 24)
    assert parse_host_address("10.0.0.0/31") == ("10.0.0.0", 31)
    assert parse_host_address("fd00::1/64") == ("fd00::1", 64)
