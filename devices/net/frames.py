"""Ethernet frames and the UDP datagrams of IPv4 in them: reading and building. Worker process.

Follows IEEE 802.3 and RFC 791, 768 and 1071. Every function takes private bytes, never guest memory: what was
checked must be what is used.
"""

from __future__ import annotations

from struct import Struct

ETHERNET_HEADER = 14
# Without the frame check sequence, which neither a tap nor virtio carries (802.3, 3.2.7).
MINIMUM_FRAME = 60
ETHERTYPE_IPV4 = 0x0800
PROTOCOL_UDP = 17
BROADCAST = b"\xff" * 6

_ethernet = Struct(">6s6sH")
_ipv4 = Struct(">BBHHHBBH4s4s")
_udp = Struct(">HHHH")
_DO_NOT_FRAGMENT = 0x4000
_TIME_TO_LIVE = 64


class Datagram:
    """A UDP datagram with the addresses it travels under: MACs of 6 bytes, IPv4 addresses of 4."""

    __slots__ = (
        "destination",
        "destination_mac",
        "destination_port",
        "payload",
        "source",
        "source_mac",
        "source_port",
    )

    def __init__(
        self,
        source_mac: bytes,
        destination_mac: bytes,
        source: bytes,
        destination: bytes,
        source_port: int,
        destination_port: int,
        payload: bytes,
    ) -> None:
        self.source_mac = source_mac
        self.destination_mac = destination_mac
        self.source = source
        self.destination = destination
        self.source_port = source_port
        self.destination_port = destination_port
        self.payload = payload


def source_mac(frame: bytes) -> bytes:
    """The sender's MAC of a frame of at least 14 bytes."""
    return frame[6:12]


def is_for(mac: bytes, destination: bytes) -> bool:
    """Whether the station `mac` takes a frame to `destination`: its own, or any group's (broadcast too)."""
    return destination == mac or bool(destination[0] & 1)


def internet_checksum(data: bytes) -> int:
    """RFC 1071. Over data that contains its own right checksum it is 0."""
    # Sixteen-bit ones' complement addition is arithmetic modulo 65535, in which 65536 is 1: so is the sum of
    # the digits of one big number.
    number = int.from_bytes(data + b"\0" if len(data) & 1 else data, "big")
    return 0xFFFF - (number % 0xFFFF or (0xFFFF if number else 0))


def parse_datagram(frame: bytes) -> Datagram | None:
    """The UDP datagram in `frame`, or None when it is anything else, a fragment, or damaged.

    What follows the datagram in the frame (padding) is ignored.
    """
    if len(frame) < ETHERNET_HEADER + _ipv4.size + _udp.size:
        return None
    destination_mac, sender_mac, ethertype = _ethernet.unpack_from(frame)
    if ethertype != ETHERTYPE_IPV4:
        return None
    version, _, total, _, fragment, _, protocol, _, source, destination = _ipv4.unpack_from(
        frame, ETHERNET_HEADER
    )
    header_size = (version & 15) * 4
    packet = frame[ETHERNET_HEADER : ETHERNET_HEADER + total]
    if (
        version >> 4 != 4
        or header_size < _ipv4.size
        or total < header_size + _udp.size
        or len(packet) < total
        or fragment & ~_DO_NOT_FRAGMENT
        or protocol != PROTOCOL_UDP
        or internet_checksum(packet[:header_size])
    ):
        return None
    source_port, destination_port, length, checksum = _udp.unpack_from(packet, header_size)
    if not _udp.size <= length <= total - header_size:
        return None
    datagram = packet[header_size : header_size + length]
    # No checksum at all is 0, and legal.
    if checksum and internet_checksum(_pseudo_header(source, destination, length) + datagram):
        return None
    payload = datagram[_udp.size :]
    return Datagram(sender_mac, destination_mac, source, destination, source_port, destination_port, payload)


def build_frame(datagram: Datagram) -> bytes:
    """The Ethernet frame that carries `datagram`, unfragmented, padded to the smallest size a wire takes."""
    length = _udp.size + len(datagram.payload)
    source, destination = datagram.source, datagram.destination
    udp = _udp.pack(datagram.source_port, datagram.destination_port, length, 0) + datagram.payload
    checksum = internet_checksum(_pseudo_header(source, destination, length) + udp) or 0xFFFF
    udp = udp[:6] + checksum.to_bytes(2, "big") + udp[8:]
    total = _ipv4.size + length
    fields = (0x45, 0, total, 0, _DO_NOT_FRAGMENT, _TIME_TO_LIVE, PROTOCOL_UDP)
    checksum = internet_checksum(_ipv4.pack(*fields, 0, source, destination))
    frame = _ethernet.pack(datagram.destination_mac, datagram.source_mac, ETHERTYPE_IPV4)
    frame += _ipv4.pack(*fields, checksum, source, destination) + udp
    return frame.ljust(MINIMUM_FRAME, b"\0")


def _pseudo_header(source: bytes, destination: bytes, length: int) -> bytes:
    return source + destination + PROTOCOL_UDP.to_bytes(2, "big") + length.to_bytes(2, "big")
