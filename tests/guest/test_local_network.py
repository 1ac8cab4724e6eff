"""Linux guests on the network: an address by DHCP from a `local` card, and two guests on one bridge."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.conftest import REPOSITORY, MakeInitramfs, boot
from vmrun.guestkit import host, kit

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("network_namespace")]

# busybox is the shell, its applets, and the DHCP client.
INIT = b"""#!/bin/busybox sh
busybox mount -t proc proc /proc
export PATH=/bin
for word in $(busybox cat /proc/cmdline); do
    case $word in steps=*) steps=${word#steps=} ;; esac
done
. /steps/$steps
busybox reboot -f
"""
CONFIGURE = b"""#!/bin/busybox sh
[ "$1" = bound ] || exit 0
echo "lease $interface $ip/$mask router $router dns $dns time $lease server $serverid"
busybox ip address add $ip/31 dev $interface
busybox ip route replace default via $router
"""
ASK = b"""
busybox ip link set eth0 up
busybox udhcpc -i eth0 -n -q -t 5 -s /configure && echo "asked ok"
busybox ip -4 address show eth0
busybox ping -c 1 -W 10 100.64.1.2 && echo "ping ok"
"""
TWO_CARDS = b"""
for card in eth0 eth1; do
    busybox ip link set $card up
    busybox udhcpc -i $card -n -q -t 5 -s /configure
    busybox ip -o link show $card
done
busybox ping -c 1 -W 10 100.64.1.4 && echo "ping ok"
"""
ANSWER = b"""
busybox ip address add 10.77.0.1/24 dev eth0
busybox ip link set eth0 up
echo "here I am"
busybox sleep 600
"""
CALL = b"""
busybox ip address add 10.77.0.2/24 dev eth0
busybox ip link set eth0 up
busybox ping -c 1 -W 20 10.77.0.1 && echo "ping ok"
"""


@pytest.fixture(scope="module")
def network_initramfs(initramfs: MakeInitramfs, guest_kit: kit.GuestKit) -> Path:
    return initramfs(
        {
            "init": INIT,
            "configure": CONFIGURE,
            "bin/busybox": host.BUSYBOX,
            "proc/.keep": b"",
            "steps/ask": ASK,
            "steps/two_cards": TWO_CARDS,
            "steps/answer": ANSWER,
            "steps/call": CALL,
        }
    )


@pytest.mark.timeout(400)
def test_a_guest_gets_its_address_and_reaches_the_host(network_initramfs: Path) -> None:
    result = boot(
        *("--initrd", network_initramfs, "--append", "steps=ask", "--nic", "tap0,local,locked"), timeout=300
    )
    said = result.console.splitlines()
    assert (
        "lease eth0 100.64.1.3/31 router 100.64.1.2 dns 100.64.1.2 time 4294967295 server 100.64.1.2"
    ) in said, result.console + result.stderr
    assert "asked ok" in said
    assert "ping ok" in said, result.console
    assert result.code == 0, result.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_card_has_its_own_link(network_initramfs: Path) -> None:
    result = boot(
        *("--initrd", network_initramfs, "--append", "steps=two_cards"),
        *("--nic", "tap0,local,mtu=1400", "--nic", "tap1,local"),
        timeout=300,
    )
    leases = [line.split()[1:3] for line in result.console.splitlines() if line.startswith("lease ")]
    assert leases == [
        ["eth0", "100.64.1.3/31"],
        ["eth1", "100.64.1.5/31"],
    ], result.console
    assert "ping ok" in result.console.splitlines(), result.console
    assert "eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1400 " in result.console
    assert "eth1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 " in result.console


@contextmanager
def running(*arguments: str | Path, until: str) -> Iterator[None]:
    """A machine that has said `until`, stopped at the end."""
    command = [sys.executable, "-m", "vmrun", "boot", "--timeout", "700s", *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if until in line:
                    break
            else:
                raise AssertionError("".join(said))
            yield
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_two_guests_on_one_bridge(network_initramfs: Path) -> None:
    with running(
        *("--initrd", network_initramfs, "--append", "steps=answer", "--nic", "tap0,bridge=br0,locked"),
        until="here I am",
    ):
        result = boot(
            *("--initrd", network_initramfs, "--append", "steps=call", "--nic", "tap1,bridge=br0"),
            timeout=300,
        )
    assert "ping ok" in result.console.splitlines(), result.console + result.stderr
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "br0" not in links and "tap" not in links
