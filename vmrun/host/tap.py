"""A tap interface: the host's end of a virtio-net card. VMM process; the worker gets the fd and configures
nothing.

Follows Documentation/networking/tuntap.rst and linux/if_tun.h. A tap made here is not persistent: the kernel
removes it with the last file descriptor, so it is gone even after `kill -9` of the VMM (its workers die with
it). That is also why pyroute2 does not make it: its `link("add", kind="tuntap")` always makes persistent
ones.
"""

import errno
import fcntl
import os
import socket
import struct
from types import TracebackType

from vmrun.errors import UserError
from vmrun.host.addresses import add_address, remove_address

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNGETIFF = 0x800454D2
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP = 0x0002
IFF_PERSIST = 0x0800
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

# linux/sockios.h and linux/if.h
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFMTU = 0x8922
SIOCGIFHWADDR = 0x8927
IFF_UP = 0x0001
IFNAMSIZ = 16

VIRTIO_NET_HDR_SIZE = 12  # struct virtio_net_hdr with num_buffers: virtio 1.2, 5.1.6
IFREQ = struct.Struct("16sH22x")  # struct ifreq as these calls use it: a name and 16 bits of flags


def check_interface_name(name: str, option: str = "--nic ") -> str:
    """`name` if the kernel can take it (dev_valid_name in net/core/dev.c), else a UserError that names
    `option`.
    """
    if not name:
        raise UserError("--nic: give the name of a tap, as in --nic tap0")
    if len(os.fsencode(name)) >= IFNAMSIZ:
        raise UserError(f"{option}{name}: an interface name has at most {IFNAMSIZ - 1} bytes")
    if name in (".", "..") or any(c in "/:%" or c.isspace() or not c.isprintable() for c in name):
        # "%" is legal in a name, but TUNSETIFF takes it as a template ("tap%d") and picks a name of its own.
        raise UserError(f"{option}{name!r}: not an interface name (no '/', ':', '%' or spaces)")
    return name


def parse_mac(text: str) -> bytes:
    """The 6 bytes of "52:54:00:12:34:56" ('-' will do for ':'). UserError unless it is one station's
    address.
    """
    parts = text.replace("-", ":").split(":")
    if len(parts) != 6 or not all(len(part) == 2 and part.isascii() and part.isalnum() for part in parts):
        raise UserError(f"mac={text}: a MAC address is six pairs of hex digits, as in 52:54:00:12:34:56")
    try:
        mac = bytes(int(part, 16) for part in parts)
    except ValueError:
        raise UserError(
            f"mac={text}: a MAC address is six pairs of hex digits, as in 52:54:00:12:34:56"
        ) from None
    if mac[0] & 1:
        raise UserError(
            f"mac={text}: this is a group address (the first byte is odd): a card needs an even one"
        )
    if not any(mac):
        raise UserError(f"mac={text}: all zeroes is nobody's address")
    return mac


def random_mac() -> bytes:
    """A random MAC address, locally administered and of one station (IEEE 802c): never a real card's."""
    mac = bytearray(os.urandom(6))
    mac[0] = mac[0] & 0xFC | 0x02
    return bytes(mac)


def parse_host_address(text: str) -> tuple[str, int]:
    """("172.16.0.1", 24) of "172.16.0.1/24", IPv4 or IPv6. UserError when malformed or no host can have
    it.
    """
    import ipaddress

    if "/" not in text:
        try:
            address = ipaddress.ip_address(text)
            example = f"{address}/{24 if address.version == 4 else 64}"
        except ValueError:
            example = "172.16.0.1/24"
        raise UserError(
            f"ip={text}: give an address and how long its network's prefix is, as in ip={example}"
        )
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError as error:
        raise UserError(f"ip={text}: not an address with a prefix, as in 172.16.0.1/24 ({error})") from None
    network = interface.network
    reserved = [network.network_address, network.broadcast_address] if network.version == 4 else []
    if interface.ip.is_multicast or interface.ip.is_unspecified:
        raise UserError(f"ip={text}: not an address a host can have")
    if network.num_addresses > 2 and interface.ip in reserved:
        raise UserError(
            f"ip={text}: this is the network's or its broadcast address; try {network[1]}/{network.prefixlen}"
        )
    return str(interface.ip), network.prefixlen


class Tap:
    """The open tap `name`, up, and with `address` ("172.16.0.1/24") when given: a context manager that owns
    `fd`.

    An existing tap is used, otherwise one is made. On close a tap that existed gets back what was changed
    (link state, address); one made here disappears with the last copy of `fd`. `fd` is non-blocking; each
    frame read or written carries a virtio_net_hdr of 12 bytes and nothing is offloaded, so that header says
    nothing but "one plain frame".

    `mtu` (68 to 65521) is for a tap made here; an existing one keeps its own.

    After a crash only what an existing tap was lent remains: up, and the addresses.
    Raises UserError for what the user can put right and OSError for the rest.
    """

    def __init__(self, name: str, address: str | None = None, mtu: int | None = None) -> None:
        self.name = check_interface_name(name)
        self.fd = -1
        self.made_here = False
        self._brought_up = False
        self._added_addresses: list[tuple[str, int]] = []
        wanted = parse_host_address(address) if address is not None else None
        try:
            self._open()
            if mtu is not None and self.made_here:
                self._set_mtu(mtu)
            self._bring_up()
            if wanted is not None:
                self.add_address(*wanted)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UserError("/dev/net/tun is missing: load the tun module (modprobe tun)") from None
        except PermissionError:
            raise UserError("/dev/net/tun: permission denied: be root, or ask for access to it") from None
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENXIO):
                raise UserError(
                    "/dev/net/tun: no driver behind it: load the tun module (modprobe tun)"
                ) from None
            raise
        try:
            request = IFREQ.pack(os.fsencode(self.name), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            fcntl.ioctl(self.fd, TUNSETIFF, request)
        except OSError as error:
            raise self._attach_error(error) from None
        # Only TUNGETIFF tells without a race: a tap that nobody else holds open and is not persistent was
        # made just now.
        _, flags = IFREQ.unpack(fcntl.ioctl(self.fd, TUNGETIFF, IFREQ.pack(os.fsencode(self.name), 0)))
        self.made_here = not flags & IFF_PERSIST
        fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", VIRTIO_NET_HDR_SIZE))
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, 0)

    def _attach_error(self, error: OSError) -> Exception:
        if error.errno == errno.EBUSY:
            return UserError(f"--nic {self.name}: in use by another vmrun or another program")
        if error.errno == errno.EPERM:
            return UserError(
                f"--nic {self.name}: making a tap, or using somebody else's, takes CAP_NET_ADMIN: "
                f"be root, or have one made for you: ip tuntap add {self.name} mode tap user $USER vnet_hdr"
            )
        if error.errno == errno.EINVAL:
            return UserError(
                f"--nic {self.name}: exists, and is not a tap (or one with other options: multi_queue)"
            )
        return OSError(error.errno, f"tap {self.name}: {error.strerror}")

    def _link_flags(self, control: socket.socket) -> int:
        answer = fcntl.ioctl(control, SIOCGIFFLAGS, IFREQ.pack(os.fsencode(self.name), 0))
        return int(IFREQ.unpack(answer)[1])

    def _set_link(self, up: bool) -> bool:
        """Bring the link up or down; whether that changed anything.

        By ioctl and not pyroute2, whose import takes about 120 ms: with hardware KVM that is a good part of a
        start.
        """
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            flags = self._link_flags(control)
            if bool(flags & IFF_UP) == up:
                return False
            fcntl.ioctl(control, SIOCSIFFLAGS, IFREQ.pack(os.fsencode(self.name), flags ^ IFF_UP))
            return True

    def _bring_up(self) -> None:
        try:
            self._brought_up = self._set_link(up=True)
        except PermissionError:
            raise UserError(
                f"--nic {self.name}: is down, and bringing it up takes CAP_NET_ADMIN: "
                f"ip link set {self.name} up"
            ) from None

    def add_address(self, address: str, prefix: int) -> None:
        """Give the host's end an address, as ("172.16.0.1", 24). `close` takes it away if it was not there
        before.
        """
        if add_address(self.name, address, prefix):
            self._added_addresses.append((address, prefix))

    def mac(self) -> bytes:
        """The host's end's own hardware address."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            answer = fcntl.ioctl(control, SIOCGIFHWADDR, IFREQ.pack(os.fsencode(self.name), 0))
        return answer[IFNAMSIZ + 2 : IFNAMSIZ + 8]

    def _set_mtu(self, mtu: int) -> None:
        request = struct.pack("16si20x", os.fsencode(self.name), mtu)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            fcntl.ioctl(control, SIOCSIFMTU, request)

    def close(self) -> None:
        """Undo what was done to an existing tap, and let go of `fd`. Fine to call twice."""
        if self.fd < 0:
            return
        try:
            if not self.made_here:
                for address, prefix in self._added_addresses:
                    remove_address(self.name, address, prefix)
                if self._brought_up:
                    self._set_link(up=False)
        except OSError:
            pass  # the user deleted it under us, or took our rights away: nothing left that we could undo
        finally:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "Tap":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
