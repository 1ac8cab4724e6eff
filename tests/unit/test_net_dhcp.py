"""The built-in DHCP answer: what is answered, what is left alone, and what an answer says. Requests and
answers are written and read here by hand, not with the code under test.
"""

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.net import dhcp
from devices.net.frames import Datagram, build_frame, internet_checksum, parse_datagram

MAC = bytes.fromhex("525400123456")
HOST_MAC = bytes.fromhex("0a0102030405")
ADDRESS, HOST = bytes((100, 64, 1, 3)), bytes((100, 64, 1, 2))
LEASE = dhcp.Lease(MAC, ADDRESS, HOST_MAC, HOST)
TRANSACTION = bytes.fromhex("deadbeef")
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE = 1, 2, 3, 4, 5, 6, 7


def checksum(data: bytes) -> int:
    """The textbook loop of RFC 1071."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) & 1)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def message(options: bytes | None = None, **fields: bytes) -> bytes:
    """A BOOTP message; with `options` the cookie and those, and the end."""
    parts = {
        "op": b"\1",
        "htype": b"\1",
        "hlen": b"\6",
        "hops": b"\0",
        "xid": TRANSACTION,
        "secs": bytes(2),
        "flags": bytes(2),
        "ciaddr": bytes(4),
        "yiaddr": bytes(4),
        "siaddr": bytes(4),
        "giaddr": bytes(4),
        "chaddr": MAC + bytes(10),
        "sname": bytes(64),
        "file": bytes(128),
    }
    parts.update(fields)
    return b"".join(parts.values()) + (b"" if options is None else b"\x63\x82\x53\x63" + options + b"\xff")


def ask(
    payload: bytes,
    *,
    to: bytes = b"\xff" * 6,
    sender: bytes = MAC,
    ports: tuple[int, int] = (68, 67),
    zero_checksum: bool = False,
) -> bytes:
    """A frame with `payload` in it, as a client that has no address sends it."""
    source, destination = bytes(4), b"\xff" * 4
    length = 8 + len(payload)
    udp = struct.pack(">HHHH", *ports, length, 0) + payload
    pseudo = source + destination + struct.pack(">HH", 17, length)
    if not zero_checksum:
        udp = udp[:6] + struct.pack(">H", checksum(pseudo + udp)) + udp[8:]
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 7, 0, 64, 17, 0, source, destination)
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    return to + sender + b"\x08\x00" + header + udp


def kind(number: int) -> bytes:
    return bytes((53, 1, number))


class Answer:
    """An answer frame taken apart, its checksums checked."""

    def __init__(self, frame: bytes | None) -> None:
        assert frame is not None
        self.frame = frame
        self.to, self.sender = frame[:6], frame[6:12]
        assert frame[12:14] == b"\x08\x00"
        total = int.from_bytes(frame[16:18], "big")
        packet = frame[14 : 14 + total]
        assert len(packet) == total
        assert checksum(packet[:20]) == 0
        self.source, self.destination = packet[12:16], packet[16:20]
        udp = packet[20:]
        assert struct.unpack(">HHH", udp[:6]) == (67, 68, len(udp))
        assert udp[6:8] != b"\0\0"
        assert checksum(packet[12:20] + struct.pack(">HH", 17, len(udp)) + udp) == 0
        self.bootp = udp[8:]
        assert self.bootp[:4] == b"\2\1\6\0"
        assert self.bootp[4:8] == TRANSACTION
        self.given, self.next_server = self.bootp[16:20], self.bootp[20:24]
        assert self.bootp[28:44] == MAC + bytes(10)
        self.file = self.bootp[108:236].rstrip(b"\0")
        assert self.bootp[236:240] == b"\x63\x82\x53\x63"
        self.options: dict[int, bytes] = {}
        rest = self.bootp[240:]
        while rest[0] != 255:
            assert rest[0] not in self.options
            self.options[rest[0]] = rest[2 : 2 + rest[1]]
            rest = rest[2 + rest[1] :]
        assert not any(rest[1:])


def test_discover_is_offered_everything() -> None:
    answer = Answer(dhcp.answer(ask(message(kind(DISCOVER))), LEASE))
    assert (answer.to, answer.sender) == (MAC, HOST_MAC)
    assert (answer.source, answer.destination) == (HOST, ADDRESS)
    assert (answer.given, answer.next_server, answer.file) == (ADDRESS, HOST, b"")
    assert answer.options == {
        53: bytes((OFFER,)),
        54: HOST,
        51: b"\xff" * 4,
        1: bytes((255, 255, 255, 254)),
        3: HOST,
        6: HOST,
    }
    assert len(answer.bootp) == 300


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (kind(REQUEST), ACK),
        (kind(REQUEST) + b"\x32\4" + ADDRESS, ACK),
        (b"\0\0\x37\3\1\3\6" + kind(REQUEST) + b"\x32\4" + ADDRESS + b"\0", ACK),
        (kind(REQUEST) + b"\x32\4" + HOST, NAK),
        (kind(REQUEST) + b"\x32\2" + ADDRESS[:2], NAK),
        (kind(DECLINE), NAK),
        (kind(RELEASE), NAK),
        (kind(OFFER), NAK),
        (kind(0), NAK),
        (kind(200), NAK),
        (b"\x35\0", NAK),
        (b"\x35\2\1\1", NAK),
        (kind(DISCOVER) + b"\x32\4\x0a\0\0\1", OFFER),
    ],
)
def test_types(options: bytes, expected: int) -> None:
    answer = Answer(dhcp.answer(ask(message(options)), LEASE))
    assert answer.options[53] == bytes((expected,))
    if expected == NAK:
        assert (answer.to, answer.destination) == (b"\xff" * 6, b"\xff" * 4)
        assert (answer.given, answer.next_server) == (bytes(4), bytes(4))
        assert set(answer.options) == {53, 54}


def test_a_client_that_wants_broadcasts_gets_one() -> None:
    answer = Answer(dhcp.answer(ask(message(kind(DISCOVER), flags=b"\x80\0")), LEASE))
    assert (answer.to, answer.destination) == (b"\xff" * 6, b"\xff" * 4)
    assert answer.bootp[10:12] == b"\x80\0"
    assert answer.given == ADDRESS


@pytest.mark.parametrize("payload", [message(), message(b""), message() + bytes(64)])
def test_plain_bootp(payload: bytes) -> None:
    answer = Answer(dhcp.answer(ask(payload), LEASE))
    assert answer.given == ADDRESS
    assert answer.options == {1: bytes((255, 255, 255, 254)), 3: HOST, 6: HOST}


def test_network_boot() -> None:
    lease = dhcp.Lease(MAC, ADDRESS, HOST_MAC, HOST, b"pxelinux.0", b"vm1")
    answer = Answer(dhcp.answer(ask(message(kind(DISCOVER))), lease))
    assert (answer.file, answer.next_server, answer.options[12]) == (b"pxelinux.0", HOST, b"vm1")
    refused = Answer(dhcp.answer(ask(message(kind(RELEASE))), lease))
    assert refused.file == b"" and set(refused.options) == {53, 54}


def test_a_request_to_the_host_itself_padding_and_no_checksum() -> None:
    Answer(dhcp.answer(ask(message(kind(REQUEST)), to=HOST_MAC), LEASE))
    Answer(dhcp.answer(ask(message(kind(REQUEST))) + bytes(46), LEASE))
    Answer(dhcp.answer(ask(message(kind(REQUEST)), zero_checksum=True), LEASE))


GOOD = ask(message(kind(DISCOVER)))
UNCHECKED = ask(message(kind(DISCOVER)), zero_checksum=True)


def changed(frame: bytes, at: int, byte: int) -> bytes:
    return frame[:at] + bytes((byte,)) + frame[at + 1 :]


def header(at: int, byte: int) -> bytes:
    """GOOD with another byte in the IPv4 header, whose checksum is right for that."""
    frame = changed(GOOD, at, byte)
    return frame[:24] + struct.pack(">H", checksum(frame[14:24] + bytes(2) + frame[26:34])) + frame[26:]


@pytest.mark.parametrize(
    "frame",
    [
        ask(message(kind(1)), to=bytes.fromhex("525400000001")),
        ask(message(kind(1)), sender=bytes.fromhex("525400123457")),
        ask(message(kind(1)), ports=(67, 68)),
        ask(message(kind(1)), ports=(68, 68)),
        ask(message(kind(1)), ports=(67, 67)),
        ask(message(kind(1), op=b"\2")),
        ask(message(kind(1), htype=b"\6")),
        ask(message(kind(1), hlen=b"\7")),
        ask(message(kind(1), hops=b"\1")),
        ask(message(kind(1), ciaddr=ADDRESS)),
        ask(message(kind(1), chaddr=b"\2" + bytes(15))),
        ask(message(kind(1), file=b"x" + bytes(127))),
        ask(message()[:-1]),
        ask(b""),
        ask(message(kind(1) + b"\x32\4\1")),  # the last option ends past the message
        ask(message(kind(1))[:-1] + b"\x32"),
        changed(GOOD, 12, 0x86),
        header(14, 0x65),
        header(14, 0x44),
        header(14, 0x4F),
        header(16, 0),  # the packet ends before the datagram does
        header(16, 9),  # or after the frame
        header(20, 0x20),  # more fragments
        header(21, 1),  # a later fragment
        header(23, 6),
        changed(UNCHECKED, 39, 7),  # a datagram that is shorter than its header
        changed(UNCHECKED, 38, 9),
        changed(GOOD, 24, GOOD[24] ^ 1),
        changed(GOOD, 40, GOOD[40] ^ 1),
        changed(GOOD, len(GOOD) - 1, 0xFE),
        GOOD[:-1],
        GOOD[:41],
        b"",
    ],
)
def test_everything_else_goes_on(frame: bytes) -> None:
    assert dhcp.answer(frame, LEASE) is None


def test_the_helper_damages_nothing_else() -> None:
    assert header(22, 200) != GOOD  # the time to live
    Answer(dhcp.answer(header(22, 200), LEASE))


def test_the_quick_look_agrees() -> None:
    assert dhcp.may_be_request(GOOD[:42])
    for size in range(42):
        assert not dhcp.may_be_request(GOOD[:size][:37])
    assert not dhcp.may_be_request(ask(message(kind(1)), ports=(67, 68))[:42])


@settings(max_examples=150, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), max_size=6),
    size=st.integers(0, 400),
    repair=st.booleans(),
)
def test_no_damage_raises(cuts: list[tuple[int, bytes]], size: int, repair: bool) -> None:
    frame = bytearray(GOOD.ljust(400, b"\0"))
    for at, data in cuts:
        frame[at : at + len(data)] = data
    if repair:  # past the checksums
        frame[24:26] = bytes(2)
        frame[24:26] = struct.pack(">H", checksum(bytes(frame[14:34])))
        frame[40:42] = bytes(2)
    answer = dhcp.answer(bytes(frame[:size]), LEASE)
    if answer is not None:
        assert parse_datagram(answer) is not None


@settings(max_examples=100, deadline=None)
@given(options=st.binary(max_size=400))
def test_any_options(options: bytes) -> None:
    answer = dhcp.answer(ask(message()[:236] + b"\x63\x82\x53\x63" + options), LEASE)
    if answer is not None:
        assert len(answer) < 600


def test_every_size_up_to_64_kib() -> None:
    noise = os.urandom(65536)
    good_head = GOOD[:42] + noise
    for size in range(65537):
        assert dhcp.answer(noise[:size], LEASE) is None
        assert dhcp.answer(good_head[:size], LEASE) is None
    whole = ask(message() + noise[: 65535 - 28 - 236])
    assert len(whole) == 65535 + 14
    dhcp.answer(whole, LEASE)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=600))
def test_checksum(data: bytes) -> None:
    assert internet_checksum(data) == checksum(data)


@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=300))
def test_build_and_parse(payload: bytes) -> None:
    frame = build_frame(Datagram(HOST_MAC, MAC, HOST, ADDRESS, 67, 68, payload))
    assert len(frame) >= 60
    parsed = parse_datagram(frame)
    assert parsed is not None
    assert (parsed.source_mac, parsed.destination_mac, parsed.source, parsed.destination) == (
        *(HOST_MAC, MAC, HOST, ADDRESS),
    )
    assert (parsed.source_port, parsed.destination_port, parsed.payload) == (67, 68, payload)


def test_bad_leases() -> None:
    for arguments in (
        (MAC[:5], ADDRESS, HOST_MAC, HOST),
        (MAC, ADDRESS[:3], HOST_MAC, HOST),
        (MAC, ADDRESS, b"", HOST),
    ):
        with pytest.raises(ValueError, match="six bytes"):
            dhcp.Lease(*arguments)
    for name in (b"x" * 128, b"a\0b"):
        with pytest.raises(ValueError, match="boot file"):
            dhcp.Lease(MAC, ADDRESS, HOST_MAC, HOST, name)
