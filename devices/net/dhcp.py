"""The built-in DHCP and BOOTP answer of a `local` interface: one lease, for the one guest on the wire. Worker
process.

As in OpenBSD vmd: no state, no server on the host. A request among the frames that the guest sends is
answered and goes no further; everything else is not this module's and goes on to the tap. Follows RFC 951,
2131 and 2132. There is no IPv6 here: no DHCPv6 and no router advertisement.

Every byte of a request is the guest's. An answer is made from the lease, the request's transaction and its
flags, and reaches nobody but the guest that asked.
"""

from __future__ import annotations

from struct import Struct

from devices.net.frames import BROADCAST, Datagram, build_frame, parse_datagram

SERVER_PORT = 67
CLIENT_PORT = 68

BOOTREQUEST = 1
BOOTREPLY = 2
HTYPE_ETHERNET = 1
BROADCAST_FLAG = 0x8000
COOKIE = b"\x63\x82\x53\x63"
# What the smallest BOOTP implementations expect at least, and relays pad to (RFC 1542, 2.1).
MINIMUM_MESSAGE = 300

# Options, RFC 2132.
PAD = 0
SUBNET_MASK = 1
ROUTER = 3
NAME_SERVER = 6
HOST_NAME = 12
REQUESTED_ADDRESS = 50
LEASE_TIME = 51
MESSAGE_TYPE = 53
SERVER_IDENTIFIER = 54
END = 255

DHCPDISCOVER = 1
DHCPOFFER = 2
DHCPREQUEST = 3
DHCPACK = 5
DHCPNAK = 6

FOR_EVER = b"\xff\xff\xff\xff"
# A /31 has two addresses, and both are hosts' (RFC 3021).
MASK = b"\xff\xff\xff\xfe"
NOBODY = bytes(4)
EVERYBODY = b"\xff\xff\xff\xff"

FILE_SIZE = 127  # of 128, with the NUL that ends it
NAME_SIZE = 63

# op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file
_message = Struct(">BBBBIHH4s4s4s4s16s64s128s")


class Lease:
    """What the guest `mac` is told: MACs are 6 bytes, addresses 4. `boot_file` and `host_name` may be empty.

    `server_mac` is the host's end's; the answers come from it. Raises ValueError for what does not fit.
    """

    __slots__ = ("address", "boot_file", "host_name", "mac", "server", "server_mac")

    def __init__(
        self,
        mac: bytes,
        address: bytes,
        server_mac: bytes,
        server: bytes,
        boot_file: bytes = b"",
        host_name: bytes = b"",
    ) -> None:
        if len(mac) != 6 or len(server_mac) != 6 or len(address) != 4 or len(server) != 4:
            raise ValueError("a lease takes MACs of six bytes and addresses of four")
        if len(boot_file) > FILE_SIZE or b"\0" in boot_file:
            raise ValueError(f"the name of a boot file has at most {FILE_SIZE} bytes, and no NUL")
        self.mac = mac
        self.address = address
        self.server_mac = server_mac
        self.server = server
        self.boot_file = boot_file
        self.host_name = host_name[:NAME_SIZE]


def may_be_request(head: bytes) -> bool:
    """Whether the frame that starts with `head` (its first 42 bytes or more) is worth a look by `answer`.

    A UDP header that IP options have moved is looked for nowhere: no DHCP client sends any.
    """
    return head[12:15] == b"\x08\x00\x45" and head[23:24] == b"\x11" and head[34:38] == b"\0\x44\0\x43"


def answer(frame: bytes, lease: Lease) -> bytes | None:
    """The frame that answers `frame`, or None when it is no request of this guest's for its address."""
    request = parse_datagram(frame)
    if (
        request is None
        or request.source_mac != lease.mac
        or request.destination_mac not in (BROADCAST, lease.server_mac)
        or (request.source_port, request.destination_port) != (CLIENT_PORT, SERVER_PORT)
        or len(request.payload) < _message.size
    ):
        return None
    op, htype, hlen, hops, transaction, _, flags, ciaddr, _, _, giaddr, chaddr, _, file = (
        _message.unpack_from(request.payload)
    )
    # A client that has an address already (ciaddr) speaks to the host itself: vmd leaves that to others, too.
    if (op, htype, hlen, hops) != (BOOTREQUEST, HTYPE_ETHERNET, 6, 0) or chaddr[:6] != lease.mac:
        return None
    if ciaddr != NOBODY or file[0]:
        return None
    options = parse_options(request.payload[_message.size :])
    if options is None:
        return None
    kind = _answer_type(options, lease)
    refused = kind == DHCPNAK
    fields = _message.pack(
        *(BOOTREPLY, HTYPE_ETHERNET, 6, 0, transaction, 0, flags, NOBODY),
        NOBODY if refused else lease.address,
        NOBODY if refused else lease.server,
        giaddr,
        chaddr,
        b"",
        b"" if refused else lease.boot_file,
    )
    message = (fields + COOKIE + _answer_options(kind, lease)).ljust(MINIMUM_MESSAGE, b"\0")
    # RFC 2131, 4.1: a client that cannot take unicasts before it is configured says so.
    broadcast = refused or flags & BROADCAST_FLAG
    return build_frame(
        Datagram(
            lease.server_mac,
            BROADCAST if broadcast else lease.mac,
            lease.server,
            EVERYBODY if broadcast else lease.address,
            SERVER_PORT,
            CLIENT_PORT,
            message,
        )
    )


def parse_options(field: bytes) -> dict[int, bytes] | None:
    """The options of a message's last field by their codes; empty without the cookie, as in plain BOOTP.

    Of an option that comes twice the first counts. None when one does not end inside the field.
    """
    options: dict[int, bytes] = {}
    if field[:4] != COOKIE:
        return options
    at = 4
    while at < len(field) and field[at] != END:
        if field[at] == PAD:
            at += 1
            continue
        value = field[at + 2 : at + 2 + field[at + 1]] if at + 1 < len(field) else b""
        if at + 1 >= len(field) or len(value) < field[at + 1]:
            return None
        options.setdefault(field[at], value)
        at += 2 + len(value)
    return options


def _answer_type(options: dict[int, bytes], lease: Lease) -> int | None:
    """The DHCP message type to answer with; None for plain BOOTP, which has none."""
    kind = options.get(MESSAGE_TYPE)
    if kind is None:
        return None
    if kind == bytes((DHCPDISCOVER,)):
        return DHCPOFFER
    if kind == bytes((DHCPREQUEST,)) and options.get(REQUESTED_ADDRESS, lease.address) == lease.address:
        return DHCPACK
    return DHCPNAK


def _answer_options(kind: int | None, lease: Lease) -> bytes:
    options: list[tuple[int, bytes]] = []
    if kind is not None:
        options = [(MESSAGE_TYPE, bytes((kind,))), (SERVER_IDENTIFIER, lease.server)]
    if kind != DHCPNAK:  # which carries nothing else (RFC 2131, table 3)
        if kind is not None:
            options.append((LEASE_TIME, FOR_EVER))
        options += [(SUBNET_MASK, MASK), (ROUTER, lease.server), (NAME_SERVER, lease.server)]
        if lease.host_name:
            options.append((HOST_NAME, lease.host_name))
    return b"".join([bytes((code, len(value))) + value for code, value in options]) + bytes((END,))
