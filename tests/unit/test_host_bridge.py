"""Bridges, real ones, in a network namespace of the test's own."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_host_tap import exists, ip, mac
from vmrun.errors import UserError
from vmrun.host.addresses import network_lock
from vmrun.host.bridge import BridgePort
from vmrun.host.nics import Nics
from vmrun.host.tap import Tap
from vmrun.machine.config import NicConfig

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("network_namespace")]

ROOT = Path(__file__).parents[2]


def master(interface: str) -> str:
    words = ip("-o", "link", "show", interface).split()
    return words[words.index("master") + 1] if "master" in words else ""


def test_made_joined_and_removed_by_the_last() -> None:
    with Tap("tap0") as first, Tap("tap1") as second:
        one = BridgePort("br0", first.name, "172.16.0.1/24")
        assert ",UP" in ip("link", "show", "br0")
        assert "172.16.0.1/24" in ip("addr", "show", "br0")
        # It has a MAC of its own, not one of its ports'.
        assert mac("br0") not in (mac("tap0"), mac("tap1"))
        with BridgePort("br0", second.name, "172.16.0.1/24"):
            one.close()
            one.close()
            assert (master("tap0"), master("tap1")) == ("", "br0")
            assert "172.16.0.1/24" in ip("addr", "show", "br0")
        assert not exists("br0")


def test_frames_pass() -> None:
    with (
        Tap("tap0") as first,
        Tap("tap1") as second,
        BridgePort("br0", "tap0"),
        BridgePort("br0", "tap1"),
    ):
        frame = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(46)
        os.write(first.fd, bytes(12) + frame)
        os.set_blocking(second.fd, True)
        while os.read(second.fd, 2000)[12:] != frame:
            pass


def test_somebody_elses_bridge_stays() -> None:
    ip("link", "add", "br7", "type", "bridge")
    ip("addr", "add", "10.0.0.1/8", "dev", "br7")
    ip("addr", "add", "fd00::1/64", "dev", "br7")
    with Tap("tap0"):
        with BridgePort("br7", "tap0", "10.0.0.1/8"):
            assert master("tap0") == "br7"
            assert ",UP" in ip("link", "show", "br7")
        assert master("tap0") == ""
        with pytest.raises(UserError, match="br7 is not vmrun's own: give it the address yourself"):
            BridgePort("br7", "tap0", "10.0.0.2/8")
        assert master("tap0") == ""
        with BridgePort("br7", "tap0", "fd00::1/64"):
            assert master("tap0") == "br7"
    assert exists("br7")
    assert "10.0.0.2" not in ip("addr", "show", "br7")


def test_a_tap_that_was_on_the_bridge_stays_on_it() -> None:
    ip("link", "add", "br7", "type", "bridge")
    ip("tuntap", "add", "tap7", "mode", "tap")
    ip("link", "set", "tap7", "master", "br7")
    with Tap("tap7"), BridgePort("br7", "tap7"):
        pass
    assert master("tap7") == "br7"
    with Tap("tap7"), pytest.raises(UserError, match="tap7: is on the bridge br7 already"):
        BridgePort("br8", "tap7")
    assert master("tap7") == "br7"
    assert not exists("br8")


def test_not_a_bridge() -> None:
    with Tap("tap0"), pytest.raises(UserError, match=r"^bridge=lo: exists, and is not a bridge"):
        BridgePort("lo", "tap0")
    with pytest.raises(UserError, match=r"^bridge=a234567890123456: "):
        BridgePort("a234567890123456", "tap0")
    ip("tuntap", "add", "tap7", "mode", "tap")
    ip("link", "set", "tap7", "alias", "vmrun")
    with Tap("tap0"), pytest.raises(UserError, match="exists, and is not a bridge"):
        BridgePort("tap7", "tap0")
    assert exists("lo") and exists("tap7")


def test_deleted_meanwhile() -> None:
    with Tap("tap0"), BridgePort("br0", "tap0"):
        ip("link", "del", "br0")
    ip("tuntap", "add", "tap7", "mode", "tap")
    with Tap("tap7"), BridgePort("br0", "tap7"):
        ip("link", "del", "tap7")
    assert not exists("br0")


def test_without_net_admin() -> None:
    ip("link", "add", "br7", "type", "bridge")
    ip("tuntap", "add", "tap7", "mode", "tap")
    program = (
        "from vmrun.host.bridge import *\n"
        "for name in ('br7', 'br8'):\n"
        "    try: BridgePort(name, 'tap7')\n"
        "    except UserError as error: print(error)"
    )
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["bridge=br7", "bridge=br8"]
    assert all("takes CAP_NET_ADMIN" in line for line in said)
    # What is there already needs no right.
    ip("link", "set", "tap7", "master", "br7")
    ip("link", "set", "br7", "up")
    subprocess.run([*command[:-1], program.replace("'br8'", "'br7'")], check=True, cwd=ROOT)


def test_after_sigkill_the_next_machine_tidies_up() -> None:
    program = (
        "from vmrun.host.nics import Nics; from vmrun.machine.config import NicConfig; import time\n"
        "with Nics([NicConfig('tap9', bridge='br0')]): print('up', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert exists("br0") and not exists("tap9")
    with Nics([NicConfig("tap0", bridge="br0")]):
        assert master("tap0") == "br0"
    assert not exists("br0")


def test_cards_of_one_machine() -> None:
    fds = set(os.listdir("/proc/self/fd"))
    configs = [
        NicConfig("tap0", bridge="br0", address="10.0.0.1/8"),
        NicConfig("tap1", bridge="br0", mtu=9000, locked=True),
        NicConfig("tap2", bytes.fromhex("020000000001"), "10.9.0.1/16"),
    ]
    with Nics(configs) as nics:
        assert [nic.tap.name for nic in nics] == ["tap0", "tap1", "tap2"]
        words = [nic.words for nic in nics]
        assert set(words[0]) == {"mac"}
        assert (words[1]["mtu"], words[1]["locked"]) == ("9000", "1")
        assert words[2] == {"mac": "02:00:00:00:00:01"}
        assert (master("tap0"), master("tap1"), master("tap2")) == ("br0", "br0", "")
        assert "10.0.0.1" not in ip("addr", "show", "tap0")
        assert "mtu 9000" in ip("link", "show", "tap1")
    assert {name for _, name in socket.if_nameindex()} == {"lo"}
    with pytest.raises(UserError, match="br0/x"):
        Nics([NicConfig("tap0", bridge="br0"), NicConfig("tap1", bridge="br0/x")])
    assert {name for _, name in socket.if_nameindex()} == {"lo"}
    assert set(os.listdir("/proc/self/fd")) == fds


def test_the_lock_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmrun.host.addresses.LOCK_SECONDS", 0.0)
    with network_lock(), pytest.raises(UserError, match="holds the lock"), network_lock():
        pass
    with network_lock():
        pass
