"""Where a guest may go through passt, as users say it: `--allow-host HOST[:PORT]`. VMM process; the rules are
kept by `devices.net.filter`, in the card's worker.

Names are resolved here, once, when the machine starts, with the host's resolver: an address that a name gets
later is not open, and one that it loses stays so. The host's own addresses are looked up then, too.

Whoever answers for a name, its owner or anybody on the way, chooses its addresses, and the user sees none of
them. So a name opens no address that would be closed without it: only an address or network that the user
wrote is an exception from that.
"""

import re
import socket
from collections.abc import Sequence

from devices.net.filter import ANY_PORT, NEVER, ONE_ADDRESS, Network, Rules
from vmrun.errors import UserError

NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?$"
)
MAX_RULES = 256
MAX_TOLD = 4  # addresses in a message
LOCAL_ROUTE = re.compile(r"\|-- ([0-9.]+)\n((?:\s+/[0-9]+ \w+ \w+.*\n)+)")
LOCAL_PREFIX = re.compile(r"/([0-9]+) host LOCAL")


def parse_allowed(text: str) -> tuple[str, int]:
    """("example.org", 443) of "example.org:443"; without a port it is ANY_PORT. The host is a name, an IPv4
    address or a network. UserError unless a guest can go there.
    """
    host, colon, digits = text.partition(":")
    if ":" in digits:
        raise UserError(f"--allow-host {text}: only IPv4 goes out: give a name, an IPv4 address or a network")
    port = ANY_PORT
    if colon:
        port = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 5 else 0
        if not 1 <= port <= 65535:
            raise UserError(f"--allow-host {text}: a port is 1 to 65535, as in {host or 'example.org'}:443")
    if _is_numeric(host):
        try:
            network = Network(host)
        except ValueError as error:
            raise UserError(f"--allow-host {text}: {error}") from None
        _check_reachable(text, network)
    elif not NAME.match(host):
        raise UserError(
            f"--allow-host {text}: give HOST or HOST:PORT, the host as a name, an address or a network "
            "(10.1.0.0/16)"
        )
    return host, port


def _is_numeric(host: str) -> bool:
    return host.replace(".", "").replace("/", "").isdecimal()


def _check_reachable(text: str, network: Network) -> None:
    if any(network.prefix >= never.prefix and network.overlaps(never) for never in NEVER):
        raise UserError(
            f"--allow-host {text}: no guest gets there (loopback, multicast or no address at all): to reach "
            "a service on this host, let it listen on an address of the host's and give that"
        )


def resolve(allowed: Sequence[str], own: Sequence[str], *, private: bool) -> list[str]:
    """The rules for a worker, as "192.0.2.1/32:443". `own` are the host's addresses, `private` whether
    private networks are open. Raises UserError for a name that has no address which may be open.
    """
    ordinary = Rules((), map(Network, own), private)
    rules: dict[str, None] = {}
    for text in allowed:
        host, port = parse_allowed(text)
        if _is_numeric(host):
            rules[f"{host}:{port}"] = None
            continue
        for address in _addresses(text, host, ordinary):
            rules[f"{address}/{ONE_ADDRESS}:{port}"] = None
    if len(rules) > MAX_RULES:
        raise UserError(
            f"--allow-host: these are {len(rules)} addresses: allow networks (10.1.0.0/16) instead"
        )
    return list(rules)


def _addresses(text: str, name: str, ordinary: Rules) -> list[str]:
    try:
        answers = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--allow-host {text}: no IPv4 address for {name}: {reason.lower()}") from None
    addresses = [str(address[0]) for *_, address in answers]
    opened = [each for each in addresses if ordinary.allow(Network(each).address, ANY_PORT)]
    if not opened:
        told = ", ".join(addresses[:MAX_TOLD])
        raise UserError(
            f"--allow-host {text}: {name} is {told}: a name opens public addresses, "
            "and private ones with --allow-private, but never this host's: if you mean it, give the address"
        )
    return opened


def own_addresses(fib_trie: str = "/proc/thread-self/net/fib_trie") -> list[str]:
    """The IPv4 addresses and networks that are this host's, as "192.0.2.2/32", without the loopback's.

    From the kernel's local routes (net/ipv4/fib_trie.c): what a connection to does not leave the host.
    """
    with open(fib_trie, encoding="ascii") as file:
        text = file.read()
    found: dict[str, None] = {}
    for address, routes in LOCAL_ROUTE.findall(text):
        for prefix in LOCAL_PREFIX.findall(routes):
            network = Network(f"{address}/{prefix}")
            if not any(network.overlaps(never) for never in NEVER):
                found[f"{address}/{prefix}"] = None
    return list(found)
