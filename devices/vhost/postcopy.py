"""Sharing guest memory that is filled while it is used: the front end's side. VMM process; any thread.

vhost-user.rst, "Postcopy" and "VHOST_USER_PROTOCOL_F_PAGEFAULT". There it serves migration; here the
memory of a restored machine, which comes out of a file. The back end gives a userfaultfd of its address space
and says where it mapped the regions, so that a pager can answer its faults.

For our own workers: some foreign back ends that offer PAGEFAULT give up when a driver that was reset sets its
device up once more, and memory is shared with them anew. Let `LazyMemory.complete` fill memory for those.
"""

import os
from collections.abc import Sequence
from typing import Protocol

from devices.memory import PAGE_SIZE
from devices.vhost.connection import Connection
from devices.vhost.messages import MEM_REGION, MEM_TABLE, U64, ProtocolError, Request

Mappings = list[tuple[int, int, int]]  # address in the back end, size, offset in guest RAM's file


class LazyMemory(Protocol):
    """Whoever answers the faults (`vmrun.snapshot.pager.LazyRam`). For any thread."""

    @property
    def pending(self) -> bool:
        """Whether pages may be missing, so that back ends have to be shared with in this way."""

    def add_client(self, name: str, uffd: int, mappings: Mappings) -> None:
        """A back end is about to use memory. Takes `uffd` over; replaces what `name` gave before."""

    def client_registered(self, name: str) -> None:
        """The back end has registered its memory: its faults come from now on."""

    def complete(self) -> None:
        """Bring everything in, and wait for it. For back ends that cannot be shared with in this way."""


def share_memory(
    connection: Connection, name: str, table: bytes, fds: Sequence[int], memory: LazyMemory
) -> None:
    """SET_MEM_TABLE with the payload `table` and the regions' descriptors `fds`, in postcopy mode. PAGEFAULT
    must have been negotiated.

    Raises as the connection's methods do: nothing of the guest's memory has been touched then.
    """
    payload, uffd = connection.ask_fd(Request.POSTCOPY_ADVISE, b"")
    del payload  # some back ends send a number there, ours and the specification nothing
    try:
        if connection.ask(Request.POSTCOPY_LISTEN) != bytes(U64.size):
            raise ProtocolError("POSTCOPY_LISTEN was refused")
        mappings = _mappings(table, connection.ask(Request.SET_MEM_TABLE, table, fds))
    except BaseException:
        os.close(uffd)
        raise
    memory.add_client(name, uffd, mappings)
    connection.tell(Request.SET_MEM_TABLE, U64.pack(0))
    memory.client_registered(name)


def _mappings(table: bytes, reply: bytes) -> Mappings:
    """The back end's word for where it mapped `table`'s regions; everything else must be as it was."""
    if len(reply) != len(table) or reply[: MEM_TABLE.size] != table[: MEM_TABLE.size]:
        raise ProtocolError("SET_MEM_TABLE in postcopy mode was answered by another table")
    mappings = []
    asked = MEM_REGION.iter_unpack(table[MEM_TABLE.size :])
    answered = MEM_REGION.iter_unpack(reply[MEM_TABLE.size :])
    for (gpa, size, _, offset), (its_gpa, its_size, address, its_offset) in zip(asked, answered, strict=True):
        if (gpa, size, offset) != (its_gpa, its_size, its_offset) or address % PAGE_SIZE:
            raise ProtocolError(f"memory region {gpa:#x}+{size:#x} was answered by another one")
        if not 0 < address < 1 << 47:
            raise ProtocolError(f"memory region at {address:#x} is in no address space")
        mappings.append((address, size, offset))
    return mappings
