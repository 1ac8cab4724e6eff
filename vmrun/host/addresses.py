"""Addresses of the host's interfaces, and the lock under which they and bridges are chosen. VMM process.

pyroute2 is imported inside the functions: it takes about 120 ms, which only those pay who need it.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

from vmrun.errors import UserError

LOCK_SECONDS = 10.0
LOCK_INTERVAL = 0.02


@contextmanager
def network_lock() -> Iterator[None]:
    """Hold this network namespace's lock: one vmrun at a time chooses addresses, makes or removes bridges.

    The lock is a flock(2) on the namespace itself: there is no file to make or to forget, namespaces do not
    disturb each other, and it goes with its process. Anybody in the namespace can take it, so nobody is
    waited for longer than LOCK_SECONDS; then UserError.
    """
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        "another program holds the lock of the host's network (flock on /proc/self/ns/net)"
                    ) from None
            time.sleep(LOCK_INTERVAL)
        yield
    finally:
        os.close(fd)


def add_address(interface: str, address: str, prefix: int) -> bool:
    """Give `interface` an address. False when it had it. Raises UserError without the right, else OSError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as route:
        index = socket.if_nametoindex(interface)
        try:
            route.addr("add", index=index, address=address, prefixlen=prefix)
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                return False
            if error.code == errno.EPERM:
                raise UserError(
                    f"ip={address}/{prefix}: giving {interface} an address takes CAP_NET_ADMIN: "
                    f"ip addr add {address}/{prefix} dev {interface}"
                ) from None
            raise OSError(error.code, f"{interface}, address {address}/{prefix}: {error}") from None
    return True


def remove_address(interface: str, address: str, prefix: int) -> None:
    """Take an address away. Nothing happens when somebody took it, or the whole interface, before."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            index = socket.if_nametoindex(interface)
            route.addr("del", index=index, address=address, prefixlen=prefix)
    except (OSError, NetlinkError):
        pass


def addresses(interface: str | None = None) -> list[IPv4Interface | IPv6Interface]:
    """Every address of `interface`, or of the host, with the prefix of its network; of point-to-point links
    the other end's too.
    """
    from pyroute2 import IPRoute

    only = {} if interface is None else {"index": socket.if_nametoindex(interface)}
    found = []
    with IPRoute() as route:
        for message in route.get_addr(**only):
            for name in ("IFA_LOCAL", "IFA_ADDRESS"):
                address = message.get_attr(name)
                if address is not None:
                    found.append(ip_interface((address, message["prefixlen"])))
    return found
