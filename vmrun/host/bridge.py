"""A place on a bridge for a tap: joined, made when it is not there, and removed by the last that leaves. VMM
process.

A bridge that vmrun makes has the alias "vmrun" (`ip link show br0` tells it). Whichever machine is the last
on it removes it, with its address. After a crash (`kill -9`) the taps are gone but an empty bridge stays; the
next machine on it joins it, and removes it in the end. A bridge that others made is never removed by a
machine.

`vmrun up` makes bridges that stay when nobody is on them: their alias is "vmrun up", and only `remove_bridge`
removes them. Any number of files may want the same.
"""

import errno
import socket
from types import TracebackType
from typing import TYPE_CHECKING

from vmrun.errors import UserError
from vmrun.host.addresses import add_address, addresses, network_lock
from vmrun.host.tap import check_interface_name, parse_host_address, random_mac

if TYPE_CHECKING:
    from pyroute2 import IPRoute
    from pyroute2.netlink import nlmsg

ALIAS = "vmrun"
LASTING_ALIAS = "vmrun up"


class BridgePort:
    """The tap `tap` on the bridge `name`: a context manager; leave before the tap is closed.

    `address` ("172.16.0.1/24") is given to the bridge, which is the host's end of it, when vmrun made it;
    another bridge must have it already. Raises UserError and OSError.
    """

    def __init__(self, name: str, tap: str, address: str | None = None) -> None:
        self.name = check_interface_name(name, "bridge=")
        self.tap = tap
        self._joined = False
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            with network_lock(), IPRoute() as route:
                try:
                    self._join(route, address)
                except BaseException:
                    self._leave(route)
                    raise
        except NetlinkError as error:
            if error.code == errno.EPERM:
                raise UserError(
                    f"bridge={name}: making or joining a bridge takes CAP_NET_ADMIN: be root, or have it "
                    f"done for you: ip link add {name} type bridge; ip link set {tap} master {name}"
                ) from None
            raise OSError(error.code, f"bridge {name}, port {tap}: {error}") from None

    def _join(self, route: "IPRoute", address: str | None) -> None:
        bridge, link = _find_or_make(route, self.name, ALIAS)
        if address is not None:
            _set_address(self.name, address, ours=_is_ours(link))
        port = socket.if_nametoindex(self.tap)
        (port_link,) = route.get_links(port)
        master = port_link.get_attr("IFLA_MASTER")
        if master not in (None, bridge):
            raise UserError(
                f"--nic {self.tap}: is on the bridge {socket.if_indextoname(master)} already: "
                f"ip link set {self.tap} nomaster"
            )
        if master is None:
            route.link("set", index=port, master=bridge)
            self._joined = True
        if link["state"] != "up":
            route.link("set", index=bridge, state="up")

    def _leave(self, route: "IPRoute") -> None:
        bridge, port = _index(self.name), _index(self.tap)
        if self._joined and port:
            route.link("set", index=port, master=0)
        self._joined = False
        if not bridge:
            return
        (link,) = route.get_links(bridge)
        if _is_ours(link) and not _has_ports(route, bridge):
            route.link("del", index=bridge)

    def close(self) -> None:
        """Leave the bridge, and remove it if it is vmrun's and nobody else is on it. Fine to call twice."""
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        if not self._joined:
            return
        try:
            with network_lock(), IPRoute() as route:
                self._leave(route)
        except (OSError, NetlinkError, UserError):
            # The user took the bridge or our rights away, or somebody sits on the lock: the tap leaves by
            # itself when it goes.
            self._joined = False

    def __enter__(self) -> "BridgePort":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_bridge(name: str, address: str | None = None) -> None:
    """The bridge `name`, up, with `address` ("172.16.0.1/24"): made if it is not there, and lasting also if a
    machine made it. One that others made must have the address already. Raises UserError and OSError.
    """
    check_interface_name(name, "")
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with network_lock(), IPRoute() as route:
            bridge, link = _find_or_make(route, name, LASTING_ALIAS)
            ours = _is_ours(link) or _is_lasting(link)
            if _is_ours(link):
                route.link("set", index=bridge, ifalias=LASTING_ALIAS)
            if address is not None:
                _set_address(name, address, ours=ours)
            if link["state"] != "up":
                route.link("set", index=bridge, state="up")
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise UserError(
                f"bridge {name}: making a bridge takes CAP_NET_ADMIN: be root, or have it made for you: "
                f"ip link add {name} type bridge"
            ) from None
        raise OSError(error.code, f"bridge {name}: {error}") from None


def remove_bridge(name: str) -> bool:
    """Remove what `make_bridge` made, if nobody is on it; whether it was. Raises UserError and OSError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with network_lock(), IPRoute() as route:
            bridge = _index(name)
            if not bridge:
                return False
            (link,) = route.get_links(bridge)
            if not _is_lasting(link) or _has_ports(route, bridge):
                return False
            route.link("del", index=bridge)
            return True
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise UserError(f"bridge {name}: removing a bridge takes CAP_NET_ADMIN: be root") from None
        raise OSError(error.code, f"bridge {name}: {error}") from None


def _find_or_make(route: "IPRoute", name: str, alias: str) -> tuple[int, "nlmsg"]:
    """The index of the bridge `name`, and what the kernel says of it; with `alias` if it is made here."""
    bridge = _index(name)
    if not bridge:
        # With a MAC of its own: otherwise it has the lowest of its ports', which changes as machines come and
        # go, under those who know it by ARP.
        route.link("add", ifname=name, kind="bridge", address=random_mac().hex(":"))
        bridge = socket.if_nametoindex(name)
        route.link("set", index=bridge, ifalias=alias)
    (link,) = route.get_links(bridge)
    if not _is_bridge(link):
        raise UserError(f"bridge={name}: exists, and is not a bridge")
    return bridge, link


def _set_address(name: str, address: str, *, ours: bool) -> None:
    ip, prefix = parse_host_address(address)
    if ours:
        add_address(name, ip, prefix)
    elif ip not in [str(interface.ip) for interface in addresses(name)]:
        raise UserError(
            f"ip={address}: the bridge {name} is not vmrun's own: give it the address yourself: "
            f"ip addr add {address} dev {name}"
        )


def _has_ports(route: "IPRoute", bridge: int) -> bool:
    return any(other.get_attr("IFLA_MASTER") == bridge for other in route.get_links())


def _is_bridge(link: "nlmsg") -> bool:
    return bool(link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "bridge")


def _is_ours(link: "nlmsg") -> bool:
    return _is_bridge(link) and link.get_attr("IFLA_IFALIAS") == ALIAS


def _is_lasting(link: "nlmsg") -> bool:
    return _is_bridge(link) and link.get_attr("IFLA_IFALIAS") == LASTING_ALIAS


def _index(interface: str) -> int:
    """The interface's index, or 0."""
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return 0
