"""User cards: what users may say of them, and real passts, in a network namespace whose only way out is a tap
that nobody reads: what is reached there is the host itself.
"""

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.net.frames import Datagram, build_frame, parse_datagram
from devices.virtio.device import VIRTIO_ID_NET
from tests.unit.test_host_tap import ip
from tests.unit.worker_session import Session
from vmrun.cli.options import parse_net, parse_nic
from vmrun.errors import EXIT_VMM, UserError
from vmrun.host import outbound, passt
from vmrun.host.nics import Nics
from vmrun.host.passt import Passt
from vmrun.machine.config import MachineConfig, NicConfig
from vmrun.machine.config_json import describe_config, parse_config
from vmrun.machine.loop import EventLoop

ROOT = Path(__file__).parents[2]
MAC = bytes.fromhex("525400123456")
RX, TX = 0, 1
NOBODY = 4242

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")


def test_what_users_say() -> None:
    assert parse_nic("user") == NicConfig("user", user=True)
    card = parse_nic("user,mac=52:54:00:12:34:56,allow=example.org:443+10.1.0.0/16,allow-private")
    assert card == NicConfig(
        "user", MAC, user=True, allow=("example.org:443", "10.1.0.0/16"), allow_private=True
    )
    assert parse_net(None) == parse_net("none") == ()
    assert parse_net("tap0,locked") == (NicConfig("tap0", locked=True),)
    assert parse_net("user", ["a.b:1", "c"]) == (NicConfig("user", user=True, allow=("a.b:1", "c")),)
    config = MachineConfig(nics=(card,))
    assert parse_config(describe_config(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tap0,allow=example.org", "for --nic user"),
        ("tap0,allow-private", "for --nic user"),
        ("user,ip=10.0.0.1/24", "are for taps"),
        ("user,bridge=br0", "are for taps"),
        ("user,locked", "are for taps"),
        ("user,local", "are for taps"),
        ("user,boot=x", "add local"),
        ("user,allow=a+", "give HOST"),
        ("user,allow=a b", "give HOST"),
        ("user,allow=-a", "give HOST"),
        ("user,allow=:80", "give HOST"),
        ("user,allow=a:0", "a port is"),
        ("user,allow=a:65536", "a port is"),
        ("user,allow=a:http", "a port is"),
        ("user,allow=fd00::1", "only IPv4"),
        ("user,allow=1.2.3", "not an IPv4"),
        ("user,allow=1.2.3.4/40", "a prefix is"),
        ("user,allow=127.0.0.1:80", "no guest gets there"),
        ("user,allow=0.0.0.0", "no guest gets there"),
        ("user,allow=224.0.0.0/8", "no guest gets there"),
    ],
)
def test_what_users_may_not_say(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_nic(text)
    if text.startswith("user,allow="):
        with pytest.raises(UserError, match=message):
            parse_net("user", [text.removeprefix("user,allow=")])


@pytest.mark.parametrize("text", [None, "none", "tap0"])
def test_rules_are_for_user_cards(text: str | None) -> None:
    with pytest.raises(UserError, match="add it"):
        parse_net(text, ["example.org"])
    with pytest.raises(UserError, match="add it"):
        parse_net(text, (), True)


def test_names_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(name: str, *_: object) -> list[tuple[object, ...]]:
        addresses = {"two.test": ["8.8.4.4", "8.8.8.8"], "rebound.test": ["127.0.0.1"]}
        if name not in addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, 0)) for text in addresses[name]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    words = ("two.test:80", "192.0.2.1:80", "10.0.0.0/8", "192.0.2.1:80")
    assert outbound.resolve(words, (), private=False) == [
        *("8.8.4.4/32:80", "8.8.8.8/32:80", "192.0.2.1:80", "10.0.0.0/8:0")
    ]
    with pytest.raises(UserError, match=r"none\.test:1: no IPv4 address for none\.test: name or service"):
        outbound.resolve(("none.test:1",), (), private=False)
    with pytest.raises(UserError, match=r"rebound\.test is 127\.0\.0\.1: a name opens public"):
        outbound.resolve(("rebound.test",), (), private=True)
    with pytest.raises(UserError, match="allow networks"):
        many = tuple(f"10.0.{number >> 8}.{number & 255}" for number in range(300))
        outbound.resolve(many, (), private=False)


def test_whoever_answers_for_a_name_opens_public_addresses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the cloud's metadata, not the user's network, and not this host, which is 8.8.4.4 and 10.1.2.3."""
    own = ("8.8.4.4/32", "10.1.2.3/32")
    special = ["169.254.169.254", "127.0.0.1", "192.0.2.1", "10.1.2.3", "8.8.4.4", "0.0.0.0", "224.0.0.1"]
    private = ["10.1.2.4", "192.168.1.1", "172.16.0.1", "100.64.0.9"]
    answers: list[str] = []

    def getaddrinfo(name: str, *_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, 0)) for text in answers]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    answers = [*special, *private, "8.8.8.8"]
    assert outbound.resolve(("a.test:80",), own, private=False) == ["8.8.8.8/32:80"]
    opened = [f"{address}/32:0" for address in (*private, "8.8.8.8")]
    assert outbound.resolve(("a.test",), own, private=True) == opened
    answers = [*special, *private]
    with pytest.raises(UserError, match=r"a\.test:80: a\.test is 169\.254\.169\.254.*give the address"):
        outbound.resolve(("a.test:80",), own, private=False)
    # What the user wrote is another matter.
    assert outbound.resolve(special[3:5], own, private=False) == ["10.1.2.3:0", "8.8.4.4:0"]


def test_a_host_without_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="apt install passt"):
        Nics([NicConfig("user", user=True)])


def test_a_passt_that_talks_nonsense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def script(text: str) -> None:
        path = tmp_path / "passt"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(passt, "find", lambda: os.fspath(path))

    script("printf '\\377\\377\\377\\377' >&3; exec sleep 600")
    with Passt(0, MAC) as card, pytest.raises(UserError, match="answered with 4294967295 bytes"):
        card.wait_ready()
    script("echo 'Failed to send 3 bytes to syslog' >&2; printf 'it \\033[2J broke\\n' >&2; exit 3")
    with (
        Passt(0, MAC) as card,
        pytest.raises(UserError, match=r"passt exited with status 3: it \?\[2J broke$"),
    ):
        card.wait_ready()
    monkeypatch.setattr(passt, "READY_SECONDS", 0.1)
    monkeypatch.setattr(passt, "STOP_SECONDS", 0.2)
    script("trap '' TERM; while :; do sleep 1; done")
    with Passt(0, MAC) as card:
        with pytest.raises(UserError, match="does not answer"):
            card.wait_ready()
        ended = os.pidfd_open(card.pid)
    assert select.select([ended], [], [], 0)[0]  # killed and reaped
    os.close(ended)


@pytest.fixture
def way_out(network_namespace: None) -> Iterator[None]:
    """10.9.0.1 and 10.9.0.2 are this host's, and there is a default route."""
    ip("link", "set", "lo", "up")
    ip("tuntap", "add", "out0", "mode", "tap")
    ip("address", "add", "10.9.0.1/24", "dev", "out0")
    ip("address", "add", "10.9.0.2/32", "dev", "out0")
    ip("link", "set", "out0", "up")
    ip("route", "add", "default", "via", "10.9.0.254")
    yield


real = pytest.mark.usefixtures("way_out")
root = pytest.mark.root


class Guest:
    """The guest of the one card of `nics`, which sends and gets single datagrams. A context manager."""

    def __init__(self, nics: Nics) -> None:
        (self.nic,) = nics
        self.gateway = self.nic.words["local"]
        self.session = Session("net", VIRTIO_ID_NET, 2, self.nic.words, self.nic.fds)

    def frame(self, destination: str, port: int, payload: bytes) -> bytes:
        gateway = socket.inet_aton(self.gateway)
        guest = gateway[:3] + bytes((gateway[3] + 1,))
        gateway_mac = bytes.fromhex(self.nic.words["hostmac"].replace(":", ""))
        ends = (guest, socket.inet_aton(destination), 40000, port)
        return build_frame(Datagram(MAC, gateway_mac, *ends, payload))

    def send(self, destination: str, port: int, payload: bytes) -> None:
        self.session.offer(TX, [bytes(12) + self.frame(destination, port, payload)], [])
        self.session.collect(TX)

    def receive(self) -> tuple[str, bytes]:
        """Who sent the next datagram, and what is in it."""
        self.session.offer(RX, [], [1526])
        ((_, length, data),) = self.session.collect(RX)
        answer = parse_datagram(data[12:length])
        assert answer is not None
        return socket.inet_ntoa(answer.source), answer.payload

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.session.__exit__()


def listen(address: str, port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, port))
    sock.settimeout(10)
    return sock


@needs_passt
@root
@real
def test_own_addresses() -> None:
    assert set(outbound.own_addresses()) == {"10.9.0.1/32", "10.9.0.2/32"}


@needs_passt
@root
@real
def test_the_guest_reaches_what_is_allowed_and_not_this_host() -> None:
    everywhere, loopback = listen("0.0.0.0"), listen("127.0.0.1")
    port, inner = everywhere.getsockname()[1], loopback.getsockname()[1]
    config = parse_nic(f"user,mac={MAC.hex(':')},allow=10.9.0.1:{port}+0.0.0.0/0:1,allow-private")
    with everywhere, loopback, Nics([config]) as nics:
        with Guest(nics) as guest:
            guest.send("127.0.0.1", inner, b"closed")
            guest.send("0.0.0.0", port, b"closed")
            guest.send("10.9.0.2", port, b"closed")
            guest.send(guest.gateway, port, b"closed")
            guest.send("10.9.0.1", port, b"open")
            payload, sender = everywhere.recvfrom(100)
            assert payload == b"open"
            everywhere.sendto(b"answer", sender)
            assert guest.receive() == ("10.9.0.1", b"answer")
        # And passt would have: without the card's worker in between, everything is open.
        (nic,) = nics
        assert nic.passt is not None
        frame = guest.frame("127.0.0.1", inner, b"unfiltered, and long enough to need no padding")
        os.write(nic.passt.fd, struct.pack(">I", len(frame)) + frame)
        assert loopback.recv(100).startswith(b"unfiltered")


@needs_passt
@root
@real
def test_names_go_to_the_name_server_of_the_host() -> None:
    """Which the guest does not reach otherwise."""
    with open("/etc/resolv.conf") as file:
        servers = [line.split()[1] for line in file if line.startswith("nameserver ") and ":" not in line]
    if not servers or servers[0].startswith("127."):
        pytest.skip("this host has no name server that every passt reaches")
    ip("address", "add", f"{servers[0]}/32", "dev", "out0")
    config = parse_nic(f"user,mac={MAC.hex(':')},allow=10.9.0.1")
    with listen(servers[0], 53) as names, Nics([config]) as nics, Guest(nics) as guest:
        guest.send(servers[0], 53, b"closed")
        guest.send(guest.gateway, 53, b"who is")
        payload, sender = names.recvfrom(100)
        assert payload == b"who is"
        names.sendto(b"it is", sender)
        assert guest.receive() == (guest.gateway, b"it is")


@needs_passt
@root
@real
def test_passt_has_no_rights_and_no_descriptor_of_ours(tmp_path: Path) -> None:
    secret = os.open(tmp_path, os.O_RDONLY)  # not even one that is inheritable by mistake
    os.set_inheritable(secret, True)
    try:
        with Nics([NicConfig("user", user=True), NicConfig("user", user=True)]) as nics:
            first, second = nics
            assert (first.words["local"], second.words["local"]) == ("100.64.0.2", "100.64.0.4")
            for nic in (first, second):
                assert nic.passt is not None
                status = Path(f"/proc/{nic.passt.pid}/status").read_text()
                assert "CapEff:\t0000000000000000" in status and "Uid:\t0\t" not in status
                places = [os.readlink(f"/proc/{nic.passt.pid}/fd/{fd}") for fd in (0, 1)]
                assert places == ["/dev/null"] * 2
                assert not any(
                    os.readlink(each) == os.fspath(tmp_path)
                    for each in Path(f"/proc/{nic.passt.pid}/fd").iterdir()
                )
    finally:
        os.close(secret)


@needs_passt
@root
@real
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_passt_ends_with_the_vmm(number: int) -> None:
    program = (
        "from vmrun.host.nics import Nics; from vmrun.machine.config import NicConfig; import time\n"
        "with Nics([NicConfig('user', user=True)]) as nics:\n"
        "    print(*(nic.passt.pid for nic in nics), flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as vmm:
        assert vmm.stdout is not None
        pidfd = os.pidfd_open(int(vmm.stdout.readline()))
        vmm.send_signal(number)
        assert select.select([pidfd], [], [], 20)[0]
        os.close(pidfd)


@needs_passt
@root
@real
def test_a_passt_that_dies_is_told_of() -> None:
    with Nics([NicConfig("user", user=True)]) as nics:
        (nic,) = nics
        assert nic.passt is not None
        assert nic.passt.describe_exit() == "passt is running"
        ends: list[tuple[int, str]] = []

        def end(code: int, reason: str) -> None:
            ends.append((code, reason))
            loop.stop()

        loop = EventLoop()
        try:
            nics.watch(loop, end)
            os.kill(nic.passt.pid, signal.SIGKILL)
            loop.run()
        finally:
            loop.close()
        assert ends == [(EXIT_VMM, "passt was killed by signal 9")]


@needs_passt
@root
@pytest.mark.usefixtures("network_namespace")
def test_a_host_without_a_network() -> None:
    with pytest.raises(UserError, match=r"No external routable interface.*no default route"):
        Nics([NicConfig("user", user=True)])


@needs_passt
@root
@real
def test_without_root() -> None:
    """As another user, with no groups and no capabilities."""

    def unprivileged() -> str:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with Nics([parse_nic("user,allow=10.1.0.0/16")]) as nics:
            (nic,) = nics
            assert nic.passt is not None
            status = Path(f"/proc/{nic.passt.pid}/status").read_text()
            uid = status.split("Uid:")[1].split()[0]
            return f"{nic.words['own']} {uid}"

    assert in_child(unprivileged) == f"10.9.0.1/32+10.9.0.2/32 {NOBODY}"


def in_child(run: Callable[[], str]) -> str:
    """What `run` returns, or the error it raises, in a child process."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = run()
        except BaseException as error:
            said = repr(error)
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said
