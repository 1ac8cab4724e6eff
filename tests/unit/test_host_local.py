"""Addresses for `local` cards: which block is free, and real taps that get them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_interface
from pathlib import Path

import pytest

from tests.unit.test_host_tap import ip, mac
from vmrun.errors import UserError
from vmrun.host import local
from vmrun.host.nics import Nics
from vmrun.machine.config import NicConfig

ROOT = Path(__file__).parents[2]


def block(*taken: str) -> str:
    return str(local.free_block(ip_interface(text) for text in taken))


def test_blocks() -> None:
    assert block() == "100.64.1.0/24"
    assert block("10.0.0.1/8", "127.0.0.1/8", "100.128.0.1/9", "fd00::1/64") == "100.64.1.0/24"
    assert block("100.64.1.2/31") == "100.64.2.0/24"
    assert block("100.64.1.254/32", "100.64.3.2/31") == "100.64.2.0/24"
    assert block("100.64.2.9/22") == "100.64.4.0/24"
    assert block("100.64.255.1/16") == "100.65.0.0/24"
    # A carrier's network is all of the space: only the host's own address is in the way.
    assert block("100.64.1.77/10") == "100.64.2.0/24"
    assert block("100.99.1.77/10") == "100.64.1.0/24"


def test_nothing_free() -> None:
    everything: Iterator[str] = (f"100.{second}.0.1/16" for second in range(64, 128))
    with pytest.raises(UserError, match="in use on this host"):
        block(*everything)


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_taps_get_their_links() -> None:
    configs = [
        NicConfig("tap0", local=True),
        NicConfig("tap1"),
        NicConfig("tap2", local=True, boot_file="pxelinux.0"),
    ]
    with Nics(configs, "vm7") as nics:
        words = [nic.words for nic in nics]
        assert words[0]["local"] == "100.64.1.2"
        assert words[0]["hostmac"] == mac("tap0")
        assert set(words[0]) == {"mac", "local", "hostmac"}
        assert set(words[1]) == {"mac"}
        assert (words[2]["local"], words[2]["boot"], words[2]["hostname"]) == (
            "100.64.1.6",
            "pxelinux.0",
            "vm7",
        )
        assert "inet 100.64.1.2/31 scope" in ip("addr", "show", "tap0")
        assert "inet 100.64.1.6/31 scope" in ip("addr", "show", "tap2")
        with Nics([NicConfig("tap3", local=True)]) as others:
            assert [nic.words["local"] for nic in others] == ["100.64.2.2"]
    with Nics([NicConfig("tap3", local=True)]) as others:
        assert [nic.words["local"] for nic in others] == ["100.64.1.2"]


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_an_existing_tap_gives_its_address_back() -> None:
    ip("tuntap", "add", "tap7", "mode", "tap")
    with Nics([NicConfig("tap7", local=True)]):
        assert "100.64.1.2/31" in ip("addr", "show", "tap7")
    assert "100.64" not in ip("addr", "show", "tap7")


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_machines_that_start_at_once_do_not_meet() -> None:
    program = (
        "import sys; from vmrun.host.nics import Nics; from vmrun.machine.config import NicConfig\n"
        "import pyroute2; print('ready', flush=True); sys.stdin.readline()\n"
        "with Nics([NicConfig(sys.argv[1], local=True)]) as nics:\n"
        "    print(*(nic.words['local'] for nic in nics), flush=True); sys.stdin.readline()\n"
    )
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program, f"tap{number}"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                )
            )
            for number in range(4)
        ]  # fmt: skip
        pipes = [(child.stdin, child.stdout) for child in children if child.stdin and child.stdout]
        assert [output.readline() for _, output in pipes] == ["ready\n"] * 4
        for go, _ in pipes:
            go.write("\n")
            go.flush()
        assert sorted(output.readline() for _, output in pipes) == [
            f"100.64.{number}.2\n" for number in range(1, 5)
        ]
        for go, _ in pipes:
            go.write("\n")
            go.close()


def test_too_many_cards() -> None:
    with pytest.raises(UserError, match="only the first 126"):
        local.assign({126: _Named()})  # type: ignore[dict-item]


class _Named:
    name = "tap126"


def test_config() -> None:
    for arguments, message in (
        ({"local": True, "bridge": "br0"}, "local is a link with the host alone"),
        ({"local": True, "address": "10.0.0.1/8"}, "local is a link with the host alone"),
        ({"boot_file": "x"}, "add local"),
        ({"local": True, "boot_file": "x" * 128}, "127 bytes"),
        ({"mtu": 67}, "give 68 to 65521"),
        ({"mtu": 65522}, "give 68 to 65521"),
    ):
        with pytest.raises(UserError, match=message):
            NicConfig("tap0", **arguments)


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
@pytest.mark.parametrize("mtu", [68, 65521])
def test_a_tap_takes_every_mtu_that_is_allowed(mtu: int) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    with Nics([NicConfig("tap0", mtu=mtu)]):
        assert f"mtu {mtu} " in ip("link", "show", "tap0")
    ip("tuntap", "add", "tap7", "mode", "tap")
    with Nics([NicConfig("tap7", mtu=mtu)]):
        assert "mtu 1500 " in ip("link", "show", "tap7")
    assert set(os.listdir("/proc/self/fd")) == fds
