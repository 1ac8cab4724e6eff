"""The addresses of `local` cards: a /31 of 100.64.0.0/10 for each, as OpenBSD vmd does it. VMM process.

A machine has one block 100.64.N.0/24 (N counts through all 16384 of them): card number K has 100.64.N.(2K+2)
on the host's end and the address after it in the guest. vmd takes the machine's number for N. vmrun has no
daemon to give out numbers, so the addresses on the host's interfaces are the record: a block is free when
nobody there has to do with it. The address goes with its tap, also after `kill -9`, unless the tap was there
before.

There is no IPv6 in it: the guest has what it makes itself of fe80::/10, and its frames pass.
"""

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface

from vmrun.errors import UserError
from vmrun.host.addresses import addresses, network_lock
from vmrun.host.tap import Tap

# Shared address space, RFC 6598: nobody's own network, but carriers and overlay networks use it too.
SHARED = IPv4Network("100.64.0.0/10")
BLOCK_PREFIX = 24
LINK_PREFIX = 31
MAX_CARDS = 126


def assign(taps: Mapping[int, Tap]) -> dict[int, str]:
    """Give the tap of each card (by its number in the machine) the host's address of its link; return those.

    The guest's address is one higher. Raises UserError when nothing is free, and what `Tap.add_address`
    raises.
    """
    if not taps:
        return {}
    if max(taps) >= MAX_CARDS:
        raise UserError(f"--nic {taps[max(taps)].name}: only the first {MAX_CARDS} cards can be local")
    with network_lock():
        block = free_block(addresses())
        hosts = {number: str(block[2 * number + 2]) for number in taps}
        for number, tap in taps.items():
            tap.add_address(hosts[number], LINK_PREFIX)
    return hosts


def free_block(taken: Iterable[IPv4Interface | IPv6Interface]) -> IPv4Network:
    """The first block that has nothing in common with the addresses `taken` and their networks."""
    networks = []
    for interface in taken:
        if not isinstance(interface, IPv4Interface) or not interface.network.overlaps(SHARED):
            continue
        # A carrier's /10 is the whole of the space. Links of our own inside it are more specific routes: they
        # hide two addresses each, and only the host's own must not be one of them.
        wide = interface.network.prefixlen < 16
        networks.append(IPv4Network(interface.ip) if wide else interface.network)
    blocks = SHARED.subnets(new_prefix=BLOCK_PREFIX)
    next(blocks)  # N counts from 1, as the numbers of vmd's machines do
    for block in blocks:
        if not any(block.overlaps(network) for network in networks):
            return block
    raise UserError(f"local: every block of {SHARED} is in use on this host")
