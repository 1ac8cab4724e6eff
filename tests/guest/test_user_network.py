"""A Linux guest on a `user` card: an address by DHCP, names, and pages through passt from where it may go,
and nothing from where it may not.
"""

import hashlib
import http.server
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.guest.conftest import MakeInitramfs, boot
from tests.guest.test_local_network import CONFIGURE, INIT
from tests.unit.test_host_tap import ip
from vmrun.guestkit import host, kit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.by_hand,
    pytest.mark.root,
    pytest.mark.usefixtures("network_namespace"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed"),
]

HOST = "10.9.0.1"
# busybox's wget asks the C library for the port of "http", which a static one cannot tell; so nc it is.
FETCH = b"""
busybox ip link set eth0 up
busybox udhcpc -i eth0 -n -q -t 5 -s /configure || echo "no lease"
get() { printf 'GET %s HTTP/1.0\r\n\r\n' $3 | busybox nc -w $4 $1 $2; }
echo "page: $(get 10.9.0.1 8080 / 60 | busybox tail -n 1)"
echo "big: $(get 10.9.0.1 8080 /big 60 | busybox tail -c 32768 | busybox md5sum)"
echo "name:" $(busybox nslookup -type=a page.test 100.64.0.2)
for place in "10.9.0.1 8081" "10.9.0.2 8080" "100.64.0.2 8080"; do
    get $place / 2 || echo "$place: closed"
done
echo "done"
"""
BIG = bytes(range(256)) * 128


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(BIG if self.path == "/big" else b"a page of the host's")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(port: int) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("0.0.0.0", port), Page) as server:
        # Threads are in the namespace of who starts them.
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def naming(address: str) -> Iterator[None]:
    """A name server at `address`, to which every name is HOST."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 53))

        def serve() -> None:
            while (query := sock.recvfrom(512))[0] != b"end":
                message, sender = query
                kind = message[message.index(b"\0", 12) + 1 :][:2]
                found = kind == b"\0\1"  # A
                answer = b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 60, 4) + socket.inet_aton(HOST)
                head = message[:2] + b"\x81\x80" + struct.pack(">HHHH", 1, found, 0, 0)
                sock.sendto(head + message[12:] + (answer if found else b""), sender)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            sock.sendto(b"end", (address, 53))
            thread.join()


def name_server() -> str | None:
    """The host's, to where it is in the namespace; None when passt of 2023 would not find it."""
    with open("/etc/resolv.conf") as file:
        servers = [line.split()[1] for line in file if line.startswith("nameserver ") and ":" not in line]
    return servers[0] if servers and not servers[0].startswith("127.") else None


@pytest.mark.timeout(400)
def test_a_guest_goes_out_where_it_may(initramfs: MakeInitramfs, guest_kit: kit.GuestKit) -> None:
    root: Path = initramfs(
        {
            "init": INIT,
            "configure": CONFIGURE,
            "bin/busybox": host.BUSYBOX,
            "proc/.keep": b"",
            "steps/fetch": FETCH,
        }
    )
    ip("link", "set", "lo", "up")
    ip("tuntap", "add", "out0", "mode", "tap")
    ip("address", "add", f"{HOST}/24", "dev", "out0")
    ip("address", "add", "10.9.0.2/32", "dev", "out0")
    ip("link", "set", "out0", "up")
    ip("route", "add", "default", "via", "10.9.0.254")
    with ExitStack() as stack:
        server = name_server()
        if server is not None:
            ip("address", "add", f"{server}/32", "dev", "out0")
            stack.enter_context(naming(server))
        for port in (8080, 8081):
            stack.enter_context(serving(port))
        result = boot(
            *("--initrd", root, "--append", "steps=fetch", "--nic", f"user,allow={HOST}:8080"), timeout=350
        )
    said = result.console.splitlines()
    lease = "lease eth0 100.64.0.3/31 router 100.64.0.2 dns 100.64.0.2"
    assert any(line.startswith(lease) for line in said), result.console + result.stderr
    assert "page: a page of the host's" in said, result.console + result.stderr
    assert f"big: {hashlib.md5(BIG).hexdigest()}  -" in said, result.console
    if server is not None:
        (names,) = [line for line in said if line.startswith("name:")]
        assert names.endswith(f"Name: page.test Address: {HOST}"), result.console
    for closed in (f"{HOST} 8081", "10.9.0.2 8080", "100.64.0.2 8080"):
        assert f"{closed}: closed" in said, result.console
    assert "done" in said and result.code == 0, result.stderr
