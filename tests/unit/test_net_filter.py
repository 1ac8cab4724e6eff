"""What a guest may send through passt: against a model made of the ipaddress module, and hostile frames."""

import socket
import struct
from ipaddress import IPv4Address, IPv4Network, ip_network

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from devices.net.filter import ANY_PORT, ICMP, TCP, UDP, Network, OutboundFilter, Rules

MAC = bytes.fromhex("525400123456")
GATEWAY_MAC = bytes.fromhex("020064400002")
GUEST, GATEWAY = "100.64.0.3", "100.64.0.2"
PUBLIC = "93.184.215.14"
PRIVATE = [ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")]

# Where decisions change: the ends of special networks and their neighbours.
SPECIAL = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
    *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
)
EDGES = sorted(
    {
        (int(edge) + step) % 2**32
        for network in map(ip_network, SPECIAL)
        for edge in (network[0], network[-1])
        for step in (-1, 0, 1)
    }
)
addresses = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**32 - 1)).map(IPv4Address)
ports = st.integers(1, 65535)
networks = st.builds(
    lambda address, prefix: IPv4Network((address, prefix), strict=False), addresses, st.integers(0, 32)
)


def packet(
    destination: str,
    port: int = 80,
    protocol: int = TCP,
    *,
    source: str = GUEST,
    first: int = 0x45,
    fragment: int = 0x4000,
    payload: bytes = b"",
    total: int | None = None,
) -> bytes:
    """An Ethernet frame; checksums are nothing to the filter."""
    if protocol == TCP:
        body = struct.pack(">HHIIHHHH", 40000, port, 1, 0, 0x5002, 65535, 0, 0)
    elif protocol == UDP:
        body = struct.pack(">HHHH", 40000, port, 8 + len(payload), 0)
    else:
        body = struct.pack(">BBHHH", 8, 0, 0, 1, 1)
    body += payload
    size = (first & 15) * 4
    header = struct.pack(
        ">BBHHHBBH4s4s",
        first,
        0,
        size + len(body) if total is None else total,
        0,
        fragment,
        64,
        protocol,
        0,
        socket.inet_aton(source),
        socket.inet_aton(destination),
    )
    return GATEWAY_MAC + MAC + b"\x08\0" + header.ljust(size, b"\1") + body


def outbound(*allowed: str, own: tuple[str, ...] = (), private: bool = False) -> OutboundFilter:
    rules = [(Network(text.partition(":")[0]), int(text.partition(":")[2] or ANY_PORT)) for text in allowed]
    return OutboundFilter(
        socket.inet_aton(GUEST),
        socket.inet_aton(GATEWAY),
        Rules(rules, [Network(text) for text in own], private),
    )


def expected(
    address: IPv4Address,
    port: int,
    allowed: list[tuple[IPv4Network, int]],
    own: list[IPv4Address],
    private: bool,
) -> bool:
    """The rules again, as a person would say them."""
    if address in IPv4Network("0.0.0.0/8") or address.is_loopback or address.is_multicast:
        return False
    if address in IPv4Network("240.0.0.0/4"):
        return False
    hits = [network for network, only in allowed if address in network and only in (0, port)]
    if any(network.prefixlen == 32 for network in hits):
        return True
    if address in own:
        return False
    if hits or (private and any(address in network for network in PRIVATE)):
        return True
    closed = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"))
    return not allowed and address.is_global and not any(address in network for network in closed)


@given(
    address=addresses,
    port=ports,
    allowed=st.lists(st.tuples(networks, st.one_of(st.just(0), ports)), max_size=4),
    own=st.lists(addresses, max_size=3),
    private=st.booleans(),
    aim=st.integers(0, 9),
)
@example(IPv4Address("169.254.169.254"), 80, [], [], True, 9)
@settings(max_examples=300, deadline=None)
def test_rules(
    address: IPv4Address,
    port: int,
    allowed: list[tuple[IPv4Network, int]],
    own: list[IPv4Address],
    private: bool,
    aim: int,
) -> None:
    if aim < len(allowed):  # at a rule, or else hardly any address would meet one
        address, port = allowed[aim][0][0], allowed[aim][1] or port
    elif aim - 4 in range(len(own)):
        address = own[aim - 4]
    rules = Rules(
        [(Network(str(network)), only) for network, only in allowed],
        [Network(str(each)) for each in own],
        private,
    )
    assert rules.allow(int(address), port) == expected(address, port, allowed, own, private)


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_public_addresses_are_open_and_others_are_not(protocol: int) -> None:
    judge = outbound()
    assert judge.pass_on(packet(PUBLIC, protocol=protocol))
    assert judge.denied == 0
    closed = ["127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.1.1", "0.0.0.0", "224.0.0.1"]
    closed += ["255.255.255.255", "100.64.0.1", GUEST, GATEWAY]
    for address in closed:
        assert not judge.pass_on(packet(address, protocol=protocol)), address
    assert judge.denied == len(closed)


def test_an_allow_list_closes_the_rest() -> None:
    judge = outbound("10.1.2.3:443", "192.168.7.0/24")
    assert judge.pass_on(packet("10.1.2.3", 443))
    assert judge.pass_on(packet("10.1.2.3", 443, UDP))
    assert not judge.pass_on(packet("10.1.2.3", 80))
    assert not judge.pass_on(packet("10.1.2.3", protocol=ICMP))  # no port to be right
    assert judge.pass_on(packet("192.168.7.9", protocol=ICMP))
    assert not judge.pass_on(packet("192.168.8.9"))
    assert not judge.pass_on(packet(PUBLIC))


def test_the_hosts_own_addresses_are_closed_but_for_one_named_itself() -> None:
    own = ("192.0.2.2", "93.184.215.14", "198.51.100.0/24")
    assert not outbound(own=own).pass_on(packet(PUBLIC))
    assert not outbound("0.0.0.0/0", own=own).pass_on(packet(PUBLIC))
    assert not outbound("0.0.0.0/0", own=own).pass_on(packet("198.51.100.7"))
    assert outbound("0.0.0.0/0", own=own).pass_on(packet("93.184.215.15"))
    assert outbound(f"{PUBLIC}:80", own=own).pass_on(packet(PUBLIC))
    assert not outbound("0.0.0.0/0").pass_on(packet("127.0.0.1"))


def test_the_gateway_answers_names_and_nothing_else() -> None:
    for judge in (outbound(), outbound("10.1.2.3"), outbound("100.64.0.0/10", private=True)):
        assert judge.pass_on(packet(GATEWAY, 53, UDP))
        assert not judge.pass_on(packet(GATEWAY, 53, TCP))
        assert not judge.pass_on(packet(GATEWAY, 54, UDP))
        assert not judge.pass_on(packet(GATEWAY, 67, UDP))
        assert not judge.pass_on(packet(GATEWAY, protocol=ICMP))


@pytest.mark.parametrize(
    "frame",
    [
        packet(PUBLIC, source="127.0.0.1"),
        packet(PUBLIC, source=GATEWAY),
        packet(PUBLIC, first=0x46),  # with options
        packet(PUBLIC, first=0x44),
        packet(PUBLIC, first=0x65),
        packet(PUBLIC, fragment=0x2000),
        packet(PUBLIC, fragment=1),
        packet(PUBLIC, fragment=0x8000),
        packet(PUBLIC, port=0),
        packet(PUBLIC, protocol=47),
        packet(PUBLIC, protocol=41),
        packet(PUBLIC, total=39),
        packet(PUBLIC, total=41),
        packet(PUBLIC, total=0),
        packet(PUBLIC)[:33],
        packet(PUBLIC)[:-1],
        packet(PUBLIC, protocol=ICMP)[:34] + b"\x05\0" + bytes(6),  # a redirect
        GATEWAY_MAC + MAC + b"\x81\0\0\1" + packet(PUBLIC)[12:],  # a VLAN tag
        GATEWAY_MAC + MAC + b"\x88\xa8\0\1" + packet(PUBLIC)[12:],
        GATEWAY_MAC + MAC + b"\x86\xdd" + bytes(60),
        GATEWAY_MAC + MAC + b"\0\x2e" + bytes(60),  # 802.3, with a length
        b"\xff" * 6 + MAC + b"\x08\6" + b"\0\1\x08\0\6\4" + bytes(21),  # ARP, one byte short
        b"\xff" * 6 + MAC + b"\x08\6" + b"\0\6\x08\0\6\4" + bytes(22),
        b"",
        b"\x08\0" * 7,
    ],
)
def test_other_frames_are_dropped(frame: bytes) -> None:
    judge = outbound("0.0.0.0/0", private=True)
    assert judge.pass_on(packet(PUBLIC))
    assert not judge.pass_on(frame)


def test_arp_passes_and_padding_does_not() -> None:
    judge = outbound()
    request = b"\xff" * 6 + MAC + b"\x08\6" + b"\0\1\x08\0\6\4\0\1" + bytes(20)
    assert judge.pass_on(request) == judge.pass_on(request.ljust(60, b"\0")) == request
    plain = packet(PUBLIC, protocol=UDP)
    assert judge.pass_on(plain) == judge.pass_on(plain.ljust(60, b"\0")) == plain


@given(
    frame=st.one_of(st.binary(max_size=80), st.binary(max_size=60).map(lambda rest: packet(PUBLIC) + rest))
)
@settings(max_examples=200, deadline=None)
def test_nothing_breaks_it(frame: bytes) -> None:
    judge = outbound()
    assert bool(judge.pass_on(frame)) + judge.denied == 1


@given(at=st.integers(12, 53), value=st.integers(0, 255), target=st.sampled_from(["10.0.0.1", "127.0.0.1"]))
@settings(max_examples=200, deadline=None)
def test_no_single_byte_opens_a_closed_address(at: int, value: int, target: str) -> None:
    """Unless it is one of the address itself, or makes an ARP of it."""
    frame = bytearray(packet(target))
    if 30 <= at < 34:
        return
    frame[at] = value
    assert not outbound().pass_on(bytes(frame)) or bytes(frame[12:14]) == b"\x08\6"


@pytest.mark.parametrize(
    "text", ["", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.4/", "1.2.3.4/33", "1.2.3.-1", "1.2.3.²"]
)
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an IPv4|a prefix is"):
        Network(text)
