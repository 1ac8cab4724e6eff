"""What a guest may send to the world through passt(1): IPv4 to addresses and ports that were allowed, checked
frame by frame. Worker process.

passt makes a socket of the host's for whatever address a packet names, 127.0.0.1 included; so this is all
that stands between a guest and what listens on the host and in its networks. It is in this process because
passt reads what the guest wrote too, and may be taken over by it.

Only what passt can carry passes at all: ARP, and whole TCP, UDP and ICMP echo packets without IP options,
from the guest's own address. Everything else (fragments, VLAN tags, IPv6, other protocols) is dropped: if
passt read such a packet in another way than this module, there would be a way around it. Special addresses
are those of RFC 6890 and the IANA IPv4 Special-Purpose Address Registry.

Every function takes private bytes, never guest memory: what was checked must be what is sent.
"""

from __future__ import annotations

from devices.net.frames import ETHERNET_HEADER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ETHERTYPE_ARP = b"\x08\x06"
ETHERTYPE_IPV4 = b"\x08\0"
# Ethernet and IPv4 addresses (RFC 826).
ARP_KIND = b"\0\1\x08\0\6\4"
ARP_SIZE = 28
IPV4_HEADER = 20
PLAIN_IPV4 = 0x45  # version 4, a header without options
DO_NOT_FRAGMENT = 0x4000
ICMP, TCP, UDP = 1, 6, 17
# The shortest header of each protocol that passes.
HEADERS = {ICMP: 8, TCP: 20, UDP: 8}
ECHO_REQUEST = b"\x08\0"
DOMAIN = 53

ANY_PORT = 0
ONE_ADDRESS = 32


class Network:
    """An IPv4 network, as "10.0.0.0/8"; without a prefix one address. Raises ValueError."""

    __slots__ = ("_mask", "address", "prefix")

    def __init__(self, text: str) -> None:
        address, slash, prefix = text.partition("/")
        parts = address.split(".")
        if len(parts) != 4 or not all([_is_number(part, 255) for part in parts]):
            raise ValueError(f"{text} is not an IPv4 address or network")
        if slash and not _is_number(prefix, 32):
            raise ValueError(f"{text}: a prefix is 0 to 32")
        self.prefix = int(prefix) if slash else ONE_ADDRESS
        self._mask = 0xFFFFFFFF << (32 - self.prefix) & 0xFFFFFFFF
        self.address = int.from_bytes(bytes([int(part) for part in parts]), "big") & self._mask

    def __contains__(self, address: int) -> bool:
        return address & self._mask == self.address

    def overlaps(self, other: Network) -> bool:
        mask = self._mask & other._mask
        return self.address & mask == other.address & mask


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 3 and int(text) <= most


# No rule opens these: this host itself, groups, and what is no address.
NEVER = tuple([Network(text) for text in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")])
# Networks of an organisation's own (RFC 1918) or shared with its carrier (RFC 6598).
PRIVATE = tuple(
    [Network(text) for text in ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")]
)
# Link-local, where clouds keep what their machines may know of themselves; protocol assignments,
# documentation, the 6to4 relay and benchmarks.
RESERVED = tuple(
    [
        Network(text)
        for text in (
            *("169.254.0.0/16", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        )
    ]
)


class Rules:
    """Where to, without regard of the frame. `allowed` are pairs of a network and a port (ANY_PORT for all).

    With any of them these alone are open, without one all public addresses are. `private` opens PRIVATE too.
    `own` are the host's addresses, closed unless one is allowed by itself: they stay so inside an allowed
    network.
    """

    __slots__ = ("_exact", "_own", "_own_networks", "_private", "_public", "_wide")

    def __init__(self, allowed: Iterable[tuple[Network, int]], own: Iterable[Network], private: bool) -> None:
        rules = list(allowed)
        self._exact = [(network, port) for network, port in rules if network.prefix == ONE_ADDRESS]
        self._wide = [(network, port) for network, port in rules if network.prefix < ONE_ADDRESS]
        hosts = list(own)
        self._own = {network.address for network in hosts if network.prefix == ONE_ADDRESS}
        self._own_networks = tuple([network for network in hosts if network.prefix < ONE_ADDRESS])
        self._private = private
        self._public = not rules

    def allow(self, address: int, port: int) -> bool:
        """`address` is the number that its four bytes are; `port` is ANY_PORT for a packet that has none,
        which only a rule for all ports lets through.
        """
        if _among(address, NEVER):
            return False
        if _matches(address, port, self._exact):
            return True
        if address in self._own or _among(address, self._own_networks):
            return False
        if _matches(address, port, self._wide):
            return True
        if _among(address, PRIVATE):
            return self._private
        return self._public and not _among(address, RESERVED)


def _among(address: int, networks: tuple[Network, ...]) -> bool:
    for network in networks:  # noqa: SIM110  # any() and its generator take twice the time, for each frame
        if address in network:
            return True
    return False


def _matches(address: int, port: int, rules: list[tuple[Network, int]]) -> bool:
    for network, allowed in rules:  # noqa: SIM110
        if allowed in (ANY_PORT, port) and address in network:
            return True
    return False


class OutboundFilter:
    """Judges the frames of the guest with the address `guest` and the gateway `gateway`, four bytes each.

    The gateway is nobody: what is open of it are names over UDP, which passt forwards to the host's name
    server. `denied` counts what was dropped.
    """

    __slots__ = ("_gateway", "_guest", "_rules", "denied")

    def __init__(self, guest: bytes, gateway: bytes, rules: Rules) -> None:
        self._guest = guest
        self._gateway = gateway
        self._rules = rules
        self.denied = 0

    def pass_on(self, frame: bytes) -> bytes:
        """What of `frame` may be sent: the packet, without the padding behind it, which passt does not take;
        or nothing.
        """
        size = self._judge(frame)
        if not size:
            self.denied += 1
        return frame[:size]

    def _judge(self, frame: bytes) -> int:
        """How long the packet is with its Ethernet header, or 0."""
        kind = frame[12:ETHERNET_HEADER]
        room = len(frame) - ETHERNET_HEADER
        if kind == ETHERTYPE_ARP:
            good = room >= ARP_SIZE and frame[14:20] == ARP_KIND
            return ETHERNET_HEADER + ARP_SIZE if good else 0
        if kind != ETHERTYPE_IPV4 or room < IPV4_HEADER or frame[14] != PLAIN_IPV4:
            return 0
        header = HEADERS.get(frame[23])
        total = int.from_bytes(frame[16:18], "big")
        fragment = int.from_bytes(frame[20:22], "big")
        if header is None or not IPV4_HEADER + header <= total <= room or fragment & ~DO_NOT_FRAGMENT:
            return 0
        return ETHERNET_HEADER + total if self._may_go(frame) else 0

    def _may_go(self, frame: bytes) -> bool:
        """For a whole, plain packet."""
        protocol, source, destination = frame[23], frame[26:30], frame[30:34]
        if source != self._guest or destination == self._guest:
            return False
        port = ANY_PORT
        if protocol != ICMP:
            port = int.from_bytes(frame[36:38], "big")
            if port == ANY_PORT:
                return False  # no port, and not to be taken for "all"
        elif frame[34:36] != ECHO_REQUEST:
            return False
        if destination == self._gateway:
            return protocol == UDP and port == DOMAIN
        return self._rules.allow(int.from_bytes(destination, "big"), port)
