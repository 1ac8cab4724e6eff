"""What a restored guest is told before anybody else talks to it: its own random numbers, the time, and the
addresses of its cards. VMM process, a thread of its own.

The agent in the guest does it (docs/agent.md). A guest without one goes on as it was saved: its clock is
right all the same, for the VMM moved it along, but its random numbers and addresses are those of every other
machine made of the snapshot.
"""

import logging
import socket
import threading
from collections.abc import Sequence

from vmrun.agent.protocol import AgentError
from vmrun.agent.session import AgentSession
from vmrun.errors import UserError
from vmrun.machine.ports import PortLink

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
COMMAND_SECONDS = 30.0
# The card is known by the address it had; busybox and iproute2 both have this `ip`.
NEW_ADDRESS = (
    'for card in /sys/class/net/*; do [ "$(cat "$card/address")" = "$1" ] || continue; '
    'ip link set dev "${card##*/}" address "$2" || exit 1; done'
)


class Greeting:
    """Greets through one of `links`, the ports that the guest's agent has open. `macs` are pairs: the address
    that the guest knows a card by, and the one it has now."""

    def __init__(self, links: Sequence[PortLink], macs: Sequence[tuple[str, str]]) -> None:
        self._links = links
        self._macs = [(before, now) for before, now in macs if before != now]

    def begin(self) -> None:
        """The guest goes on: until then nobody could answer. Main loop."""
        link = next((link for link in self._links if link.free), None)
        if link is None:
            logger.warning("the restored guest was not told of its new identity: others have all its ports")
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(theirs)
        threading.Thread(target=self._greet, args=(ours,), name="greeting", daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            with AgentSession(sock) as session:
                session.hello(ANSWER_SECONDS)
                session.after_restore()
                for before, now in self._macs:
                    process = session.exec(["/bin/sh", "-c", NEW_ADDRESS, "sh", before, now])
                    if process.wait(COMMAND_SECONDS).exit_code:
                        logger.warning("the guest keeps the address %s: it could not set %s", before, now)
        except (AgentError, UserError, TimeoutError, OSError) as error:
            logger.warning("the restored guest was not told of its new identity: %s", error)
